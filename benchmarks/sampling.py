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

from benchmarks.measure import console, interleaved, keep, peaks, rates, speed_up
from benchmarks.world import World, world
from spin.accounting import flops_per_image
from spin.config import GenerateConfig
from spin.models import best_device
from spin.sampling import SOLVERS, decode, fast_precision, sample_latents
from spin.seeding import noise_of

Images = np.ndarray
STEPS, DOCUMENTED = 20, 50


def stock(place: World, name: str, dtype: torch.dtype, count: int, batch: int, compiled: bool) -> Callable[[], Images]:
    """Return a way to draw ``count`` images with the stock pipeline."""
    parts = {key: copy.deepcopy(value) for key, value in place.stock.components.items() if key != "scheduler"}
    kind, options = SOLVERS[name]
    scheduler = kind.from_config(place.model.scheduler_config, **options)
    kept = {"requires_safety_checker": False} if place.size != "sdxl" else {"add_watermarker": False}
    pipe = type(place.stock)(**parts, scheduler=scheduler, **kept).to(place.model.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet.compile(dynamic=False)
    steps = DOCUMENTED if name == "pndm" else STEPS
    prompts = place.prompts(count)

    def draw() -> Images:
        images = []
        for start in range(0, count, batch):
            part = prompts[start : start + batch]
            noise = first_noise(place, start, len(part)).to(place.model.device, dtype)
            images.append(
                pipe(
                    part, latents=noise, num_inference_steps=steps, guidance_scale=place.guidance, output_type="np",
                    height=place.resolution, width=place.resolution,
                ).images
            )  # fmt: skip
        return np.round(np.concatenate(images) * 255).astype(np.uint8)

    return draw


def ours(place: World, config: GenerateConfig, count: int, precision: str) -> Callable[[], Images]:
    """Return a way to draw ``count`` images as the stages do."""
    prompts, batch = place.prompts(count), config.batch_size

    def draw() -> Images:
        images = []
        for start in range(0, count, batch):
            part = prompts[start : start + batch]
            latents = sample_latents(place.model, part, first_noise(place, start, len(part)), config, precision)
            images.append(decode(place.model, latents, precision).numpy())
        return np.concatenate(images)

    return draw


def first_noise(place: World, start: int, count: int) -> torch.Tensor:
    return torch.stack([noise_of(place.shape, "benchmark", start + i) for i in range(count)])


def difference(images: Images, others: Images) -> dict[str, float]:
    """Return how far two ways' first images are apart, in steps of 255."""
    n = min(len(images), len(others))
    apart = np.abs(images[:n].astype(np.int16) - others[:n].astype(np.int16))
    return {"mean": round(float(apart.mean()), 4), "share_above_8": round(float((apart > 8).mean()), 5)}


def main(
    size: Annotated[str, typer.Option(help="emoji, sd15 or sdxl")] = "emoji",
    batch: Annotated[int, typer.Option(help="images per batch")] = 32,
    single: Annotated[int, typer.Option(help="images drawn one at a time")] = 2,
    repeats: Annotated[int, typer.Option(help="rounds")] = 5,
) -> None:
    """Measure and write results/sampling-<size>-<device>.json."""
    device = best_device()
    place, precision, compiled = world(size, device), fast_precision(device), device.type == "cuda"
    place.model.compile_for("auto", 10**9)

    def config(**options: Any) -> GenerateConfig:
        given = {"num_inference_steps": STEPS, "guidance_scale": place.guidance, "batch_size": batch, **options}
        return GenerateConfig.model_validate(given)

    half = torch.bfloat16 if precision == "bf16" else torch.float32
    exact = torch.float32 if device.type == "cpu" else half
    pndm = config(solver="pndm", num_inference_steps=DOCUMENTED)
    interval = config(guidance_interval=(0.2, 0.8))

    def in_batches(dtype: torch.dtype) -> Callable[[], Images]:
        return stock(place, "dpm-solver++", dtype, batch, batch, compiled)

    ways: dict[str, tuple[Callable[[], Images], int, GenerateConfig]] = {
        "stock, documented (PNDM 50, one at a time)": (stock(place, "pndm", exact, single, 1, False), single, pndm),
        "stock (DPM-Solver++ 20, batch)": (
            stock(place, "dpm-solver++", exact, batch, batch, compiled),
            batch,
            config(),
        ),
        "ours": (ours(place, config(), batch, precision), batch, config()),
        "ours, guidance in the middle 60 %": (ours(place, interval, batch, precision), batch, interval),
    }
    if exact != half:
        ways["stock (the same), in bfloat16"] = (
            stock(place, "dpm-solver++", half, batch, batch, compiled),
            batch,
            config(),
        )
        ways["ours, float32"] = (ours(place, config(), batch, "fp32"), batch, config())
    told = interleaved({name: way for name, (way, _, _) in ways.items()}, device, repeats)
    top = peaks(device)
    flops = {
        name: flops_per_image(place.model, place.shape, given, decoded=True) for name, (_, _, given) in ways.items()
    }
    counts = {name: count for name, (_, count, _) in ways.items()}
    rates(told, counts, flops, float(top["flops_per_second"]))
    reference = told["stock (DPM-Solver++ 20, batch)"]["last"]
    against = {
        name: speed_up(told["ours"], found, batch, counts[name]) for name, found in told.items() if name != "ours"
    }
    apart = {name: difference(found.pop("last"), reference) for name, found in told.items()}
    result = {"batch": batch, "peak": top, "ways": told, "ours_is_times_as_fast_as": against,
              "difference_to_stock_batch": apart}  # fmt: skip
    keep("sampling", size, result, device)
    for name, factor in against.items():
        console.print(f"ours is {factor:.2f} times as fast as: {name}", markup=False)


if __name__ == "__main__":
    typer.run(main)
