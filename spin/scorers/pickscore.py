"""PickScore: exp(logit scale) * cos of a CLIP ViT-H-14 trained on people's choices, about 20 to 22.

Source: Kirstain et al. 2023, Eq. 1. Code that leaves the scale out gives about 0.21.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from spin.scorers import Setting
from spin.scorers.clip import Towers, processed
from spin.scorers.hpsv2 import vit_h_14
from spin.weights import Part

TOKENIZER = Part(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
)
PARTS = (
    Part("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", ("model.safetensors",)),
    TOKENIZER,
)


class PickScore:
    """exp(logit scale) * cosine of image and prompt."""

    name = "pickscore"

    def __init__(self, clip: Towers):
        self.clip = clip

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return self.clip.scale * self.clip.cosines(images, prompts)


def load(setting: Setting) -> PickScore:
    """Return PickScore with the authors' weights."""
    folder = setting.weights.folder(PickScore.name, PARTS)
    # The default is the one that the authors' processor says.
    return PickScore(vit_h_14(folder, processed(CLIPImageProcessorPil()), setting))
