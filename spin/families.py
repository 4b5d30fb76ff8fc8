"""What alone knows how model families differ: their parts, what they hear of a prompt, how their denoiser is called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from spin.errors import SpinError

# Progress bars and advice of the libraries would bury the stages' own lines. diffusers imports the pipelines that
# are named below only then, and they advise while they are imported.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

Denoiser: TypeAlias = UNet2DConditionModel | SD3Transformer2DModel


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser hears of B prompts, float32: ``text`` [B, L, D] and, where there is one, ``pooled`` [B, P]."""

    text: torch.Tensor
    pooled: torch.Tensor | None = None

    def repeat(self, times: int) -> Self:
        """Return the whole batch ``times`` times over, [times * B, ...]."""
        return self.cat([self] * times)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Return the batches of ``parts`` as one."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(torch.cat([part.text for part in parts]), torch.cat(pooled) if pooled else None)

    def rows(self) -> list[Self]:
        """Return every prompt's own, [1, ...]; none keeps the others' memory."""
        texts = [text.clone() for text in self.text.split(1)]
        pooled = [None] * len(texts) if self.pooled is None else [one.clone() for one in self.pooled.split(1)]
        return [type(self)(text, one) for text, one in zip(texts, pooled, strict=True)]

    @property
    def nbytes(self) -> int:
        return self.text.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def where(self, chosen_B: torch.Tensor, other: Self) -> Self:
        """Return this conditioning in the ``chosen_B`` rows (bool) and ``other``'s in the rest."""
        text = torch.where(chosen_B[:, None, None], self.text, other.text)
        if self.pooled is None or other.pooled is None:
            return type(self)(text)
        return type(self)(text, torch.where(chosen_B[:, None], self.pooled, other.pooled))


Keywords = Callable[[Conditioning, int, int], dict[str, Any]]
"""(conditioning, the image's height and width in pixels) -> the denoiser's arguments beside latents and timestep."""


def _sd(conditioning: Conditioning, height: int, width: int) -> dict[str, Any]:  # noqa: ARG001
    return {"encoder_hidden_states": conditioning.text}


def _sdxl(conditioning: Conditioning, height: int, width: int) -> dict[str, Any]:
    # Original size, crop, target size: winners and losers alike count as images made whole in this size.
    size = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=conditioning.text.device)
    added = {"text_embeds": conditioning.pooled, "time_ids": size.repeat(len(conditioning.text), 1)}
    return {"encoder_hidden_states": conditioning.text, "added_cond_kwargs": added}


def _sd3(conditioning: Conditioning, height: int, width: int) -> dict[str, Any]:  # noqa: ARG001
    return {"encoder_hidden_states": conditioning.text, "pooled_projections": conditioning.pooled}


@dataclass(frozen=True)
class Family:
    """Pipelines of one class.

    Args:
        pipeline: the stock class, which says how prompts are encoded.
        denoiser: name of the part that is trained.
        parts: the class of every part that a self-play run needs, by sub-folder.
        keywords: see ``Keywords``.
        optional: parts that a folder may have or not, all of them together; the first one decides.
        options: arguments of ``pipeline`` for what a run does without.
        settings: arguments of ``pipeline`` that a folder's model_index.json decides.
        prompts: arguments of the pipeline's ``encode_prompt`` that only this family asks for.
    """

    pipeline: type
    denoiser: str
    parts: dict[str, type]
    keywords: Keywords
    optional: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    prompts: dict[str, Any] = field(default_factory=dict)

    def parts_of(self, index: Mapping[str, Any]) -> dict[str, type]:
        """Return the parts that the pipeline of this model_index.json has to have."""
        absent = bool(self.optional) and index.get(self.optional[0]) == [None, None]
        return {name: kind for name, kind in self.parts.items() if not (absent and name in self.optional)}

    def assemble(self, index: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
        """Return the stock pipeline of loaded ``parts``, without a scheduler."""
        settings = {name: index[name] for name in self.settings if name in index}
        absent = dict.fromkeys(name for name in self.optional if name not in parts)
        return self.pipeline(**parts, **absent, **self.options, **settings, scheduler=None)


FAMILIES = {
    family.pipeline.__name__: family
    for family in (
        # SD-1.x and SD-2: they differ in their configs alone.
        Family(
            diffusers.StableDiffusionPipeline,
            "unet",
            {
                "unet": UNet2DConditionModel,
                "vae": AutoencoderKL,
                "text_encoder": CLIPTextModel,
                "tokenizer": CLIPTokenizer,
            },
            _sd,
            options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        ),
        Family(
            diffusers.StableDiffusionXLPipeline,
            "unet",
            {
                "unet": UNet2DConditionModel,
                "vae": AutoencoderKL,
                "text_encoder": CLIPTextModel,
                "tokenizer": CLIPTokenizer,
                "text_encoder_2": CLIPTextModelWithProjection,
                "tokenizer_2": CLIPTokenizer,
            },
            _sdxl,
            options={"add_watermarker": False},
            settings=("force_zeros_for_empty_prompt",),
        ),
        Family(
            diffusers.StableDiffusion3Pipeline,
            "transformer",
            {
                "transformer": SD3Transformer2DModel,
                "vae": AutoencoderKL,
                "text_encoder": CLIPTextModelWithProjection,
                "tokenizer": CLIPTokenizer,
                "text_encoder_2": CLIPTextModelWithProjection,
                "tokenizer_2": CLIPTokenizer,
                "text_encoder_3": T5EncoderModel,
                "tokenizer_3": T5Tokenizer,
            },
            _sd3,
            optional=("text_encoder_3", "tokenizer_3"),
            prompts={"prompt_2": None, "prompt_3": None},
        ),
    )
}
"""By the pipeline's class, which model_index.json names."""


def family_of(index: Mapping[str, Any], where: object) -> Family:
    """Return the family of a pipeline's model_index.json; ``where`` is named in the refusal.

    Raises:
        SpinError: pipelines of this class cannot be played.
    """
    name = index.get("_class_name")
    if family := FAMILIES.get(str(name)):
        return family
    known = " or ".join(FAMILIES)
    raise SpinError(f"expected a pipeline of class {known} in {where}, got {name}; choose another base_model")


def latents_per_step(denoiser: Denoiser) -> int:
    """Return what a denoiser's latents must be a multiple of, along one side: its patch or its halvings."""
    config = denoiser.config
    return int(config.patch_size if "patch_size" in config else 2 ** (len(config.block_out_channels) - 1))
