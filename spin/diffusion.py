"""The forward processes and the denoising error. Shapes: B pairs, C latent channels, H W latent height and width.

Latents are in the denoiser's own scale (the autoencoder's, standardised by its scaling factor). A process knows how
latents become noisy and what the network is to predict; the objectives see errors alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from diffusers import DDPMScheduler

from spin.errors import SpinError


def add_noise(
    latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor, alphas_cumprod_T: torch.Tensor
) -> torch.Tensor:
    """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, the forward process q(x_t | x_0) of DDPM (Eq. 4)."""
    alpha = alphas_cumprod_T.to(latents_BCHW.device)[timestep_B].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents_BCHW + (1 - alpha).sqrt() * noise_BCHW


def denoising_error(prediction_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the squared error of a prediction, float32 [B], *mean* over C, H, W.

    Always computed in float32: the loss takes differences of nearly equal errors times beta ~ 10^3, which a
    bfloat16 error would drown. beta depends on this reduction: for sums divide it by C*H*W.
    """
    return (prediction_BCHW.float() - target_BCHW.float()).pow(2).mean(dim=(1, 2, 3))


class Process(Protocol):
    """How a model family is trained: timesteps [B], noisy latents and the prediction's target [B, C, H, W]."""

    def to(self, device: torch.device) -> Self:
        """Return the process with its schedule on ``device``."""
        ...

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Draw one timestep, [1]."""
        ...

    def at(self, share_B: torch.Tensor) -> torch.Tensor:
        """Return the timesteps [B] below which lie these shares, in [0, 1), of what ``draw`` gives."""
        ...

    def noisy(self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        """Return x_t."""
        ...

    def target(self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        """Return what a perfect network would predict."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """DDPM's process with a network that predicts the noise (``epsilon``) or the velocity (``v_prediction``).

    v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans and Ho 2022). Its error is that of the noise times 1 + SNR, so a
    given beta acts more strongly on nearly clean timesteps than with epsilon.
    """

    alphas_cumprod: torch.Tensor
    prediction: str = "epsilon"

    def to(self, device: torch.device) -> Self:
        return type(self)(self.alphas_cumprod.to(device), self.prediction)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Uniform over all timesteps, int64."""
        return torch.randint(len(self.alphas_cumprod), (1,), generator=generator)

    def at(self, share_B: torch.Tensor) -> torch.Tensor:
        return (share_B * len(self.alphas_cumprod)).long()

    def noisy(self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        return add_noise(latents_BCHW, noise_BCHW, timestep_B, self.alphas_cumprod)

    def target(self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        if self.prediction == "epsilon":
            return noise_BCHW
        alpha = self.alphas_cumprod[timestep_B].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise_BCHW - (1 - alpha).sqrt() * latents_BCHW

    def noise_in(
        self, prediction_BCHW: torch.Tensor, noisy_BCHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the noise that a prediction claims to be in ``noisy_BCHW``."""
        if self.prediction == "epsilon":
            return prediction_BCHW
        alpha = self.alphas_cumprod[timestep_B].view(-1, 1, 1, 1)
        return alpha.sqrt() * prediction_BCHW + (1 - alpha).sqrt() * noisy_BCHW

    def min_snr_weight(self, timestep_B: torch.Tensor, limit: float) -> torch.Tensor:
        """min(SNR, limit) / SNR for epsilon, / (SNR + 1) for v; SNR = a_t / (1 - a_t) (Hang et al. 2023)."""
        alpha = self.alphas_cumprod[timestep_B]
        snr = alpha / (1 - alpha)
        return snr.clamp(max=limit) / (snr if self.prediction == "epsilon" else snr + 1)


@dataclass(frozen=True)
class Flow:
    """Rectified flow (SD3): x_t = (1 - sigma) x_0 + sigma noise, the network predicts noise - x_0.

    ``shift`` moves the uniform draw of sigma towards noise, as the model was trained (Esser et al. 2024, Eq. 23). The
    network is told the timestep sigma * 1000, as in diffusers' own training of SD3.
    """

    shift: float = 1.0
    timesteps: int = 1000

    def to(self, device: torch.device) -> Self:  # noqa: ARG002
        return self

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """sigma * timesteps, float32, sigma = shift u / (1 + (shift - 1) u) with u uniform in [0, 1)."""
        return self.at(torch.rand(1, generator=generator))

    def at(self, share_B: torch.Tensor) -> torch.Tensor:
        return self.timesteps * self.shift * share_B / (1 + (self.shift - 1) * share_B)

    def noisy(self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        sigma = (timestep_B / self.timesteps).view(-1, 1, 1, 1)
        return (1 - sigma) * latents_BCHW + sigma * noise_BCHW

    def target(self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return noise_BCHW - latents_BCHW


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
    return str(scheduler_config.get("_class_name", "")).startswith("FlowMatch")


def process_of(scheduler_config: Mapping[str, Any]) -> Diffusion | Flow:
    """Return the process that the model's scheduler belongs to.

    Raises:
        SpinError: the model predicts neither noise nor velocity, or its noise levels are no timesteps (EDM).
    """
    if is_flow(scheduler_config):
        # A shift that depends on the resolution is the sampler's; diffusers trains such a model unshifted.
        shift = 1.0 if scheduler_config.get("use_dynamic_shifting") else float(scheduler_config.get("shift", 1.0))
        return Flow(shift, int(scheduler_config.get("num_train_timesteps", 1000)))
    if (name := str(scheduler_config.get("_class_name", ""))).startswith("EDM"):
        raise SpinError(
            f"expected a model with the timesteps of DDPM or of a flow, got {name} (scheduler_config.json of the base "
            "model); choose another model"
        )
    prediction = str(scheduler_config.get("prediction_type", "epsilon"))
    if prediction not in ("epsilon", "v_prediction"):
        raise SpinError(
            f"expected a model with prediction_type 'epsilon' or 'v_prediction', got {prediction!r} "
            "(scheduler_config.json of the base model); choose another model"
        )
    # Models trained to zero terminal SNR end at a = 0, where no noise can be told from v; diffusers clamps there too.
    return Diffusion(DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod.clamp(min=2**-24), prediction)
