"""Preprocessing of the published scorers, number for number as their authors' code does it.

Their code calls torchvision, whose steps are written out here: it has no CPU build on PyPI that fits every torch, and a
dependency that must match torch to the patch release would be the hardest one of the project to install.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, red, green, blue in 0..1; all of these networks were trained with them."""


def unit(image: Image.Image) -> torch.Tensor:
    """Return an image as float32 [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(255)


def normalised(pixels_CHW: torch.Tensor) -> torch.Tensor:
    """Return pixels with CLIP's mean and deviation taken out."""
    return (pixels_CHW - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def centre_square(image: Image.Image, side: int) -> torch.Tensor:
    """Return float32 [3, side, side]: the shorter side is made ``side``, the middle is cut out (CLIP, ImageReward).

    PIL's bicubic resize, then torchvision's rule for the crop's corner: half of what is left, rounded half to even.
    """
    width, height = image.size
    short = min(width, height)
    image = image.resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in image.size)
    return normalised(unit(image.crop((left, top, left + side, top + side))))


def whole_in_square(image: Image.Image, side: int) -> torch.Tensor:
    """Return float32 [3, side, side]: the longer side is made ``side``, the rest is black (HPSv2).

    HPSv2 makes a tensor first and resizes that, bicubic, so values may leave 0..1. It is antialiased, as torchvision
    has done by default since 0.17; what the authors published in 2023 was made without, which matters in the third
    digit of a score.
    """
    pixels = unit(image)
    height, width = pixels.shape[1:]
    scale = side / max(height, width)
    if scale != 1:
        size = round(height * scale), round(width * scale)
        pixels = interpolate(pixels[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0]
    return normalised(_padded(pixels, side))


def _padded(pixels_CHW: torch.Tensor, side: int) -> torch.Tensor:
    down, across = side - pixels_CHW.shape[1], side - pixels_CHW.shape[2]
    return pad(pixels_CHW, (across // 2, across - across // 2, down // 2, down - down // 2))


def centre_squares(images: Sequence[Image.Image], side: int = 224) -> torch.Tensor:
    """Return ``centre_square`` of all, float32 [N, 3, side, side]."""
    return torch.stack([centre_square(image, side) for image in images])


def wholes_in_squares(images: Sequence[Image.Image], side: int = 224) -> torch.Tensor:
    """Return ``whole_in_square`` of all, float32 [N, 3, side, side]."""
    return torch.stack([whole_in_square(image, side) for image in images])
