"""The models that are measured: the packaged emoji model, or SD-1.5 and SDXL in full size with random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spin import models
from spin.emoji import concepts
from spin.families import FAMILIES
from spin.models import Model

NOISE: dict[str, Any] = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """A model, and how its images are drawn and compared."""

    size: str
    model: Model
    resolution: int
    guidance: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        return self.model.latents_shape(self.resolution)

    def prompts(self, count: int) -> list[str]:
        """Return ``count`` prompts, the emojis' names."""
        names = [concept.prompt for concept in concepts("train")]
        return [names[i % len(names)] for i in range(count)]


def world(size: str, device: torch.device) -> World:
    """Return the world ``emoji`` (as it was trained), ``sd15`` or ``sdxl`` (random weights, no download)."""
    if size == "emoji":
        return World(size, models.load(models.find("emoji"), device), 64, 3.5)
    torch.manual_seed(0)
    with device:
        name, parts = {"sd15": _sd15, "sdxl": _sdxl}[size]()
    model = models.assemble(FAMILIES[name], {}, parts, NOISE, device)
    return World(size, model, 512 if size == "sd15" else 1024, 7.5)


def _tokenizer() -> CLIPTokenizer:
    """One token per letter: no vocabulary is at hand without a hub, and the work is the same."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-"
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def _text(words: CLIPTokenizer, width: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=activation, projection_dim=width, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def _autoencoder(scale: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512, scaling_factor=scale,
    )  # fmt: skip


def _sd15() -> tuple[str, dict[str, Any]]:
    words = _tokenizer()
    return "StableDiffusionPipeline", {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "vae": _autoencoder(0.18215),
        "text_encoder": CLIPTextModel(_text(words, 768, 12, 12, "quick_gelu")),
        "tokenizer": words,
    }


def _sdxl() -> tuple[str, dict[str, Any]]:
    words = _tokenizer()
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return "StableDiffusionXLPipeline", {
        "unet": unet,
        "vae": _autoencoder(0.13025),
        "text_encoder": CLIPTextModel(_text(words, 768, 12, 12, "quick_gelu")),
        "tokenizer": words,
        "text_encoder_2": CLIPTextModelWithProjection(_text(words, 1280, 32, 20, "gelu")),
        "tokenizer_2": words,
    }
