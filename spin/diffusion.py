"""The forward process and the denoising error. Shapes: B pairs, C latent channels, H W latent height and width.

Latents are in the denoiser's own scale (the autoencoder's, standardised by its scaling factor).
"""

from collections.abc import Mapping

import torch
from diffusers import DDPMScheduler

from spin.errors import SpinError


def alphas_cumprod(scheduler_config: Mapping[str, object]) -> torch.Tensor:
    """Return the cumulative signal share of the model's training schedule, float32 [T].

    Raises:
        SpinError: the model does not predict the noise (epsilon).
    """
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise SpinError(
            f"expected a model with prediction_type 'epsilon', got {prediction!r} (scheduler_config.json of the base "
            "model); choose an epsilon model such as SD-1.x"
        )
    return DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod


def add_noise(
    latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor, alphas_cumprod_T: torch.Tensor
) -> torch.Tensor:
    """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, the forward process q(x_t | x_0) of DDPM (Eq. 4)."""
    alpha = alphas_cumprod_T.to(latents_BCHW.device)[timestep_B].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents_BCHW + (1 - alpha).sqrt() * noise_BCHW


def min_snr_weight(timestep_B: torch.Tensor, alphas_cumprod_T: torch.Tensor, limit: float) -> torch.Tensor:
    """Return min(SNR, limit) / SNR of each timestep, float32 [B], SNR = a_t / (1 - a_t) (Hang et al. 2023, Eq. 6)."""
    alpha = alphas_cumprod_T[timestep_B]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=limit) / snr


def denoising_error(prediction_BCHW: torch.Tensor, noise_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the squared error of the predicted noise, float32 [B], *mean* over C, H, W.

    Always computed in float32: the loss takes differences of nearly equal errors times beta ~ 10^3, which a
    bfloat16 error would drown. beta depends on this reduction: for sums divide it by C*H*W.
    """
    return (prediction_BCHW.float() - noise_BCHW.float()).pow(2).mean(dim=(1, 2, 3))
