"""Cost against size: pairs, shards, resolution, iterations, processes; and memory against data size.

    python -m benchmarks.scaling

Each point is a process of its own, so that its memory is its own; a second process of training shares the same cores.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import console, finish, keep
from benchmarks.sampling import first_noise
from benchmarks.training import data_of, trainer_of
from benchmarks.world import World, world
from spin.config import GenerateConfig
from spin.models import best_device
from spin.processes import joined, rank, spread
from spin.sampling import fast_precision, sample_latents, shard_batches


def random_data(folder: Path, place: World, pairs: int) -> Any:
    """Write a data set of random latents, in blocks: this must not need more memory than training does."""
    torch.manual_seed(0)
    ids, prompts = [f"p{i:07d}" for i in range(pairs)], place.prompts(pairs)
    return data_of(folder, ids, prompts, *(torch.randn(pairs, *place.shape, dtype=torch.float16) for _ in range(2)))


def write_data(folder: str, size: str, pairs: int) -> None:
    """Write a data set into ``folder``; called in a process of its own."""
    random_data(Path(folder), world(size, torch.device("cpu")), pairs)


def training(size: str, folder: str, batch: int, steps: int) -> dict[str, float]:
    """Train ``steps`` steps; return seconds per step and this process's largest memory in MiB."""
    from spin.data.dataset import Dataset

    device = best_device()
    place = world(size, device)
    trainer = trainer_of(
        place, Dataset(Path(folder)), fast_precision(device), False, batch_size=batch, micro_batch_size=batch // 2
    )
    trainer.train_step()
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    finish(device)
    return {"seconds": (time.perf_counter() - started) / steps, "mib": memory()}


def shared_training(size: str, folder: str, batch: int, steps: int, target: str) -> None:
    """``training`` as one of several processes; the first writes what it found."""
    assert joined()
    found = training(size, folder, batch, steps)
    if rank() == 0:
        Path(target).write_text(json.dumps(found))


def sampling(size: str, resolution: int, images: int, shards: int) -> dict[str, float]:
    """Draw all shards' images one after another; return seconds per image and of the longest shard."""
    device = best_device()
    found = world(size, device)
    place = World(found.size, found.stock, found.model, resolution, found.guidance)
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
    return {"seconds": sum(spent[1:]) / images, "longest_shard": max(spent[1:]), "mib": memory()}


def memory() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def point(work: str, **arguments: Any) -> dict[str, float]:
    """Run ``work`` in a new process; return what it found."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", json.dumps({"work": work, **arguments})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"expected {work} {arguments} to finish, got {done.returncode}:\n{done.stderr[-2000:]}")
    found = {key: round(value, 4) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    console.print(f"{work} {arguments.get('pairs', arguments)}: {found}", markup=False)
    return found


def best(work: str, repeats: int, **arguments: Any) -> dict[str, float]:
    """Return the fastest of several points: neighbours only ever slow one down."""
    return min((point(work, **arguments) for _ in range(repeats)), key=lambda found: found["seconds"])


def main(
    size: Annotated[str, typer.Option(help="emoji, sd15 or sdxl")] = "emoji",
    batch: Annotated[int, typer.Option(help="pairs per step")] = 16,
    steps: Annotated[int, typer.Option(help="steps per point")] = 4,
    repeats: Annotated[int, typer.Option(help="processes per point")] = 2,
    point: Annotated[str, typer.Option(help="one point, as JSON; used by the command itself", hidden=True)] = "",
) -> None:
    """Measure and write results/scaling-<size>-<device>.json."""
    if point:
        given = json.loads(point)
        print(json.dumps(globals()[given.pop("work")](**given) or {}))
        return
    result: dict[str, Any] = {"batch": batch}
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        folders = {}
        for pairs in (1_000, 10_000):
            folders[pairs] = Path(scratch) / str(pairs)
            folders[pairs].mkdir()
            globals()["point"]("write_data", folder=str(folders[pairs]), size=size, pairs=pairs)
        result["training_by_pairs"] = {
            pairs: best("training", repeats, size=size, folder=str(folder), batch=batch, steps=steps)
            for pairs, folder in folders.items()
        }
        one, ten = result["training_by_pairs"].values()
        result["memory_at_10x_data"] = round(ten["mib"] / one["mib"], 3)
        result["training_by_steps"] = {
            n: best("training", 1, size=size, folder=str(folders[1_000]), batch=batch, steps=n) for n in (2, 8)
        }
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
