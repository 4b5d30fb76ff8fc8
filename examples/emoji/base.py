"""Train the base (text encoder + UNet) and export it: ``python -m examples.emoji.base --minutes 50``.

Needs the autoencoder. The recipe: v prediction (a network that predicts the noise never learnt what the first, noisiest
steps decide: its images were further off there than the mean of all images is), a linear schedule; the pooled text
modulates every ResNet block (``addition_embed_type="text"``), so a stock ``UNet2DConditionModel`` runs in a stock
``StableDiffusionPipeline``.
Each prompt is asked for without a style (any style may answer), with its style by name, or left empty.

Against reciting: every drawing is seen in several versions (shifted, turned, scaled, recoloured a little), a quarter
of the batches' drawings are of concepts outside the world's 472, and the 400 held-out drawings are never seen.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from examples.emoji.autoencoder import FOLDER as AUTOENCODER
from examples.emoji.autoencoder import LATENTS, tensor
from examples.emoji.loop import BATCHES, DEVICE, TimedTraining, autocast, compiled, placed
from examples.emoji.text import new_text_encoder, new_tokenizer, style_prompt, token_ids
from examples.emoji.world import BUILD, STYLES, build, run

FOLDER = BUILD / "base"
VERSIONS = 8
"""Versions of each drawing of the world (the first is the drawing itself); others have half as many."""
OTHERS = 0.25
"""Share of the drawings outside the world's concepts."""
SHEET = ("red apple", "owl", "bicycle", "pizza", "rocket", "guitar", "penguin", "cactus", "sailboat", "butterfly")


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENTS[1],
        in_channels=LATENTS[0],
        out_channels=LATENTS[0],
        block_out_channels=(64, 128, 208),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def varied(x: torch.Tensor) -> torch.Tensor:
    """Turn by up to 6 degrees, scale by 0.9 to 1.1, shift by up to 3 pixels; hue, saturation, brightness a little."""
    n = len(x)
    angle, scale = (torch.rand(n) - 0.5) * 0.2, 0.9 + 0.2 * torch.rand(n)
    dx, dy = (torch.rand(2, n) - 0.5) * 0.19
    c, d = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([c, -d, dx, d, c, dy], 1)
    grid = F.affine_grid(theta.view(n, 2, 3), list(x.shape), align_corners=False).to(x.device)
    x = F.grid_sample(x - 1, grid, mode="bicubic", align_corners=False) + 1
    white = (x.amin(1, keepdim=True) > 0.98).float()
    grey = x.mean(1, keepdim=True)
    y = grey + (0.8 + 0.4 * torch.rand(n, 1, 1, 1, device=x.device)) * (x - grey)
    y = y + 0.1 * (torch.rand(n, 3, 1, 1, device=x.device) - 0.5)
    return (white * x + (1 - white) * y).clamp(-1, 1)


def new_scheduler() -> DPMSolverMultistepScheduler:
    # Not Stable Diffusion's schedule: that keeps 0.5 % of the signal at its end, and the mean over 256 places of the
    # latents shows through. Trained so, the noise decided on the shape and the prompt on the colours alone.
    return DPMSolverMultistepScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        steps_offset=1,
        prediction_type="v_prediction",
    )


def pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
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


def sheet(pipe: StableDiffusionPipeline, path: Path) -> None:
    """Draw fixed prompts at fixed seeds: one row without style, then one row per style."""
    pipe.set_progress_bar_config(disable=True)
    prompts = [*SHEET] + [style_prompt(p, s) for s in STYLES for p in SHEET]
    noise = [torch.Generator().manual_seed(i % len(SHEET)) for i in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=20, guidance_scale=3.5, generator=noise).images
    canvas = Image.new("RGB", (64 * len(SHEET), 64 * (len(STYLES) + 1)), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (64 * (i % len(SHEET)), 64 * (i // len(SHEET))))
    canvas.save(path)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor, versions: int) -> torch.Tensor:
    """Return float16 [versions, N, C, H, W], the first version of the drawings as they are."""

    def latents(version: int) -> torch.Tensor:
        parts = (part if version == 0 else varied(part) for part in pixels.split(128))
        return torch.cat([vae.encode(part).latent_dist.mean.half() for part in parts])

    return torch.stack([latents(version) for version in range(versions)])


def main(
    minutes: Annotated[float, typer.Option(help="training time")] = 50,
    batch: Annotated[int, typer.Option(help="images per step")] = 64 * BATCHES,
    lr: float = 1e-3,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, rows = build()
    vae = AutoencoderKL.from_pretrained(AUTOENCODER / "export").to(DEVICE).requires_grad_(False)
    tokenizer = new_tokenizer(rows)
    empty = token_ids(tokenizer, [""]).to(DEVICE)

    def pool(player: bool, versions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents [versions, N, C, H, W], and token ids [N, L] of the prompts without and with their style."""
        seen = [i for i, row in enumerate(rows) if row.style in STYLES and row.player == player and not row.held_out]
        plain = token_ids(tokenizer, [rows[i].prompt for i in seen])
        styled = token_ids(tokenizer, [style_prompt(rows[i].prompt, rows[i].style) for i in seen])
        print(f"{len(seen)} drawings in {versions} versions", flush=True)
        return encode(vae, tensor(images[seen]), versions), plain.to(DEVICE), styled.to(DEVICE)

    pools = {False: pool(True, VERSIONS), True: pool(False, VERSIONS // 2)}
    text, unet = new_text_encoder(tokenizer).to(DEVICE), placed(new_unet())
    if DEVICE.type == "cpu":  # fused attention's backward is very slow there at these tiny shapes
        unet.set_attn_processor(AttnProcessor())
    player = nn.ModuleDict({"text": text, "unet": unet})
    training = TimedTraining(player, FOLDER, minutes, lr=lr, ema=0.999, flat=0.3)
    alphas = new_scheduler().alphas_cumprod.to(DEVICE)
    snr = alphas / (1 - alphas)
    # Nearly clean timesteps count less, as in min-SNR 5; noisy ones less too, for much of their error nothing can mend.
    weight = snr.clamp(max=1) ** 0.25 * (5 / snr).clamp(max=1)

    @compiled
    def error(x: torch.Tensor, ids: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(x)
        a = alphas[t].view(-1, 1, 1, 1)
        with autocast():
            embeds = text(ids).last_hidden_state
            out = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, embeds).sample
        velocity = a.sqrt() * noise - (1 - a).sqrt() * x
        return (weight[t] * (out.float() - velocity).pow(2).mean((1, 2, 3))).mean()

    def draw(others: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        latents, plain, styled = pools[others]
        i, version = (torch.randint(latents.shape[axis], (count,), device=DEVICE) for axis in (1, 0))
        kind = torch.rand(count, 1, device=DEVICE)
        ids = torch.where(kind < 0.45, plain[i], torch.where(kind < 0.92, styled[i], empty))
        return latents[version, i].float(), ids

    def loss() -> torch.Tensor:
        few = round(batch * OTHERS)
        (x, ids), (y, more) = draw(False, batch - few), draw(True, few)
        # Both parts get timesteps from the whole range.
        t = torch.randperm(batch, device=DEVICE) + torch.rand(batch, device=DEVICE)
        t = (t / batch * len(alphas)).long().clamp(max=len(alphas) - 1)  # a sum may have been rounded up
        x = torch.cat([x, y]).contiguous(memory_format=torch.channels_last)
        return error(x, torch.cat([ids, more]), t)

    def export(name: str) -> StableDiffusionPipeline:
        average = training.average
        pipe = pipeline(vae, average["text"], tokenizer, average["unet"])
        pipe.save_pretrained(FOLDER / name)
        return pipe

    print(f"{sum(p.numel() for p in player.parameters()) / 1e6:.2f} M parameters", flush=True)
    for step in training.run(loss):
        if step % 1000 == 0:
            sheet(export("export"), FOLDER / f"sheet-{step:05d}.png")
    sheet(export("export"), FOLDER / "sheet.png")


if __name__ == "__main__":
    run(main)
