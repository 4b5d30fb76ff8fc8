"""A training step: ours against a plain one, and against our SFT; the same weights, pairs, noise and timesteps.

    python -m benchmarks.training                       the emoji model on this device
    python -m benchmarks.training --size sd15           SD-1.5's size with random weights, for a GPU

The plain step does what Diffusion-DPO's script does: pixels in, autoencoder and text encoder in the step, the frozen
parts and the reference in half precision, the player under autocast, measures read in every micro-batch, no compile.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from torch.nn import functional as F

from benchmarks.measure import console, interleaved, keep, peaks, rates, speed_up
from benchmarks.world import World, world
from spin.accounting import flops_per_encode, flops_per_pair
from spin.config import TrainConfig
from spin.data.dataset import Dataset, Latents
from spin.emoji import concepts, openmoji_svg, render_svg
from spin.families import Conditioning
from spin.models import best_device
from spin.sampling import autocast, fast_precision
from spin.training import Batch, Trainer, order

BETA = 300.0


def pixels_of(place: World, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return winners and losers in [-1, 1], float32 [pairs, 3, H, W]: emoji and their mirror images."""
    import numpy as np

    drawn = []
    for concept in concepts("train")[:pairs]:
        image = render_svg(openmoji_svg(concept.codepoint), place.resolution)
        drawn.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
    winners = torch.stack([drawn[i % len(drawn)] for i in range(pairs)])
    return winners, winners.flip(3)


def data_of(folder: Path, ids: list[str], prompts: list[str], winners: torch.Tensor, losers: torch.Tensor) -> Dataset:
    """Write a prepared data set of latents."""
    rows = [{"id": id, "prompt": prompt, "split": "train"} for id, prompt in zip(ids, prompts, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    Latents.write(folder / "latents-00000.safetensors", ids, winners)
    Latents.write(folder / "losers-00000.safetensors", ids, losers)
    return Dataset(folder)


def trainer_of(place: World, data: Dataset, precision: str, compiled: bool, **options: Any) -> Trainer:
    """Return a trainer of a copy of the world's model."""
    model = copy.copy(place.model)
    model.denoiser = copy.deepcopy(place.model.denoiser)
    given = {"learning_rate": 2e-5, "warmup_steps": 0, "decay_steps": 0, "steps": [10_000], **options}
    if options.get("objective") != "sft":
        given["beta"] = [BETA]
    config = TrainConfig.model_validate(given)
    losers = None if config.objective == "sft" else data.losers()
    return Trainer(model, data, losers, config, 1, precision, compiled=compiled)


class Plain:
    """The step as a script has it."""

    def __init__(self, place: World, ours: Trainer, pixels: tuple[torch.Tensor, torch.Tensor], half: bool):
        self.place, self.ours, self.device = place, ours, place.model.device
        self.precision = "bf16" if half else "fp32"
        frozen = torch.bfloat16 if half else torch.float32
        contiguous = torch.contiguous_format

        def part(module: Any, dtype: torch.dtype) -> Any:
            return copy.deepcopy(module).to(dtype=dtype).to(memory_format=contiguous)

        self.unet = part(place.model.denoiser, torch.float32).requires_grad_(True).train()
        self.reference, self.vae = part(place.model.denoiser, frozen), part(place.model.vae, frozen)
        self.frozen, self.pixels, self.step = frozen, pixels, 0
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=2e-5, weight_decay=1e-2)

    def __call__(self) -> float:
        """Do one optimizer step on the next pairs, with the noise and timesteps that ours has; return the loss."""
        config, losses = self.ours.config, []
        places = order(self.ours.winners.ids, config.seed, 1, self.step * config.batch_size, config.batch_size)
        for start in range(0, len(places), config.micro_batch_size):
            micro = places[start : start + config.micro_batch_size]
            losses.append(self.micro(micro, self.ours.batch(micro), len(places) // config.micro_batch_size))
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return sum(losses) / len(losses)

    def micro(self, places: list[tuple[int, int]], drawn: Batch, accumulation: int) -> float:
        rows = [row for _, row in places]
        pixels = torch.cat([side[rows] for side in self.pixels]).to(self.device, self.frozen)
        with torch.no_grad():
            latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
            conditioning = self.place.model.embed([self.ours.winners.prompts[row] for row in rows]).repeat(2)
        latents, noise, timestep = latents.float(), drawn.noise.repeat(2, 1, 1, 1), drawn.timestep.repeat(2)
        noisy, target = self.ours.process.noisy(latents, noise, timestep), None
        target = self.ours.process.target(latents, noise, timestep)
        with autocast(self.device, self.precision):
            prediction = self.place.model.predict(self.unet, noisy, timestep, conditioning).float()
        winner, loser = (prediction - target).pow(2).mean(dim=(1, 2, 3)).chunk(2)
        with torch.no_grad():
            pooled = conditioning.pooled
            half = Conditioning(conditioning.text.to(self.frozen), None if pooled is None else pooled.to(self.frozen))
            known = self.place.model.predict(self.reference, noisy.to(self.frozen), timestep, half)
            known_winner, known_loser = (known - target).pow(2).mean(dim=(1, 2, 3)).chunk(2)
        inside = -0.5 * BETA * ((winner - loser) - (known_winner - known_loser))
        loss = -F.logsigmoid(inside).mean()
        # As in the script: what is logged is read in every micro-batch.
        told = loss.item(), (inside > 0).float().mean().item(), winner.mean().item(), known_winner.mean().item()
        (loss / accumulation).backward()
        return told[0]


def main(
    size: Annotated[str, typer.Option(help="emoji, sd15 or sdxl")] = "emoji",
    batch: Annotated[int, typer.Option(help="pairs per step")] = 32,
    micro: Annotated[int, typer.Option(help="pairs per forward pass")] = 32,
    repeats: Annotated[int, typer.Option(help="rounds")] = 5,
    lora: Annotated[int, typer.Option(help="rank of the adapters, 0: all weights")] = 0,
    compiled: Annotated[bool | None, typer.Option(help="compile ours; default: on CUDA")] = None,
) -> None:
    """Measure and write results/training-<size>-<device>.json."""
    device = best_device()
    place, precision = world(size, device), fast_precision(device)
    compiled = device.type == "cuda" if compiled is None else compiled
    pairs = 2 * batch
    ids, prompts, pixels = [f"p{i:05d}" for i in range(pairs)], place.prompts(pairs), pixels_of(place, pairs)
    latents = [torch.cat([place.model.encode(part) for part in side.split(micro)]) for side in pixels]
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        data = data_of(Path(scratch), ids, prompts, *latents)
        sizes = {"batch_size": batch, "micro_batch_size": micro}
        ours = trainer_of(place, data, precision, compiled, lora_rank=lora, **sizes)
        sft = trainer_of(place, data, precision, compiled, objective="sft", lora_rank=lora, **sizes)
        half = precision == "bf16"
        plain = Plain(place, ours, pixels, half)
        steps: dict[str, Callable[[], float]] = {
            "ours": lambda: ours.train_step()["loss"],
            "ours, SFT": lambda: sft.train_step()["loss"],
            "plain": plain,
        }
        if device.type == "cpu" and half:
            exact = trainer_of(place, data, "fp32", False, lora_rank=lora, **sizes)
            steps |= {
                "ours, float32": lambda: exact.train_step()["loss"],
                "plain, float32": Plain(place, exact, pixels, False),
            }
        losses: dict[str, list[float]] = {name: [] for name in steps}

        def kept(name: str) -> Callable[[], None]:
            return lambda: losses[name].append(round(steps[name](), 6))

        told = interleaved({name: kept(name) for name in steps}, device, repeats)
        pair, image = flops_per_pair(place.model, place.shape, ours.config), flops_per_encode(place.model, place.shape)
        flops = dict.fromkeys(steps, pair)
        flops["ours, SFT"] = flops_per_pair(place.model, place.shape, sft.config)
        top = peaks(device)
        # MFU counts the denoiser's work alone, whatever else a way does.
        rates(told, dict.fromkeys(steps, batch), flops, float(top["flops_per_second"]))
    pairs_of_ways = {
        "plain": ("ours", "plain"),
        "plain in float32, the script's default": ("ours", "plain, float32"),
        "plain, both in float32": ("ours, float32", "plain, float32"),
        "our SFT": ("ours", "ours, SFT"),
    }
    against = {
        name: speed_up(told[fast], told[slow], batch, batch)
        for name, (fast, slow) in pairs_of_ways.items()
        if slow in told
    }
    for found in told.values():
        found.pop("last")
    result = {
        "batch": batch, "micro_batch": micro, "lora_rank": lora, "compiled": compiled, "peak": top, "ways": told,
        "plain_also_encodes_flops_per_pair": 2 * image, "speed_up_over": against, "losses": losses,
    }  # fmt: skip
    # Beside what the same processor does by default.
    other = compiled and device.type == "cpu"
    keep("training-compiled" if other else "training", size, result, device)
    for name, factor in against.items():
        console.print(f"ours is {factor:.2f} times as fast as: {name}", markup=False)


if __name__ == "__main__":
    typer.run(main)
