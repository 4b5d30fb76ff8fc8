"""Tiny random models in the real formats, and tiny images: milliseconds per step on one core."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from spin.data.dataset import Latents

RESOLUTION = 32
LATENTS = (4, 8, 8)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"


def tokenizer() -> CLIPTokenizer:
    """One token per letter."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=12)


def text_config() -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def base(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a Stable-Diffusion-format pipeline of about 100,000 parameters: 32 px, latents 4x8x8."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, sample_size=32, mid_block_add_attention=False,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text_config()), tokenizer=tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def judge(folder: Path) -> Path:
    """Write a random CLIPModel for 32 px images."""
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    config = CLIPConfig(text_config=text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False).save_pretrained(folder)
    return folder


def images(folder: Path, count: int = 24) -> Path:
    """Write an imagefolder: flat colours named in their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        Image.new("RGB", (40, 36), colour).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": f"colour {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def random_latents(count: int, seed: int) -> torch.Tensor:
    """Return ``count`` latents of the models of ``base``, exact in float16."""
    return torch.randn(count, *LATENTS, generator=torch.Generator().manual_seed(seed)).half().float()


def dataset(folder: Path, pairs: int = 24, held_out: int = 2) -> Path:
    """Write a prepared data set folder: random winners p000, p001, ... in two files, and ``held_out`` rows a split."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"p{i:03d}" for i in range(pairs)]
    rows = [{"id": id, "prompt": f"colour {i}", "split": "train"} for i, id in enumerate(ids)]
    shown = []
    for split in ("validation", "test"):
        for i in range(held_out):
            png = io.BytesIO()
            Image.new("RGB", (RESOLUTION, RESOLUTION), (40 * i, 80, 120)).save(png, "PNG")
            row = {"id": f"{split}-{i}", "prompt": f"{split} {i}", "split": split}
            rows.append(row)
            shown.append({**row, "image": png.getvalue()})
    latents, half = random_latents(pairs, seed=2), pairs // 2
    unseen = [row["id"] for row in rows if row["split"] == "validation"]
    Latents.write(folder / "latents-00002.safetensors", unseen, random_latents(held_out, seed=4))
    Latents.write(folder / "latents-00000.safetensors", ids[:half], latents[:half])
    Latents.write(folder / "latents-00001.safetensors", ids[half:], latents[half:])
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    pq.write_table(pa.Table.from_pylist(shown), folder / "held-out.parquet")
    return folder


def losers(path: Path, ids: Sequence[str]) -> Path:
    """Write random losers of the pairs ``ids``."""
    Latents.write(path, ids, random_latents(len(ids), seed=3))
    return path


def overrides(judge_folder: Path, **train: object) -> dict[str, object]:
    """Return overrides of the emoji-cpu preset for these models."""
    return {
        "data": {"resolution": RESOLUTION, "min_size": 16, "held_out_share": 0.3, "encode_batch": 8},
        "generate": {"num_inference_steps": 2, "batch_size": 4, "guidance_scale": 2},
        "train": {
            "steps": [3], "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 1,
            "stop_when_converged": False, **train,
        },
        "score": {
            "clip_model": str(judge_folder), "template": "{prompt}", "styles": [], "bootstrap": 50, "sheet_prompts": 3,
        },
    }  # fmt: skip
