"""Scorers: images and prompts in, one float32 per image out; found by name, built in or from another package."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Protocol

from spin.errors import SpinError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from spin.config import ScoreConfig
    from spin.scorers.clip import Clip
    from spin.weights import Weights

GROUP = "spin.scorers"
"""Entry points of this group in any installed package name further scorers: each is a ``load`` like those below."""
BUILT_IN = {
    "clip_score": "spin.scorers.clip:load_clip_score",
    "style_share": "spin.scorers.clip:load_style_share",
    "hpsv2_0": "spin.scorers.hpsv2:load_v2_0",
    "hpsv2_1": "spin.scorers.hpsv2:load_v2_1",
    "pickscore": "spin.scorers.pickscore:load",
    "image_reward": "spin.scorers.image_reward:load",
    "aesthetic": "spin.scorers.aesthetic:load",
}
TAKEN = ("id", "prompt", "category", "split", "sample", "average", "win_rate")
"""Names of other columns and of what is estimated from scores."""
AVERAGED = ("hpsv2_0", "aesthetic", "image_reward", "pickscore")
"""Their plain mean is the ``average`` of the SPIN-Diffusion paper's tables, which PickScore's scale dominates."""


class Scorer(Protocol):
    """Gives every image one number; higher is better. ``name`` is the column of the scores table."""

    name: str

    def score(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> "torch.Tensor":
        """Return float32 [len(images)] on the CPU; ``images[i]`` was drawn for ``prompts[i]``.

        The number of an image depends on nothing but the image and its prompt.
        """
        ...


@dataclass(frozen=True)
class Setting:
    """What a scorer is loaded with: the run's options, where it computes and in which type, and the weights."""

    config: "ScoreConfig"
    device: "torch.device"
    weights: "Weights"

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]

    @cached_property
    def clip(self) -> "Clip":
        """The judge of ``score.clip_model``, in float32; CLIP score and style share use the same one."""
        from spin.scorers.clip import Clip

        return Clip(self.weights.judge(self.config.clip_model), self.device)


def names() -> list[str]:
    """Return the names of all scorers there are."""
    return sorted({*BUILT_IN, *entry_points(group=GROUP).names})


def load(name: str, setting: Setting) -> Scorer:
    """Return the scorer ``name``, on its device.

    Raises:
        SpinError: no such scorer, its weights are not there, not its own or not what their digest says, or it goes by
            another name.
    """
    if name in BUILT_IN:
        found = EntryPoint(name, BUILT_IN[name], GROUP)
    elif name in (others := entry_points(group=GROUP)).names:
        found = others[name]
    else:
        raise SpinError(f"expected one of the scorers {', '.join(names())}, got {name!r}; set score.scorers")
    scorer: Scorer = found.load()(setting)
    # Its column would be looked for by one name and be found under the other.
    if scorer.name != name:
        raise SpinError(
            f"expected a scorer whose name is {name!r}, as its entry point says, got {scorer.name!r}; mend its package"
        )
    if name in TAKEN:
        raise SpinError(
            f"expected a scorer by another name than {name!r}, which tables of scores use; mend its package"
        )
    return scorer


def load_all(setting: Setting) -> list[Scorer]:
    """Return the scorers of ``score.scorers``, in that order."""
    return [load(name, setting) for name in setting.config.scorers]


def scored(scorer: Scorer, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> "torch.Tensor":
    """Return ``scorer.score(images, prompts)``, having looked at what goes in and what comes out.

    Raises:
        SpinError: an image is missing, something is no image, or the scores are not one finite number per image.
    """
    import torch
    from PIL import Image

    if len(images) != len(prompts):
        raise SpinError(
            f"expected one image for each prompt, got {len(images)} images for {len(prompts)} prompts ({scorer.name}); "
            "score the same rows"
        )
    if wrong := [i for i, image in enumerate(images) if not isinstance(image, Image.Image)]:
        raise SpinError(
            f"expected an image for {prompts[wrong[0]]!r}, got {type(images[wrong[0]]).__name__} ({scorer.name}); "
            "draw it again"
        )
    values = scorer.score(images, prompts) if images else torch.zeros(0)
    if values.shape != (len(images),) or values.dtype != torch.float32:
        raise SpinError(
            f"expected {len(images)} float32 scores from {scorer.name}, got {tuple(values.shape)} {values.dtype}; "
            "mend the scorer"
        )
    if len(bad := (~values.isfinite()).nonzero()):
        i = int(bad[0])
        raise SpinError(
            f"expected finite scores from {scorer.name}, got {values[i].item()} for {prompts[i]!r}; check the player's "
            "images and the scorer's weights"
        )
    return values
