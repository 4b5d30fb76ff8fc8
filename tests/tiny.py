"""Tiny random models in the real formats, and tiny images: milliseconds per step on one core."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageOps
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from spin.data.dataset import Latents

RESOLUTION = 32
LATENTS = (4, 8, 8)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"


FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "sd3-t5")
"""What ``base`` can write: SD-1.x, SD-2 (v prediction), SDXL, SD3 without and with its third text encoder."""


def tokenizer() -> CLIPTokenizer:
    """One token per letter."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=12)


def t5_tokenizer() -> T5Tokenizer:
    """One token per letter."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def bert_tokenizer(folder: Path) -> BertTokenizer:
    """Write the vocabulary of a BERT with the words w0 to w99, which are tokens 5 to 104."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(100))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return BertTokenizer.from_pretrained(folder)


def text_config() -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def latents_shape(family: str = "sd1") -> tuple[int, int, int]:
    """Return (C, H, W) of a family's latents at 32 px."""
    return (16, 8, 8) if family.startswith("sd3") else LATENTS


def _autoencoder(channels: int, **options: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=channels, sample_size=32,
        mid_block_add_attention=False, **options,
    )  # fmt: skip


def _unet(text_width: int, **options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width, attention_head_dim=2, norm_num_groups=4, **options,
    )  # fmt: skip


def _noise_schedule(prediction_type: str) -> dict[str, object]:
    return {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "prediction_type": prediction_type,
    }  # fmt: skip


def base(folder: Path, family: str = "sd1", **options: object) -> Path:
    """Write a pipeline of about 100,000 parameters, as the stock class saves it: 32 px, latents a quarter of that.

    ``options`` are the pipeline's own.
    """
    torch.manual_seed(0)
    {"sd1": _sd, "sd2": _sd, "sdxl": _sdxl, "sd3": _sd3, "sd3-t5": _sd3}[family](family, **options).save_pretrained(
        folder
    )
    return folder


def _sd(family: str, **options: object) -> StableDiffusionPipeline:
    unet, vae = _unet(16), _autoencoder(4)
    scheduler = DPMSolverMultistepScheduler(**_noise_schedule("v_prediction" if family == "sd2" else "epsilon"))
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text_config()), tokenizer=tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False, **options,
    )  # fmt: skip


def _sdxl(_: str, **options: object) -> StableDiffusionXLPipeline:
    # Its denoiser hears the last hidden states but one of both encoders side by side, the second one's pooled text and
    # six numbers of 8 values each.
    unet = _unet(
        32, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 48
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(4, scaling_factor=0.13025), unet=unet, tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        text_encoder=CLIPTextModel(text_config()), text_encoder_2=CLIPTextModelWithProjection(text_config()),
        scheduler=EulerDiscreteScheduler(**_noise_schedule("epsilon")), add_watermarker=False, **options,
    )  # fmt: skip


def _sd3(family: str, **options: object) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=16,
        pos_embed_max_size=12, qk_norm="rms_norm",
    )  # fmt: skip
    vae = _autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    third: dict[str, object] = {"text_encoder_3": None, "tokenizer_3": None}
    if family == "sd3-t5":
        words = t5_tokenizer()
        config = T5Config(
            vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
            pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id,
        )  # fmt: skip
        third = {"text_encoder_3": T5EncoderModel(config), "tokenizer_3": words}
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), text_encoder=CLIPTextModelWithProjection(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config()), **third, **options,
    )  # fmt: skip


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


def pairs(folder: Path, count: int = 24) -> Path:
    """Write an imagefolder with a loser beside each winner: its negative."""
    images(folder, count)
    (folder / "worse").mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["loser"] = f"worse/{row['file_name']}"
        ImageOps.invert(Image.open(folder / row["file_name"])).save(folder / row["loser"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def random_latents(count: int, seed: int, family: str = "sd1") -> torch.Tensor:
    """Return ``count`` latents of a family's model, exact in float16."""
    return torch.randn(count, *latents_shape(family), generator=torch.Generator().manual_seed(seed)).half().float()


def dataset(folder: Path, pairs: int = 24, held_out: int = 2, family: str = "sd1") -> Path:
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
    latents, half = random_latents(pairs, seed=2, family=family), pairs // 2
    unseen = [row["id"] for row in rows if row["split"] == "validation"]
    Latents.write(folder / "latents-00002.safetensors", unseen, random_latents(held_out, seed=4, family=family))
    Latents.write(folder / "latents-00000.safetensors", ids[:half], latents[:half])
    Latents.write(folder / "latents-00001.safetensors", ids[half:], latents[half:])
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    pq.write_table(pa.Table.from_pylist(shown), folder / "held-out.parquet")
    return folder


def losers(path: Path, ids: Sequence[str], family: str = "sd1") -> Path:
    """Write random losers of the pairs ``ids``."""
    Latents.write(path, ids, random_latents(len(ids), seed=3, family=family))
    return path


def overrides(judge_folder: Path, **train: object) -> dict[str, object]:
    """Return overrides of the emoji-cpu preset for these models."""
    return {
        "data": {"resolution": RESOLUTION, "min_size": 16, "held_out_share": 0.3, "encode_batch": 8},
        "generate": {"num_inference_steps": 2, "batch_size": 4, "guidance_scale": 2, "roundtrip": False},
        "train": {
            "steps": [3], "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 1,
            "stop_when_converged": False, "loser_gradient_scale": 1, **train,
        },
        "score": {
            "clip_model": str(judge_folder), "template": "{prompt}", "styles": [], "bootstrap": 50, "sheet_prompts": 3,
        },
    }  # fmt: skip
