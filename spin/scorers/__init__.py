"""Scorers: images and prompts in, one float32 per image out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

PRIMARY = "clip_score"
"""The score that decides wins and picks the challenger."""


class Scorer(Protocol):
    """Gives every image one number; higher is better. ``name`` is the column of the scores table."""

    name: str

    def score(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> "torch.Tensor":
        """Return float32 [len(images)] on the CPU; ``images[i]`` was drawn for ``prompts[i]``."""
        ...
