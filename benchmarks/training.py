"""A training step: ours against a plain one, and against our SFT; the same weights, pairs, noise and timesteps.

    python -m benchmarks.training                       the emoji model on this device
    python -m benchmarks.training --size sd15           SD-1.5's size with random weights, for a GPU

The plain step does what Diffusion-DPO's script does: pixels in, autoencoder and text encoder in the step, the frozen
parts and the reference in half precision, the player under autocast, measures read in every micro-batch, no compile.
Ours encodes a prompt once: the rounds' two batches of pairs are heard by the end of the second round.
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

from benchmarks.measure import answer, console, finish, interleaved, keep, memory, peaks, point, rates, speed_up
from benchmarks.world import World, world
from spin.accounting import flops_per_encode, flops_per_pair
from spin.config import TrainConfig
from spin.data.dataset import Dataset, Latents
from spin.emoji import concepts, openmoji_svg, render_svg
from spin.models import Model, best_device
from spin.sampling import autocast, fast_precision
from spin.seeding import generator_of, noise_of
from spin.training import Trainer, order, process_for

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


def config_of(**options: Any) -> TrainConfig:
    given = {"learning_rate": 2e-5, "warmup_steps": 0, "decay_steps": 0, "steps": [10_000], **options}
    if options.get("objective") != "sft":
        given["beta"] = [BETA]
    return TrainConfig.model_validate(given)


def trainer_of(model: Model, data: Dataset, precision: str, compiled: bool, **options: Any) -> Trainer:
    """Return a trainer of ``model``, whose denoiser becomes the player."""
    config = config_of(**options)
    losers = None if config.objective == "sft" else data.losers()
    return Trainer(model, data, losers, config, 1, precision, compiled=compiled)


class Plain:
    """The step as a script has it, on the pairs, noise and timesteps that ours has; ``model`` becomes its own."""

    def __init__(
        self, model: Model, data: Dataset, config: TrainConfig, pixels: tuple[torch.Tensor, torch.Tensor], half: bool
    ):
        self.model, self.data, self.config, self.pixels, self.step = model, data, config, pixels, 0
        self.precision, self.frozen = ("bf16", torch.bfloat16) if half else ("fp32", torch.float32)
        self.process = process_for(config, model.scheduler_config).to(model.device)
        for part in model.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                if part is not model.denoiser:
                    part.to(self.frozen)
        self.reference = copy.deepcopy(model.denoiser).to(self.frozen)
        self.unet = model.denoiser.requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=2e-5, weight_decay=1e-2)

    def __call__(self) -> float:
        """Do one optimizer step on the next pairs; return the loss."""
        size, count = self.config.micro_batch_size, self.config.batch_size
        places = order(self.data.ids, self.config.seed, 1, self.step * count, count)
        losses = [self.micro(places[start : start + size], count // size) for start in range(0, count, size)]
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return sum(losses) / len(losses)

    def drawn(self, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise and the timesteps of both sides."""
        names = [("train", self.config.seed, 1, epoch, self.data.ids[row]) for epoch, row in places]
        noise = torch.stack([noise_of(self.data.latents_shape, *name) for name in names]).to(self.model.device)
        timestep = torch.cat([self.process.draw(generator_of("timestep", *name)) for name in names])
        return noise.repeat(2, 1, 1, 1), timestep.to(self.model.device).repeat(2)

    def micro(self, places: list[tuple[int, int]], accumulation: int) -> float:
        rows = [row for _, row in places]
        pixels = torch.cat([side[rows] for side in self.pixels]).to(self.model.device, self.frozen)
        with torch.no_grad():
            latents = self.model.vae.encode(pixels).latent_dist.sample() * self.model.vae.config.scaling_factor
            heard = self.model.encode_prompts([self.data.prompts[row] for row in rows]).repeat(2)
        latents, (noise, timestep) = latents.float(), self.drawn(places)
        noisy, target = (
            self.process.noisy(latents, noise, timestep),
            self.process.target(latents, noise, timestep),
        )
        with autocast(self.model.device, self.precision):
            prediction = self.model.predict(self.unet, noisy, timestep, heard).float()
        winner, loser = (prediction - target).pow(2).mean(dim=(1, 2, 3)).chunk(2)
        with torch.no_grad():
            known = self.model.predict(self.reference, noisy.to(self.frozen), timestep, heard)
            known_winner, known_loser = (known - target).pow(2).mean(dim=(1, 2, 3)).chunk(2)
        inside = -0.5 * BETA * ((winner - loser) - (known_winner - known_loser))
        loss = -F.logsigmoid(inside).mean()
        # As in the script: what is logged is read in every micro-batch.
        told = loss.item(), (inside > 0).float().mean().item(), winner.mean().item(), known_winner.mean().item()
        (loss / accumulation).backward()
        return told[0]


OURS, SFT, PLAIN, EXACT, EXACT_PLAIN = "ours", "ours, SFT", "plain", "ours, float32", "plain, float32"


def names(device: torch.device) -> list[str]:
    """Return the ways that differ on this device."""
    apart = device.type == "cpu" and fast_precision(device) == "bf16"
    return [OURS, SFT, PLAIN, *([EXACT, EXACT_PLAIN] if apart else [])]


def way(
    name: str, place: World, model: Model, data: Dataset, compiled: bool, lora: int, batch: int, micro: int
) -> tuple[Callable[[], float], TrainConfig]:
    """Return a way to do a step with ``model``, which is its own, and what it is asked for."""
    precision = "fp32" if name in (EXACT, EXACT_PLAIN) else fast_precision(model.device)
    sizes = {"batch_size": batch, "micro_batch_size": micro}
    if name in (PLAIN, EXACT_PLAIN):
        config = config_of(**sizes)
        return Plain(model, data, config, pixels_of(place, len(data)), precision == "bf16"), config
    objective = "sft" if name == SFT else "spin"
    trainer = trainer_of(
        model, data, precision, compiled and name != EXACT, lora_rank=lora, objective=objective, **sizes
    )
    return lambda: trainer.train_step()["loss"], trainer.config


def used(name: str, size: str, folder: str, **options: Any) -> dict[str, float]:
    """Return the memory that one way takes where nothing else is alive."""
    device = best_device()
    place = world(size, device)
    step, _ = way(name, place, place.model, Dataset(Path(folder)), **options)
    for _ in range(2):
        step()
    finish(device)
    return memory(device)


def main(
    size: Annotated[str, typer.Option(help="emoji, sd15 or sdxl")] = "emoji",
    batch: Annotated[int, typer.Option(help="pairs per step")] = 32,
    micro: Annotated[int, typer.Option(help="pairs per forward pass")] = 32,
    repeats: Annotated[int, typer.Option(help="rounds")] = 5,
    lora: Annotated[int, typer.Option(help="rank of the adapters, 0: all weights")] = 0,
    compiled: Annotated[bool | None, typer.Option(help="compile ours; default: on CUDA")] = None,
    asked: Annotated[str, typer.Option("--point", help="used by the command itself", hidden=True)] = "",
) -> None:
    """Measure and write results/training-<size>-<device>.json."""
    if asked:
        answer(asked, globals())
        return
    device = best_device()
    place = world(size, device)
    compiled = device.type == "cuda" if compiled is None else compiled
    pairs = 2 * batch
    given: dict[str, Any] = {"compiled": compiled, "lora": lora, "batch": batch, "micro": micro}
    ids, prompts, pixels = [f"p{i:05d}" for i in range(pairs)], place.prompts(pairs), pixels_of(place, pairs)
    latents = [torch.cat([place.model.encode(part).cpu() for part in side.split(micro)]) for side in pixels]
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        data = data_of(Path(scratch), ids, prompts, *latents)
        memories = {
            name: point("training", "used", name=name, size=size, folder=scratch, **given) for name in names(device)
        }
        ways = {name: way(name, place, copy.deepcopy(place.model), data, **given) for name in names(device)}
        losses: dict[str, list[float]] = {name: [] for name in ways}

        def kept(name: str) -> Callable[[], None]:
            return lambda: losses[name].append(round(ways[name][0](), 6))

        told = interleaved({name: kept(name) for name in ways}, device, repeats)
        # MFU counts the denoiser's work alone, whatever else a way does.
        flops = {name: flops_per_pair(place.model, place.shape, config) for name, (_, config) in ways.items()}
        top = peaks(device)
        rates(told, dict.fromkeys(ways, batch), flops, float(top["flops_per_second"]))
    pairs_of_ways = {
        "plain": (OURS, PLAIN),
        "plain in float32, the script's default": (OURS, EXACT_PLAIN),
        "plain, both in float32": (EXACT, EXACT_PLAIN),
        "our SFT": (OURS, SFT),
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
        "plain_also_encodes_flops_per_pair": 2 * flops_per_encode(place.model, place.shape), "memory": memories,
        "speed_up_over": against, "losses": losses,
    }  # fmt: skip
    # Beside what the same processor does by default.
    other = compiled and device.type == "cpu"
    keep("training-compiled" if other else "training", size, result, device)
    for name, factor in against.items():
        console.print(f"ours is {factor:.2f} times as fast as: {name}", markup=False)


if __name__ == "__main__":
    typer.run(main)
