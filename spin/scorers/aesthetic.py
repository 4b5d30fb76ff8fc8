"""LAION aesthetic score: how people rate pictures, 1 to 10, about 5 to 6.5 for drawings of a good model.

Source: Schuhmann 2022, ``sac+logos+ava1-l14-linearMSE``: OpenAI's CLIP ViT-L/14 image embedding, of unit length, and a
head that is affine in all. It is neither LAION's first, linear head nor v2.5. The prompt takes no part.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from spin.scorers import Setting
from spin.scorers.head import filled, head, value
from spin.scorers.pixels import centre_squares
from spin.weights import network, read_parts

BATCH = 64


def vit_l_14_config() -> CLIPVisionConfig:
    """Return the configuration of OpenAI's CLIP ViT-L/14, the image side."""
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        image_size=224, projection_dim=768, hidden_act="quick_gelu",
    )  # fmt: skip


class Aesthetic:
    """The head's number for the unit image embedding; the head computes in float32."""

    name = "aesthetic"

    def __init__(
        self,
        vision: CLIPVisionModelWithProjection,
        mlp: nn.ModuleDict,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.vision = vision.to(device, dtype).requires_grad_(False).eval()
        self.mlp = mlp.to(device).requires_grad_(False).eval()
        self.device, self.dtype = device, dtype

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:  # noqa: ARG002
        side, parts = self.vision.config.image_size, []
        for start in range(0, len(images), BATCH):
            pixels = centre_squares(images[start : start + BATCH], side).to(self.device, self.dtype)
            embedded = normalize(self.vision(pixel_values=pixels).image_embeds.float(), dim=-1)
            parts.append(value(self.mlp, embedded))
        return torch.cat(parts).cpu()


def load(setting: Setting) -> Aesthetic:
    """Return the aesthetic score with converted weights."""
    folder = setting.weights.folder(Aesthetic.name)
    parts, what = read_parts(folder), f"the aesthetic predictor in {folder}"
    vision = network(CLIPVisionModelWithProjection, vit_l_14_config(), parts["vision"], what)
    return Aesthetic(vision, filled(head(768), parts["head"], what), setting.device, setting.dtype)
