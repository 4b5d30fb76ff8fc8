"""Cost against size: pairs, shards, resolution, processes, iterations of self-play; and memory against data size.

    python -m benchmarks.scaling

Each point is a process of its own, so that its memory is its own; a second process of training shares the same cores.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import answer, finish, keep, memory, point
from benchmarks.sampling import first_noise
from benchmarks.training import config_of, data_of, trainer_of
from benchmarks.world import World, world
from spin.config import GenerateConfig
from spin.data.dataset import Dataset, Latents
from spin.models import best_device
from spin.processes import joined, rank, spread
from spin.sampling import batches, fast_precision, sample_latents, shard_batches
from spin.seeding import noise_of
from spin.training import Trainer, consumed


def random_data(folder: Path, place: World, pairs: int) -> Any:
    """Write a data set of random latents, in blocks: this must not need more memory than training does."""
    torch.manual_seed(0)
    ids, prompts = [f"p{i:07d}" for i in range(pairs)], place.prompts(pairs)
    return data_of(folder, ids, prompts, *(torch.randn(pairs, *place.shape, dtype=torch.float16) for _ in range(2)))


def write_data(folder: str, size: str, pairs: int) -> None:
    """Write a data set into ``folder``; called in a process of its own."""
    random_data(Path(folder), world(size, torch.device("cpu")), pairs)


def training(size: str, folder: str, batch: int, steps: int) -> dict[str, float]:
    """Train ``steps`` steps; return seconds per step and the memory taken."""
    device = best_device()
    sizes = {"batch_size": batch, "micro_batch_size": batch // 2}
    trainer = trainer_of(world(size, device).model, Dataset(Path(folder)), fast_precision(device), False, **sizes)
    trainer.train_step()
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    finish(device)
    return {"seconds": round((time.perf_counter() - started) / steps, 4), **memory(device)}


def shared_training(size: str, folder: str, batch: int, steps: int, target: str) -> None:
    """``training`` as one of several processes; the first writes what it found."""
    assert joined()
    found = training(size, folder, batch, steps)
    if rank() == 0:
        Path(target).write_text(json.dumps(found))


def playing(size: str, folder: str, batch: int, steps: int, iterations: int) -> dict[int, dict[str, float]]:
    """Play ``iterations``, each with its own losers and its own reference; return what each of them took."""
    device = best_device()
    place = world(size, device)
    model, data, precision, told = place.model, Dataset(Path(folder)), fast_precision(device), {}
    sizes = {"batch_size": batch, "micro_batch_size": batch // 2, "steps": [steps]}
    config, drawing = config_of(**sizes), GenerateConfig(num_inference_steps=4, batch_size=8)
    for iteration in range(1, iterations + 1):
        started = time.perf_counter()
        rows = sorted(consumed(data.ids, config, iteration))
        drawn = []
        for part in batches(len(rows), drawing.batch_size):
            names = [data.ids[rows[i]] for i in part]
            noise = torch.stack([noise_of(place.shape, "generate", iteration, name) for name in names])
            prompts = [data.prompts[rows[i]] for i in part]
            drawn.append(sample_latents(model, prompts, noise, drawing, precision).cpu())
        path = Path(folder) / f"played-{iteration}.safetensors"
        Latents.write(path, [data.ids[row] for row in rows], torch.cat(drawn))
        between = time.perf_counter()
        trainer = Trainer(model, data, Latents([path]), config, iteration, precision)
        for _ in range(steps):
            trainer.train_step()
        model.denoiser = trainer.player_denoiser().requires_grad_(False).eval()
        finish(device)
        spent = {"generate_seconds": between - started, "train_seconds": time.perf_counter() - between}
        told[iteration] = {name: round(value, 3) for name, value in spent.items()} | memory(device)
    return told


def sampling(size: str, resolution: int, images: int, shards: int) -> dict[str, float]:
    """Draw all shards' images one after another; return seconds per image and of the longest shard."""
    device = best_device()
    place = replace(world(size, device), resolution=resolution)
    config = GenerateConfig(num_inference_steps=4, guidance_scale=place.guidance, batch_size=8)
    prompts = place.prompts(images)
    spent: list[float] = []
    for shard in [0, *range(shards)]:
        started = time.perf_counter()
        for rows in shard_batches(images, config.batch_size, shard, shards):
            noise = first_noise(place, rows.start, len(rows))
            sample_latents(place.model, [prompts[i] for i in rows], noise, config, fast_precision(device))
            if not spent:
                break
        finish(device)
        spent.append(time.perf_counter() - started)
    told = {"seconds": sum(spent[1:]) / images, "longest_shard": max(spent[1:])}
    return {name: round(value, 4) for name, value in told.items()} | memory(device)


def best(work: str, repeats: int, **arguments: Any) -> dict[str, float]:
    """Return the fastest of several points: neighbours only ever slow one down."""
    return min((point("scaling", work, **arguments) for _ in range(repeats)), key=lambda found: found["seconds"])


def main(
    size: Annotated[str, typer.Option(help="emoji, sd15 or sdxl")] = "emoji",
    batch: Annotated[int, typer.Option(help="pairs per step")] = 16,
    steps: Annotated[int, typer.Option(help="steps per point")] = 4,
    repeats: Annotated[int, typer.Option(help="processes per point")] = 2,
    asked: Annotated[str, typer.Option("--point", help="used by the command itself", hidden=True)] = "",
) -> None:
    """Measure and write results/scaling-<size>-<device>.json."""
    if asked:
        answer(asked, globals())
        return
    result: dict[str, Any] = {"batch": batch}
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        folders = {}
        for pairs in (1_000, 10_000):
            folders[pairs] = Path(scratch) / str(pairs)
            folders[pairs].mkdir()
            point("scaling", "write_data", folder=str(folders[pairs]), size=size, pairs=pairs)
        result["training_by_pairs"] = {
            pairs: best("training", repeats, size=size, folder=str(folder), batch=batch, steps=steps)
            for pairs, folder in folders.items()
        }
        one, ten = result["training_by_pairs"].values()
        result["memory_at_10x_data"] = round(ten["resident_mib"] / one["resident_mib"], 3)
        result["play_by_iterations"] = point(
            "scaling", "playing", size=size, folder=str(folders[1_000]), batch=batch, steps=steps, iterations=3
        )
        target = Path(scratch) / "shared.json"
        spread(2, shared_training, size, str(folders[1_000]), batch, steps, str(target))
        result["training_by_processes"] = {1: one, 2: json.loads(target.read_text())}
    base = 64 if size == "emoji" else 512
    result["sampling_by_resolution"] = {
        side: best("sampling", repeats, size=size, resolution=side, images=16, shards=1) for side in (base, base * 2)
    }
    result["sampling_by_shards"] = {
        shards: best("sampling", repeats, size=size, resolution=base, images=32, shards=shards) for shards in (1, 2, 4)
    }
    keep("scaling", size, result, best_device())


if __name__ == "__main__":
    typer.run(main)
