"""Train the base (text encoder + UNet) and export it: ``python -m examples.emoji.base --minutes 50``.

Needs the autoencoder. The recipe: epsilon prediction, min-SNR 5, the pooled text modulates every ResNet block
(``addition_embed_type="text"``), so a stock ``UNet2DConditionModel`` runs in a stock ``StableDiffusionPipeline``.
Each prompt is asked for without a style (any style may answer), with its style by name, or left empty. Every
image is seen under several small shifts, against reciting.
"""

from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import nn
from torch.nn import functional as F

from examples.emoji.autoencoder import FOLDER as AUTOENCODER
from examples.emoji.autoencoder import tensor
from examples.emoji.loop import TimedTraining
from examples.emoji.text import new_text_encoder, new_tokenizer, style_prompt, token_ids
from examples.emoji.world import BUILD, STYLES, build

FOLDER = BUILD / "base"
SHIFTS = ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2), (1, 1), (-1, -1))
SHEET = ("red apple", "owl", "bicycle", "pizza", "rocket", "guitar", "penguin", "cactus", "sailboat", "butterfly")


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=6,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
        steps_offset=1,
    )


def pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def sheet(pipe: StableDiffusionPipeline, path) -> None:
    """Draw fixed prompts at fixed seeds: one row without style, then one row per style."""
    pipe.set_progress_bar_config(disable=True)
    prompts = [*SHEET] + [style_prompt(p, s) for s in STYLES for p in SHEET]
    noise = [torch.Generator().manual_seed(i % len(SHEET)) for i in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=20, guidance_scale=3.5, generator=noise).images
    canvas = Image.new("RGB", (64 * len(SHEET), 64 * (len(STYLES) + 1)), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (64 * (i % len(SHEET)), 64 * (i // len(SHEET))))
    canvas.save(path)


def main(
    minutes: Annotated[float, typer.Option(help="training time")] = 50,
    batch: int = 64,
    lr: float = 1e-3,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, rows = build()
    seen = [i for i, row in enumerate(rows) if row.player and not row.held_out]
    vae = AutoencoderKL.from_pretrained(AUTOENCODER / "export").requires_grad_(False)
    pixels = tensor(images[seen])
    with torch.no_grad():
        padded = F.pad(pixels, (2, 2, 2, 2), value=1.0)
        latents = torch.stack(
            [
                torch.cat(
                    [vae.encode(b).latent_dist.mean for b in padded[..., 2 + y : 66 + y, 2 + x : 66 + x].split(128)]
                )
                for x, y in SHIFTS
            ]
        )
    tokenizer = new_tokenizer(rows)
    plain = token_ids(tokenizer, [rows[i].prompt for i in seen])
    styled = token_ids(tokenizer, [style_prompt(rows[i].prompt, rows[i].style) for i in seen])
    empty = token_ids(tokenizer, [""])
    player = nn.ModuleDict({"text": new_text_encoder(tokenizer), "unet": new_unet()})
    player["unet"].to(memory_format=torch.channels_last)
    # Flash attention's backward is very slow on the CPU at these tiny shapes.
    player["unet"].set_attn_processor(AttnProcessor())
    training = TimedTraining(player, FOLDER, minutes, lr=lr, ema=0.999, flat=0.3)
    alphas = new_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5) / snr

    def loss() -> torch.Tensor:
        i = torch.randint(len(seen), (batch,))
        kind = torch.rand(batch, 1)
        ids = torch.where(kind < 0.45, plain[i], torch.where(kind < 0.92, styled[i], empty))
        x = latents[torch.randint(len(SHIFTS), (batch,)), i].contiguous(memory_format=torch.channels_last)
        t = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long()
        noise = torch.randn_like(x)
        a = alphas[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            embeds = player["text"](ids).last_hidden_state
            out = player["unet"](a.sqrt() * x + (1 - a).sqrt() * noise, t, embeds).sample
        return (weight[t] * (out.float() - noise).pow(2).mean((1, 2, 3))).mean()

    def export(name: str) -> StableDiffusionPipeline:
        average = training.average
        pipe = pipeline(vae, average["text"], tokenizer, average["unet"])
        pipe.save_pretrained(FOLDER / name)
        return pipe

    print(f"{len(seen)} images, {sum(p.numel() for p in player.parameters()) / 1e6:.2f} M parameters", flush=True)
    for step in training.run(loss):
        if step % 1000 == 0:
            sheet(export("export"), FOLDER / f"sheet-{step:05d}.png")
    sheet(export("export"), FOLDER / "sheet.png")


if __name__ == "__main__":
    typer.run(main)
