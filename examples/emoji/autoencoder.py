"""Train the 64x64 autoencoder: ``python examples/emoji/autoencoder.py --minutes 12``.

f8, 8x8 latents of 16 channels: the same number of values as an f4 autoencoder with 4 channels, in far fewer
activations. Latents are standardised per channel inside ``quant_conv``/``post_quant_conv``, so the result is
a plain ``AutoencoderKL`` with ``scaling_factor`` 1.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch.nn import functional as F

from examples.emoji.loop import TimedTraining
from examples.emoji.world import BUILD, build

FOLDER = BUILD / "autoencoder"


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], channels last."""
    return (
        torch.from_numpy(images)
        .permute(0, 3, 1, 2)
        .float()
        .div(127.5)
        .sub(1)
        .contiguous(memory_format=torch.channels_last)
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the batch, permute its colour channels now and then, shift by up to 4 pixels."""
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(-1)
    if torch.rand((), generator=generator) < 0.25:
        x = x[:, torch.randperm(3, generator=generator)]
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return F.pad(x, (4, 4, 4, 4), value=1.0)[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]


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


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, in dB, of decode(mean of encode)."""
    with torch.no_grad():
        out = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in images.split(128)])
    return float((10 * torch.log10(4 / (out.clamp(-1, 1) - images).pow(2).mean((1, 2, 3)))).mean())


def main(
    minutes: Annotated[float, typer.Option(help="training time of encoder and decoder")] = 12,
    decoder_minutes: Annotated[float, typer.Option(help="then the decoder alone, on noisy latents")] = 0,
    batch: int = 32,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, rows = build()
    known = tensor(images[[i for i, r in enumerate(rows) if not r.held_out]])
    unseen = tensor(images[[i for i, r in enumerate(rows) if r.held_out]])
    generator = torch.Generator().manual_seed(0)
    vae = new_autoencoder().to(memory_format=torch.channels_last)
    exported = FOLDER / "export"

    def batch_of() -> torch.Tensor:
        return augment(known[torch.randint(len(known), (batch,), generator=generator)], generator)

    def distance(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = out.float()
        gradient = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(x), strict=True))
        return F.l1_loss(out, x) + 0.5 * F.mse_loss(out, x) + 0.25 * gradient

    if minutes:

        def joint() -> torch.Tensor:
            x = batch_of()
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(x).latent_dist
                out = vae.decode(posterior.sample()).sample
            return distance(out, x) + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()

        training = TimedTraining(vae, FOLDER / "joint", minutes, lr=2.5e-3, ema=0.99)
        for step in training.run(joint):
            if step % 500 == 0:
                print(f"  PSNR held-out OpenMoji {psnr(training.average, unseen):.2f} dB", flush=True)
        vae = training.average
        standardise(vae, known[::3])
        vae.save_pretrained(exported)
    if decoder_minutes:
        vae = AutoencoderKL.from_pretrained(exported).to(memory_format=torch.channels_last)
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)

        def decode_only() -> torch.Tensor:
            x = batch_of()
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    z = vae.encode(x).latent_dist.mean
                    z = z + torch.randn_like(z) * 0.12 * torch.rand(len(z), 1, 1, 1)
                out = vae.decode(z).sample
            return distance(out, x)

        training = TimedTraining(vae, FOLDER / "decoder", decoder_minutes, lr=1e-3, ema=0.995)
        for _ in training.run(decode_only, every=200):
            pass
        vae = training.average
        vae.save_pretrained(exported)
    print(
        f"PSNR known {psnr(vae, known[::9]):.2f} dB, held-out OpenMoji {psnr(vae, unseen):.2f} dB -> {Path(exported)}"
    )


if __name__ == "__main__":
    typer.run(main)
