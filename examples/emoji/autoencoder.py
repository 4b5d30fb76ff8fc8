"""Train the 64x64 autoencoder: ``python -m examples.emoji.autoencoder --minutes 35``.

f4, 16x16 latents of 8 channels, trained on every drawing of the world that is not held out. Measured on one CPU
core in 4 minutes each, PSNR on held-out drawings: f8 with 32 channels 18.1 dB, f4 with 8 channels 20.7 dB (batch 32),
23.7 dB (batch 12: more steps). Latents are standardised per channel inside ``quant_conv``/``post_quant_conv``, so the
result is a plain ``AutoencoderKL`` with ``scaling_factor`` 1.
"""

from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch.nn import functional as F

from examples.emoji.loop import BATCHES, DEVICE, TimedTraining, autocast, compiled, placed
from examples.emoji.world import BUILD, STYLES, Picture, build, run

FOLDER = BUILD / "autoencoder"
LATENTS = (8, 16, 16)


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENTS[0],
        norm_num_groups=2,  # GroupNorm's backward is slow on the CPU with few channels per group
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], channels last, on the device."""
    pixels = torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2)
    return pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def augment(x: torch.Tensor) -> torch.Tensor:
    """Mirror half of the batches, permute their colour channels now and then, shift by up to 4 pixels."""
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    if torch.rand(()) < 0.25:
        x = x[:, torch.randperm(3).to(x.device)]
    dx, dy = torch.randint(-4, 5, (2,)).tolist()
    x = F.pad(x, (4, 4, 4, 4), value=1.0)[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]
    # Always the same strides: for others the loss would be compiled anew.
    return x.contiguous(memory_format=torch.channels_last)


def distance(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The PSNR itself (a mean of logarithms, so that every drawing counts alike), and sharp edges beside it."""
    out = out.float()
    psnr = ((out - x).pow(2).mean((1, 2, 3)) + 1e-4).log().mean()
    gradient = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(x), strict=True))
    return 0.1 * psnr + 0.5 * F.l1_loss(out, x) + 0.25 * gradient


def standardise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold each latent channel's mean and standard deviation into the convolutions around the latents."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(b).latent_dist.mean for b in images.split(128)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        c = latents.shape[1]
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
        vae.quant_conv.weight[:c] /= std[:, None, None, None]
        vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
        vae.quant_conv.bias[c:] -= 2 * std.log()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """decode(mean of encode), float32 [N, 3, 64, 64] in [-1, 1]"""
    return torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in images.split(128)]).clamp(-1, 1)


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, in dB."""
    return float((10 * torch.log10(4 / (reconstruct(vae, images) - images).pow(2).mean((1, 2, 3)))).mean())


def figures(vae: AutoencoderKL, images: np.ndarray, rows: list[Picture]) -> dict[str, float]:
    """PSNR in dB on a tenth of the drawings it has seen, on the 400 held-out ones, and on these by style."""

    def of(chosen: list[int]) -> float:
        return round(psnr(vae, tensor(images[chosen])), 2)

    held_out = [i for i, row in enumerate(rows) if row.held_out and row.player]
    return {
        "known": of([i for i, row in enumerate(rows) if not row.held_out][::10]),
        "held_out": of(held_out),
        **{style: of([i for i in held_out if rows[i].style == style]) for style in STYLES},
    }


def main(
    minutes: Annotated[float, typer.Option(help="training time of encoder and decoder")] = 35,
    decoder_minutes: Annotated[float, typer.Option(help="then the decoder alone, on noisy latents")] = 0,
    batch: Annotated[int, typer.Option(help="images per step")] = 12 * BATCHES,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, rows = build()
    known = tensor(images[[i for i, row in enumerate(rows) if not row.held_out]])
    exported = FOLDER / "export"

    def batch_of() -> torch.Tensor:
        return augment(known[torch.randint(len(known), (batch,), device=DEVICE)])

    if minutes:
        vae = placed(new_autoencoder())
        training = TimedTraining(vae, FOLDER / "joint", minutes, lr=2.5e-3, ema=0.998)

        @compiled
        def joint(x: torch.Tensor) -> torch.Tensor:
            with autocast():
                posterior = vae.encode(x).latent_dist
                out = vae.decode(posterior.sample()).sample
            return distance(out, x) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

        for step in training.run(lambda: joint(batch_of())):
            if step % 1000 == 0:
                print(f"  PSNR {figures(training.average, images, rows)} dB", flush=True)
        vae = training.average
        standardise(vae, known[::3])
        vae.save_pretrained(exported)
    if decoder_minutes:
        vae = placed(AutoencoderKL.from_pretrained(exported))
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
        training = TimedTraining(vae, FOLDER / "decoder", decoder_minutes, lr=1e-3, ema=0.998)

        @compiled
        def decode_only(x: torch.Tensor) -> torch.Tensor:
            with autocast():
                with torch.no_grad():
                    z = vae.encode(x).latent_dist.mean
                    z = z + torch.randn_like(z) * 0.12 * torch.rand(len(z), 1, 1, 1, device=z.device)
                out = vae.decode(z).sample
            return distance(out, x)

        for _ in training.run(lambda: decode_only(batch_of()), every=200):
            pass
        vae = training.average
        vae.save_pretrained(exported)
    vae = AutoencoderKL.from_pretrained(exported).to(DEVICE)
    print(f"PSNR {figures(vae, images, rows)} dB -> {exported}")


if __name__ == "__main__":
    run(main)
