"""Draw images with a model: batched, by any of diffusers' solvers, seeded per prompt."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from spin.config import GenerateConfig
from spin.diffusion import is_flow
from spin.errors import SpinError
from spin.families import Conditioning, latents_per_step
from spin.models import Model


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


SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm-solver++": (
        DPMSolverMultistepScheduler,
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "final_sigmas_type": "zero",
            "thresholding": False,
        },
    ),
    "ddim": (DDIMScheduler, {"clip_sample": False, "thresholding": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {"thresholding": False, "solver_type": "bh2"}),
    "deis": (DEISMultistepScheduler, {"algorithm_type": "deis", "solver_type": "logrho", "thresholding": False}),
    "euler": (EulerDiscreteScheduler, {}),
    # Karras et al. 2022, Algorithm 1 without noise: Heun's method on the noise levels of their Eq. 5.
    "edm": (
        HeunDiscreteScheduler,
        {
            "use_karras_sigmas": True,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "clip_sample": False,
            "timestep_spacing": "linspace",
        },
    ),
}
"""Schedulers of diffusion models by ``generate.solver``, with what must not be another one's setting."""


def scheduler_of(scheduler_config: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """Return the kind of scheduler that ``generate.solver`` means for a model, and what must not be another's setting.

    Raises:
        SpinError: a flow model is asked for another solver than Euler.
    """
    if not is_flow(scheduler_config):
        return SOLVERS["dpm-solver++" if name == "auto" else name]
    if name not in ("auto", "euler"):
        raise SpinError(f"expected generate.solver auto or euler for a flow model, got {name!r}; change it")
    # Noise that the solver draws itself would not be the prompt's own.
    return FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": False}


def solver(model: Model, config: GenerateConfig, side: int) -> Any:
    """Return the scheduler that draws latents ``side`` wide, its steps set.

    It stays on the CPU, whatever the model's device: its numbers are read there in every step.

    Raises:
        SpinError: a flow model is asked for another solver than Euler.
    """
    kind, options = scheduler_of(model.scheduler_config, config.solver)
    scheduler = kind.from_config(model.scheduler_config, **options)
    if not is_flow(model.scheduler_config):
        scheduler.set_timesteps(config.num_inference_steps)
        return scheduler
    shift = None
    if scheduler.config.use_dynamic_shifting:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        patches, given = (side // latents_per_step(model.denoiser)) ** 2, scheduler.config
        lengths = given.base_image_seq_len, given.max_image_seq_len
        shift = calculate_shift(patches, *lengths, given.base_shift, given.max_shift)
    scheduler.set_timesteps(config.num_inference_steps, mu=shift)
    return scheduler


# Not inference_mode: where a sharded player draws first, its gathers would leave tensors that autograd refuses.
@torch.no_grad()
def sample_latents(
    model: Model, prompts: Sequence[str], noise_BCHW: torch.Tensor, config: GenerateConfig, precision: str
) -> torch.Tensor:
    """Return the latents drawn for ``prompts`` from ``noise_BCHW``, float32 [B, C, H, W] in the denoiser's scale.

    Classifier-free guidance has both its halves in one denoiser call. For a compiled denoiser, fewer prompts than
    ``config.batch_size`` are padded to it, so that one shape serves all calls.

    Source: the paper's rebuttal (DPM-Solver, 20 steps, batch 64); equal to each family's stock pipeline (tests).
    """
    count = len(prompts)
    size = config.batch_size if model.compiled else count
    padded = [*prompts, *[""] * (size - count)]
    latents = torch.zeros(size, *noise_BCHW.shape[1:], device=model.device)
    latents[:count] = noise_BCHW
    scheduler = solver(model, config, latents.shape[-1])
    scaled = not is_flow(model.scheduler_config)
    if scaled:
        latents = latents * scheduler.init_noise_sigma
    guided = config.guided(len(scheduler.timesteps))
    with autocast(model.device, precision):
        prompted = both = model.embed(padded)
        if any(guided):
            both = Conditioning.cat([model.embed([""]).repeat(size), prompted])
        on_device = scheduler.timesteps.to(model.device)
        for timestep, told, twice in zip(scheduler.timesteps, on_device, guided, strict=True):
            model_input = scheduler.scale_model_input(latents, timestep) if scaled else latents
            if twice:
                model_input = torch.cat([model_input, model_input])
            prediction = model.predict(model.denoiser, model_input, told, both if twice else prompted).float()
            if twice:
                without, given = prediction.chunk(2)
                prediction = without + config.guidance_scale * (given - without)
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
