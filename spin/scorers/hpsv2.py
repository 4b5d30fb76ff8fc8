"""HPSv2: the cosine of an OpenCLIP ViT-H-14 trained on people's rankings, about 0.27; v2.0 and v2.1 are two models.

Source: Wu et al. 2023; their code multiplies by 100 only in its benchmark, and its defaults are v2.0 for single images
and v2.1 for the benchmark. No logit scale takes part.

``open_clip`` is not used: it imports torchvision, whose wheels on PyPI are built for CUDA alone and refuse to load
beside a CPU build of torch. Its ViT-H-14 is the same network as transformers' CLIPModel but for the names of the
weights (``spin.scorers.convert``), and the tests hold both to numbers that open_clip 3.3 gave.
"""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from spin.errors import SpinError
from spin.models import worded
from spin.scorers import Setting
from spin.scorers.clip import Towers
from spin.scorers.pixels import wholes_in_squares
from spin.weights import network, read


def config_of(
    *,
    text_width: int,
    text_layers: int,
    text_heads: int,
    width: int,
    layers: int,
    heads: int,
    patch: int,
    embed: int,
    side: int = 224,
    vocabulary: int = 49408,
    context: int = 77,
) -> CLIPConfig:
    """Return an OpenCLIP ViT's configuration: exact GELU, both blocks four times as wide inside."""
    text = {
        "hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers,
        "num_attention_heads": text_heads, "hidden_act": "gelu", "projection_dim": embed, "vocab_size": vocabulary,
        "max_position_embeddings": context, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "hidden_act": "gelu", "projection_dim": embed, "patch_size": patch,
        "image_size": side,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed)


def vit_h_14_config() -> CLIPConfig:
    """Return the configuration of OpenCLIP's ViT-H-14, of which HPSv2 and PickScore are made; 986 M parameters."""
    return config_of(
        text_width=1024, text_layers=24, text_heads=16, width=1280, layers=32, heads=16, patch=14, embed=1024
    )


def vit_h_14(folder: Path, pixels: Callable[[list[Image.Image]], torch.Tensor], setting: Setting) -> Towers:
    """Return the ViT-H-14 in ``folder``.

    Raises:
        SpinError: the weights are damaged or of another network, or there is no tokenizer.
    """
    model = network(CLIPModel, vit_h_14_config(), read(folder), f"a CLIP ViT-H-14 in {folder}")
    try:
        tokenizer = worded(CLIPTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise SpinError(
            f"expected CLIP's tokenizer beside the weights, got none in {folder} ({type(error).__name__}); convert "
            "the weights again, or copy tokenizer.json there"
        ) from None
    return Towers(model, tokenizer, pixels, setting.device, setting.dtype)


def cleaned(prompt: str) -> str:
    """Return ``prompt`` as open_clip's tokenizer reads it: mended, with plain quotation marks and without entities."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt)))


class Hps:
    """Cosine of image and prompt."""

    def __init__(self, name: str, clip: Towers):
        self.name, self.clip = name, clip

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return self.clip.cosines(images, [cleaned(prompt) for prompt in prompts])


def _load(name: str, setting: Setting) -> Hps:
    return Hps(name, vit_h_14(setting.weights.folder(name), wholes_in_squares, setting))


def load_v2_0(setting: Setting) -> Hps:
    """Return HPSv2 with the weights of v2.0, the version of the SPIN-Diffusion paper's tables."""
    return _load("hpsv2_0", setting)


def load_v2_1(setting: Setting) -> Hps:
    """Return HPSv2 with the weights of v2.1, whose numbers cannot be compared with v2.0's."""
    return _load("hpsv2_1", setting)
