"""Draw images with a model: batched, one padded shape, seeded per prompt."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from spin.config import GenerateConfig
from spin.diffusion import is_flow
from spin.families import Conditioning, latents_per_step
from spin.models import Model

DPM_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "thresholding": False,
}
"""What DPM-Solver++ is asked for beside the model's own noise schedule."""


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context in which a denoiser computes; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def fast_precision(device: torch.device) -> str:
    """Return ``bf16`` where the hardware multiplies it natively, else ``fp32`` (emulated bfloat16 is far slower)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    return "fp32"


def solver(model: Model, steps: int, side: int) -> Any:
    """Return the scheduler that draws ``steps`` steps of latents ``side`` wide: DPM-Solver++, or Euler for a flow.

    Neither scales the first noise or the denoiser's input.
    """
    scheduler: Any
    if not is_flow(model.scheduler_config):
        scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler_config, **DPM_SOLVER)
        scheduler.set_timesteps(steps, device=model.device)
        return scheduler
    # Noise that the solver draws itself would not be the prompt's own.
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler_config, stochastic_sampling=False)
    shift = None
    if scheduler.config.use_dynamic_shifting:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        patches, given = (side // latents_per_step(model.denoiser)) ** 2, scheduler.config
        lengths = given.base_image_seq_len, given.max_image_seq_len
        shift = calculate_shift(patches, *lengths, given.base_shift, given.max_shift)
    scheduler.set_timesteps(steps, device=model.device, mu=shift)
    return scheduler


@torch.inference_mode()
def sample_latents(
    model: Model, prompts: Sequence[str], noise_BCHW: torch.Tensor, config: GenerateConfig, precision: str
) -> torch.Tensor:
    """Return the latents drawn for ``prompts`` from ``noise_BCHW``, float32 [B, C, H, W] in the denoiser's scale.

    DPM-Solver++ (Euler for a flow) with classifier-free guidance, both halves of the guidance in one denoiser call.
    Fewer prompts than ``config.batch_size`` are padded to it, so one shape serves all calls.

    Source: the paper's rebuttal (DPM-Solver, 20 steps, batch 64); equal to each family's stock pipeline (tests).
    """
    count, size = len(prompts), config.batch_size
    guided = config.guidance_scale > 1
    padded = [*prompts, *[""] * (size - count)]
    latents = torch.zeros(size, *noise_BCHW.shape[1:], device=model.device)
    latents[:count] = noise_BCHW
    scheduler = solver(model, config.num_inference_steps, latents.shape[-1])
    with autocast(model.device, precision):
        conditioning = model.embed(padded)
        if guided:
            conditioning = Conditioning.cat([model.embed([""]).repeat(size), conditioning])
        for timestep in scheduler.timesteps:
            model_input = torch.cat([latents, latents]) if guided else latents
            prediction = model.predict(model.denoiser, model_input, timestep, conditioning).float()
            if guided:
                empty, prompted = prediction.chunk(2)
                prediction = empty + config.guidance_scale * (prompted - empty)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents[:count].float()


@torch.inference_mode()
def decode(model: Model, latents_BCHW: torch.Tensor, precision: str) -> torch.Tensor:
    """Return images, uint8 [B, H, W, 3]."""
    with autocast(model.device, precision):
        return model.decode(latents_BCHW)


@torch.inference_mode()
def roundtrip(model: Model, latents_BCHW: torch.Tensor, precision: str) -> torch.Tensor:
    """Decode to 8-bit pixels and encode again: the way a winner's latents were made."""
    images = decode(model, latents_BCHW, precision)
    with autocast(model.device, precision):
        return model.encode(images.permute(0, 3, 1, 2).float() / 127.5 - 1)


def batches(count: int, size: int) -> list[range]:
    """Split ``count`` items into consecutive ranges of ``size`` (the last one may be shorter)."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def shard_batches(count: int, size: int, shard: int, shards: int) -> Iterator[range]:
    """Yield the batches of ``shard``.

    Batches are cut before they are dealt to shards: their make-up, and so every image to the last bit, does not depend
    on the number of shards.
    """
    yield from batches(count, size)[shard::shards]
