"""What a stage costs in the hardware's terms: FLOPs counted once per shape, and their share of its peak (MFU).

FLOPs are those of the method (two per multiply-add): a backward pass counts as two forward ones, whatever is computed
again. The peak is a large matrix product's rate, measured in the same process and in the same precision.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from spin.budget import passes_per_image, passes_per_pair
from spin.config import GenerateConfig, TrainConfig
from spin.models import Model

PEAK_SECONDS = 0.2
"""Time spent on measuring the peak, beside warming up."""
PEAK_SIDE = {"cuda": 8192, "cpu": 1024}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The CPU's fused attention is not among those that the counter knows.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@torch.inference_mode()
def flops_of(work: Callable[[], object]) -> int:
    """Return the FLOPs of ``work``'s matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


def flops_per_pass(model: Model, shape: tuple[int, ...]) -> int:
    """Return the FLOPs of one image's latents (C, H, W) through the denoiser, forward."""
    latents, timestep = torch.zeros(1, *shape, device=model.device), torch.zeros((), device=model.device)
    conditioning = model.embed(["a"])
    # The plain forward: what is compiled shows the counter nothing.
    return flops_of(lambda: model.predict(model.denoiser.forward, latents, timestep, conditioning))


def flops_per_decode(model: Model, shape: tuple[int, ...]) -> int:
    """Return the FLOPs of one image's latents (C, H, W) through the autoencoder's decoder."""
    return flops_of(lambda: model.vae.decode(torch.zeros(1, *shape, device=model.device)))


def flops_per_encode(model: Model, shape: tuple[int, ...]) -> int:
    """Return the FLOPs of one image, as large as latents (C, H, W) say, through the autoencoder's encoder."""
    side = shape[-1] * model.scale_factor
    return flops_of(lambda: model.vae.encode(torch.zeros(1, 3, side, side, device=model.device)))


def flops_per_image(model: Model, shape: tuple[int, ...], config: GenerateConfig, decoded: bool) -> int:
    """Return the FLOPs of drawing one image: to pixels (``decoded``), or to latents after the config's roundtrip."""
    flops = passes_per_image(config) * flops_per_pass(model, shape)
    if decoded:
        return flops + flops_per_decode(model, shape)
    return flops + (flops_per_decode(model, shape) + flops_per_encode(model, shape) if config.roundtrip else 0)


def flops_per_pair(model: Model, shape: tuple[int, ...], config: TrainConfig) -> int:
    """Return the FLOPs of training on one pair of latents (C, H, W)."""
    return passes_per_pair(config) * flops_per_pass(model, shape)


@cache
def peak(device: str, precision: str) -> float:
    """Return the FLOP/s of a large matrix product on a device type in a precision, measured once a process."""
    side = PEAK_SIDE.get(device, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def seconds(repeats: int) -> float:
        if device != "cpu":
            torch.accelerator.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            one @ other
        if device != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - started) / repeats

    with torch.inference_mode():
        seconds(2)
        fastest, until = seconds(1), time.monotonic() + PEAK_SECONDS
        while time.monotonic() < until:
            fastest = min(fastest, seconds(3))
    return 2 * side**3 / fastest


def cost(peak_flops: float, flops_per_item: int, items: int, seconds: float, accelerators: int) -> dict[str, float]:
    """Return a stage's cost: ``flops``, ``peak_flops`` of one accelerator, ``mfu``, ``items_per_second``.

    Args:
        peak_flops: FLOP/s, as ``peak`` says.
        seconds: the stage's wall time, loading and storing included.
        accelerators: those that the stage's pod holds, busy or not; a CPU counts as one.
    """
    flops = float(flops_per_item * items)
    seconds, accelerators = max(seconds, 1e-3), max(1, accelerators)
    return {
        "flops": flops,
        "peak_flops": peak_flops,
        "mfu": flops / (seconds * accelerators * peak_flops),
        "items_per_second": items / seconds,
        "accelerator_hours": seconds * accelerators / 3600,
    }
