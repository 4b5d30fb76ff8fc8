"""What the published scorers are held to: their forward passes written out, small weights and images by formula.

Nothing here is drawn at random, so the numbers in ``tests/golden/scorers.json`` stay what they are on any version of
torch. ``tests/golden/scorers.py`` made them with the authors' own packages.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import conv2d, gelu, layer_norm, linear, normalize

Tensors = dict[str, torch.Tensor]
MADE = Path(__file__).parent / "golden" / "scorers.json"
GOLDEN = json.loads(MADE.read_text()) if MADE.is_file() else {}
"""What the authors' packages make of the weights, pictures and prompts below."""

OPEN_CLIP = {
    "embed_dim": 16,
    "vision": {"image_size": 28, "layers": 2, "width": 20, "head_width": 10, "patch_size": 14},
    "text": {"context_length": 12, "vocab_size": 82, "width": 24, "heads": 3, "layers": 2},
}
BLIP = {"side": 32, "patch": 16, "vision": 24, "vision_heads": 3, "text": 16, "text_heads": 2, "layers": 2, "words": 60}
"""Sizes of the small BLIP; the text has as many layers as the image."""


def waves(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return a tensor for each name: waves whose phase belongs to the name, around 1 for the weights of norms."""
    found = {}
    for name, shape in shapes.items():
        count, phase = math.prod(shape), zlib.crc32(name.encode()) % 1000
        # Matrices keep the size of what goes through them, so that no layer drowns the others.
        size = 1.4 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        values = size * np.sin(0.7 * np.arange(count) ** 1.1 + phase)
        if any(part.startswith(("ln_", "norm", "LayerNorm")) for part in name.split(".")) and name.endswith("weight"):
            values += 1
        found[name] = torch.from_numpy(values).float().reshape(shape)
    return found


def picture(width: int, height: int, number: int = 0) -> Image.Image:
    """Return an RGB picture with edges and slopes."""
    y, x = np.mgrid[:height, :width]
    slope = 127.5 + 127.5 * np.sin((x * (4 + number) + y * 4) / 19 + number)
    edges = 255 * ((x // 7 + y // (5 + number)) % 2)
    return Image.fromarray(np.stack([slope, edges, (slope + edges) / 2], axis=-1).astype(np.uint8))


PICTURES = [(40, 40), (50, 30), (28, 45)]
"""Sizes of the pictures that golden scores are of."""
TOKENS = [[80, 5, 9, 33, 81, 0, 0, 0, 0, 0, 0, 0], [80, 61, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0], [80, *range(3, 13), 81]]
"""Three prompts as open_clip's tokens: first word, text, last word, zeros."""
WORDS = [[2, 7, 8, 9, 3, 0, 0], [2, 50, 3, 0, 0, 0, 0], [2, 11, 12, 13, 14, 15, 3]]
"""Three prompts as BERT's tokens, 0 being what is masked."""


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """Return softmax(q k / sqrt(d)) v, head by head; ``hidden`` [T, S] is True where a key must not be looked at."""
    parts = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        fit = q @ k.T / math.sqrt(q.shape[-1])
        if hidden is not None:
            fit = fit.masked_fill(hidden, float("-inf"))
        parts.append(fit.softmax(-1) @ v)
    return torch.cat(parts, -1)


def _norm(x: torch.Tensor, w: Tensors, name: str, eps: float) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _block(x: torch.Tensor, w: Tensors, name: str, heads: int, hidden: torch.Tensor | None) -> torch.Tensor:
    """One residual block of open_clip, norms first."""
    inside = linear(_norm(x, w, f"{name}.ln_1", 1e-5), w[f"{name}.attn.in_proj_weight"], w[f"{name}.attn.in_proj_bias"])
    seen = _attention(*inside.chunk(3, -1), heads, hidden)
    x = x + linear(seen, w[f"{name}.attn.out_proj.weight"], w[f"{name}.attn.out_proj.bias"])
    inside = linear(_norm(x, w, f"{name}.ln_2", 1e-5), w[f"{name}.mlp.c_fc.weight"], w[f"{name}.mlp.c_fc.bias"])
    return x + linear(gelu(inside), w[f"{name}.mlp.c_proj.weight"], w[f"{name}.mlp.c_proj.bias"])


def open_clip_cosine(w: Tensors, pixels_CHW: torch.Tensor, tokens: list[int]) -> float:
    """Return the cosine that open_clip's ViT of the sizes ``OPEN_CLIP`` gives one image and one text."""
    sizes = OPEN_CLIP["vision"]
    patches = conv2d(pixels_CHW[None], w["visual.conv1.weight"], stride=sizes["patch_size"])[0].flatten(1).T
    x = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
    x = _norm(x, w, "visual.ln_pre", 1e-5)
    for layer in range(sizes["layers"]):
        x = _block(x, w, f"visual.transformer.resblocks.{layer}", sizes["width"] // sizes["head_width"], None)
    image = _norm(x[0], w, "visual.ln_post", 1e-5) @ w["visual.proj"]
    sizes = OPEN_CLIP["text"]
    ahead = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    for layer in range(sizes["layers"]):
        x = _block(x, w, f"transformer.resblocks.{layer}", sizes["heads"], ahead)
    text = _norm(x, w, "ln_final", 1e-5)[tokens.index(max(tokens))] @ w["text_projection"]
    return float(normalize(image, dim=0) @ normalize(text, dim=0))


def image_reward(w: Tensors, pixels_CHW: torch.Tensor, words: list[int]) -> float:
    """Return ImageReward's number by the sizes ``BLIP``: its ViT, its BERT with cross-attention, its head."""
    x = conv2d(
        pixels_CHW[None],
        w["blip.visual_encoder.patch_embed.proj.weight"],
        w["blip.visual_encoder.patch_embed.proj.bias"],
        stride=BLIP["patch"],
    )
    x = torch.cat([w["blip.visual_encoder.cls_token"][0], x[0].flatten(1).T]) + w["blip.visual_encoder.pos_embed"][0]
    for layer in range(BLIP["layers"]):
        at = f"blip.visual_encoder.blocks.{layer}"
        inside = linear(_norm(x, w, f"{at}.norm1", 1e-6), w[f"{at}.attn.qkv.weight"], w[f"{at}.attn.qkv.bias"])
        seen = _attention(*inside.chunk(3, -1), BLIP["vision_heads"])
        x = x + linear(seen, w[f"{at}.attn.proj.weight"], w[f"{at}.attn.proj.bias"])
        inside = gelu(linear(_norm(x, w, f"{at}.norm2", 1e-6), w[f"{at}.mlp.fc1.weight"], w[f"{at}.mlp.fc1.bias"]))
        x = x + linear(inside, w[f"{at}.mlp.fc2.weight"], w[f"{at}.mlp.fc2.bias"])
    image = _norm(x, w, "blip.visual_encoder.norm", 1e-6)
    at = "blip.text_encoder.embeddings"
    x = w[f"{at}.word_embeddings.weight"][words] + w[f"{at}.position_embeddings.weight"][: len(words)]
    x = _norm(x, w, f"{at}.LayerNorm", 1e-12)
    masked = (torch.tensor(words) == 0).expand(len(words), -1)

    def attended(x: torch.Tensor, other: torch.Tensor, at: str, hidden: torch.Tensor | None) -> torch.Tensor:
        query = linear(x, w[f"{at}.self.query.weight"], w[f"{at}.self.query.bias"])
        key, value = (linear(other, w[f"{at}.self.{n}.weight"], w[f"{at}.self.{n}.bias"]) for n in ("key", "value"))
        seen = _attention(query, key, value, BLIP["text_heads"], hidden)
        seen = linear(seen, w[f"{at}.output.dense.weight"], w[f"{at}.output.dense.bias"])
        return _norm(seen + x, w, f"{at}.output.LayerNorm", 1e-12)

    for layer in range(BLIP["layers"]):
        at = f"blip.text_encoder.encoder.layer.{layer}"
        x = attended(x, x, f"{at}.attention", masked)
        x = attended(x, image, f"{at}.crossattention", None)
        inside = gelu(linear(x, w[f"{at}.intermediate.dense.weight"], w[f"{at}.intermediate.dense.bias"]))
        inside = linear(inside, w[f"{at}.output.dense.weight"], w[f"{at}.output.dense.bias"])
        x = _norm(inside + x, w, f"{at}.output.LayerNorm", 1e-12)
    found = x[0]
    for layer in (0, 2, 4, 6, 7):
        found = linear(found, w[f"mlp.layers.{layer}.weight"], w[f"mlp.layers.{layer}.bias"])
    return (float(found) - 0.16717362830052426) / 1.0333394966054072
