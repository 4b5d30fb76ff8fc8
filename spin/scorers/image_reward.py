"""ImageReward: what a BLIP that looks at image and prompt together makes of them; about 0, deviation about 1.

Source: Xu et al. 2023, and the authors' ``ImageReward.py``: BLIP-large's ViT, its BERT with cross-attention to the
image, the first token's last state, five linear layers, and the mean and deviation of their data taken out. The prompt
is cut at 35 tokens, as there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from spin.errors import SpinError
from spin.models import worded
from spin.scorers import Setting
from spin.scorers.head import filled, head, value
from spin.scorers.pixels import centre_squares
from spin.weights import network, read_parts

BATCH = 64
TOKENS = 35
"""Of the prompt, with BERT's first and last one."""
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072


def vision_config(**sizes: int) -> BlipVisionConfig:
    """Return the configuration of BLIP's ViT, the large one; ``sizes`` make it smaller."""
    large = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 16, "image_size": 224,
    }  # fmt: skip
    # BLIP's own code has 1e-6 here, transformers' default is another.
    return BlipVisionConfig(**large | sizes, hidden_act="gelu", layer_norm_eps=1e-6)


def text_config(**sizes: int) -> BlipTextConfig:
    """Return the configuration of BLIP's BERT: base, with two further words; ``sizes`` make it smaller."""
    base = {
        "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512, "encoder_hidden_size": 1024,
    }  # fmt: skip
    # Cross-attention is built only where it says that it is a decoder; it is called as an encoder all the same.
    return BlipTextConfig(
        **base | sizes, hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True, bos_token_id=None, sep_token_id=None
    )


class ImageReward:
    """(head(BLIP(image, prompt)) - mean) / deviation; the head computes in float32."""

    name = "image_reward"

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        mlp: nn.ModuleDict,
        tokenizer: Any,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.vision = vision.to(device, dtype).requires_grad_(False).eval()
        self.text = text.to(device, dtype).requires_grad_(False).eval()
        self.mlp = mlp.to(device).requires_grad_(False).eval()
        self.tokenizer, self.device, self.dtype = tokenizer, device, dtype

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        side, parts = self.vision.config.image_size, []
        for start in range(0, len(images), BATCH):
            pixels = centre_squares(images[start : start + BATCH], side).to(self.device, self.dtype)
            words = self.tokenizer(
                list(prompts[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            ).to(self.device)
            seen = self.vision(pixel_values=pixels).last_hidden_state
            heard = self.text(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
                is_decoder=False,
            ).last_hidden_state[:, 0]
            parts.append((value(self.mlp, heard.float()) - MEAN) / DEVIATION)
        return torch.cat(parts).cpu()


def load(setting: Setting) -> ImageReward:
    """Return ImageReward with converted weights."""
    folder = setting.weights.folder(ImageReward.name)
    parts, what = read_parts(folder), f"ImageReward in {folder}"
    try:
        tokenizer = worded(BertTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise SpinError(
            f"expected BERT's tokenizer beside the weights, got none in {folder} ({type(error).__name__}); convert the "
            "weights again"
        ) from None
    return ImageReward(
        network(BlipVisionModel, vision_config(), parts["vision"], what),
        network(BlipTextModel, text_config(), parts["text"], what, add_pooling_layer=False),
        filled(head(768), parts["head"], what),
        tokenizer,
        setting.device,
        setting.dtype,
    )
