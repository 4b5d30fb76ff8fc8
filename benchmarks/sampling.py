"""Drawing images: ours against the stock pipeline, the same weights, prompts and noise.

    python -m benchmarks.sampling                       the emoji model on this device
    python -m benchmarks.sampling --size sd15           SD-1.5's size with random weights, for a GPU

Stock is (a) as documented, PNDM with 50 steps, one image at a time; (b) DPM-Solver++ with 20 steps in batches, compiled
on CUDA. All of them give images; ours is drawn to pixels too, though self-play keeps latents.
"""

import copy
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.measure import answer, console, finish, interleaved, keep, memory, peaks, point, rates, speed_up
from benchmarks.world import World, world
from spin.accounting import flops_per_image
from spin.config import GenerateConfig
from spin.models import Model, best_device
from spin.sampling import SOLVERS, decode, fast_precision, sample_latents
from spin.seeding import noise_of

Images = np.ndarray
STEPS, DOCUMENTED = 20, 50


def stock(
    model: Model, place: World, name: str, dtype: torch.dtype, count: int, batch: int, compiled: bool
) -> Callable[[], Images]:
    """Return a way to draw ``count`` images with the stock pipeline of ``model``'s parts, which are changed."""
    parts = {key: value for key, value in model.pipeline.components.items() if key != "scheduler"}
    for value in parts.values():
        if isinstance(value, torch.nn.Module):
            value.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    kind, options = SOLVERS[name]
    scheduler = kind.from_config(model.scheduler_config, **options)
    pipe = type(model.pipeline)(**parts | model.family.options, scheduler=scheduler).to(model.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet.compile(dynamic=False)
    steps = DOCUMENTED if name == "pndm" else STEPS
    prompts = place.prompts(count)

    def draw() -> Images:
        images = []
        for start in range(0, count, batch):
            part = prompts[start : start + batch]
            noise = first_noise(place, start, len(part)).to(pipe.device, dtype)
            images.append(
                pipe(
                    part, latents=noise, num_inference_steps=steps, guidance_scale=place.guidance, output_type="np",
                    height=place.resolution, width=place.resolution,
                ).images
            )  # fmt: skip
        return np.round(np.concatenate(images) * 255).astype(np.uint8)

    return draw


def ours(model: Model, place: World, config: GenerateConfig, count: int, precision: str) -> Callable[[], Images]:
    """Return a way to draw ``count`` images as the stages do."""
    prompts, batch = place.prompts(count), config.batch_size

    def draw() -> Images:
        images = []
        for start in range(0, count, batch):
            part = prompts[start : start + batch]
            latents = sample_latents(model, part, first_noise(place, start, len(part)), config, precision)
            images.append(decode(model, latents, precision).numpy())
        return np.concatenate(images)

    return draw


def first_noise(place: World, start: int, count: int) -> torch.Tensor:
    return torch.stack([noise_of(place.shape, "benchmark", start + i) for i in range(count)])


def difference(images: Images, others: Images) -> dict[str, float]:
    """Return how far two ways' first images are apart, in steps of 255."""
    n = min(len(images), len(others))
    apart = np.abs(images[:n].astype(np.int16) - others[:n].astype(np.int16))
    return {"mean": round(float(apart.mean()), 4), "share_above_8": round(float((apart > 8).mean()), 5)}


STOCK, DOCUMENTED_STOCK = "stock (DPM-Solver++ 20, batch)", "stock, documented (PNDM 50, one at a time)"
OURS, INTERVAL = "ours", "ours, guidance in the middle 60 %"
HALF_STOCK, EXACT_OURS = "stock (the same), in bfloat16", "ours, float32"


def names(device: torch.device) -> list[str]:
    """Return the ways that differ on this device."""
    apart = device.type == "cpu" and fast_precision(device) == "bf16"
    return [DOCUMENTED_STOCK, STOCK, OURS, INTERVAL, *([HALF_STOCK, EXACT_OURS] if apart else [])]


def way(
    name: str, place: World, model: Model, batch: int, single: int
) -> tuple[Callable[[], Images], int, GenerateConfig]:
    """Return a way to draw with ``model`` (which it may change), its number of images and what it is asked for."""
    device, precision = model.device, fast_precision(model.device)

    def config(**options: Any) -> GenerateConfig:
        given = {"num_inference_steps": STEPS, "guidance_scale": place.guidance, "batch_size": batch, **options}
        return GenerateConfig.model_validate(given)

    half = torch.bfloat16 if precision == "bf16" else torch.float32
    exact = torch.float32 if device.type == "cpu" else half
    if name == DOCUMENTED_STOCK:
        asked = config(solver="pndm", num_inference_steps=DOCUMENTED)
        return stock(model, place, "pndm", exact, single, 1, False), single, asked
    if name in (STOCK, HALF_STOCK):
        dtype = exact if name == STOCK else half
        return stock(model, place, "dpm-solver++", dtype, batch, batch, device.type == "cuda"), batch, config()
    model.compile_for("auto", 10**9)
    asked = config(guidance_interval=(0.2, 0.8)) if name == INTERVAL else config()
    return ours(model, place, asked, batch, "fp32" if name == EXACT_OURS else precision), batch, asked


def used(name: str, size: str, batch: int, single: int) -> dict[str, float]:
    """Return the memory that one way takes where nothing else is alive."""
    device = best_device()
    place = world(size, device)
    way(name, place, place.model, batch, single)[0]()
    finish(device)
    return memory(device)


def main(
    size: Annotated[str, typer.Option(help="emoji, sd15 or sdxl")] = "emoji",
    batch: Annotated[int, typer.Option(help="images per batch")] = 32,
    single: Annotated[int, typer.Option(help="images drawn one at a time")] = 2,
    repeats: Annotated[int, typer.Option(help="rounds")] = 5,
    asked: Annotated[str, typer.Option("--point", help="used by the command itself", hidden=True)] = "",
) -> None:
    """Measure and write results/sampling-<size>-<device>.json."""
    if asked:
        answer(asked, globals())
        return
    device = best_device()
    memories = {
        name: point("sampling", "used", name=name, size=size, batch=batch, single=single) for name in names(device)
    }
    place = world(size, device)
    ways = {name: way(name, place, copy.deepcopy(place.model), batch, single) for name in names(device)}
    told = interleaved({name: draw for name, (draw, _, _) in ways.items()}, device, repeats)
    top = peaks(device)
    flops = {
        name: flops_per_image(place.model, place.shape, given, decoded=True) for name, (_, _, given) in ways.items()
    }
    counts = {name: count for name, (_, count, _) in ways.items()}
    rates(told, counts, flops, float(top["flops_per_second"]))
    reference = told[STOCK]["last"]
    against = {name: speed_up(told[OURS], found, batch, counts[name]) for name, found in told.items() if name != OURS}
    apart = {name: difference(found.pop("last"), reference) for name, found in told.items()}
    result = {"batch": batch, "peak": top, "ways": told, "memory": memories, "ours_is_times_as_fast_as": against,
              "difference_to_stock_batch": apart}  # fmt: skip
    keep("sampling", size, result, device)
    for name, factor in against.items():
        console.print(f"ours is {factor:.2f} times as fast as: {name}", markup=False)


if __name__ == "__main__":
    typer.run(main)
