"""Holds the scorers with their real weights against values that their authors published."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from spin.config import ScoreConfig
from spin.download import download
from spin.errors import SpinError
from spin.scorers import BUILT_IN, Setting, load, scored
from spin.weights import Weights

PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
IMAGES = "https://raw.githubusercontent.com/THUDM/ImageReward/0105ff13e24fd3c06db693e67678380882db9752/assets/images"
EXAMPLES = ("1.webp", "2.webp", "3.webp", "4.webp")
PUBLISHED = {"image_reward": (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492)}
"""From the README of ImageReward at the same commit. The other authors publish no value for an image."""
PLAUSIBLE = {
    "hpsv2_0": (0.15, 0.35), "hpsv2_1": (0.1, 0.4), "pickscore": (14, 26), "aesthetic": (3, 8), "clip_score": (5, 40),
}  # fmt: skip
"""Bounds that the examples must lie in where nothing is published: they catch a lost scale or wrong pixels."""
TOLERANCE = 0.02
"""The authors' note says that values differ a little between devices."""


@dataclass(frozen=True)
class Check:
    """One example image under one scorer; ``word`` is ``agrees``, ``plausible`` or ``differs``."""

    scorer: str
    example: str
    published: float | None
    found: float

    @property
    def word(self) -> str:
        if self.published is not None:
            return "agrees" if abs(self.found - self.published) <= TOLERANCE else "differs"
        low, high = PLAUSIBLE[self.scorer]
        return "plausible" if low <= self.found <= high else "differs"


def verify(config: ScoreConfig, only: Sequence[str]) -> list[Check]:
    """Return the checks of the scorers ``only``, or of all that have weights here.

    Without ``only`` these are the two that load from the hub by themselves and those in ``score.weights``.

    Raises:
        SpinError: nothing is known of a scorer, or its weights or the examples are out of reach.
    """
    known = [name for name in BUILT_IN if name in PUBLISHED or name in PLAUSIBLE]
    if wrong := [name for name in only if name not in known]:
        raise SpinError(f"expected scorers of {', '.join(known)}, got {wrong[0]!r}; nothing is published of others")
    names = list(only) or [name for name in known if name in ("clip_score", "pickscore") or name in config.weights]
    images = [Image.open(download(f"{IMAGES}/{example}")).convert("RGB") for example in EXAMPLES]
    setting = Setting(config, torch.device("cpu"), Weights(config.weights))
    checks = []
    for name in names:
        found = scored(load(name, setting), images, [PROMPT] * len(images)).tolist()
        wanted = PUBLISHED.get(name) or [None] * len(images)
        checks += [Check(name, *line) for line in zip(EXAMPLES, wanted, found, strict=True)]
    return checks
