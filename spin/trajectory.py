"""The reverse process as a chain of Gaussian steps, and the exact objective on whole trajectories (Eq. 3.8).

Shapes: N steps, B pairs, C H W latents. Step i goes from ``timesteps[i]`` down to the next one; the last goes to
timestep 0, from where the image follows without noise, which adds nothing to any likelihood ratio.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from spin.losses import LINKS, Objective

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latents [B, C, H, W], timestep int64 [B]) -> predicted noise [B, C, H, W]; prompts are bound in."""


@dataclass(frozen=True)
class Chain:
    """Timesteps int64 [N], falling; per step the signal shares before and after, and the standard deviation [N]."""

    timesteps: torch.Tensor
    signal_before: torch.Tensor
    signal_after: torch.Tensor
    sigma: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def mean(self, step: int, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor) -> torch.Tensor:
        """Return mu(x_t), the mean of the next latents when ``noise_BCHW`` is believed to be in these (method 1.1)."""
        before, after, sigma = self.signal_before[step], self.signal_after[step], self.sigma[step]
        image = (latents_BCHW - (1 - before).sqrt() * noise_BCHW) / before.sqrt()
        return after.sqrt() * image + (1 - after - sigma**2).clamp(min=0).sqrt() * noise_BCHW

    def noise(self, step: int, latents_BCHW: torch.Tensor, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the noise that is in the latents before ``step`` if they were made from ``image_BCHW``."""
        before = self.signal_before[step]
        return (latents_BCHW - before.sqrt() * image_BCHW) / (1 - before).sqrt()


def chain_of(alphas_cumprod_T: torch.Tensor, steps: int, eta: float = 1.0) -> Chain:
    """Return the DDIM chain of ``steps`` evenly spaced timesteps; ``eta`` 1 is the ancestral (DDPM) process.

    Raises:
        ValueError: fewer than 1 or more steps than timesteps above 0, or ``eta`` outside (0, 1]: without noise the
            process has no density.
    """
    count = len(alphas_cumprod_T)
    if not 1 <= steps < count:
        raise ValueError(f"expected 1 to {count - 1} trajectory steps, got {steps}")
    if not 0 < eta <= 1:
        raise ValueError(f"expected eta in (0, 1], got {eta}")
    grid = torch.linspace(count - 1, 0, steps + 1).round().long().to(alphas_cumprod_T.device)
    before, after = alphas_cumprod_T[grid[:-1]].double(), alphas_cumprod_T[grid[1:]].double()
    sigma = eta * ((1 - after) / (1 - before) * (1 - before / after)).sqrt()
    return Chain(grid[:-1], before.float(), after.float(), sigma.float())


def transition_drift(
    chain: Chain,
    step: int,
    before_BCHW: torch.Tensor,
    after_BCHW: torch.Tensor,
    player_BCHW: torch.Tensor,
    reference_BCHW: torch.Tensor,
) -> torch.Tensor:
    """Return log p_reference - log p_player of one transition, float32 [B]; below 0: the player makes it likelier.

    ::

        ( |after - mu_player|^2 - |after - mu_reference|^2 ) / (2 sigma^2),   |.|^2 summed over C, H, W

    Written as a product of sum and difference: the two squares are nearly equal and each is as large as the number of
    latent values.
    """
    mu_player = chain.mean(step, before_BCHW, player_BCHW.float())
    mu_reference = chain.mean(step, before_BCHW, reference_BCHW.float())
    product = (mu_reference - mu_player) * (2 * after_BCHW - mu_player - mu_reference)
    return product.sum(dim=(1, 2, 3)) / (2 * chain.sigma[step] ** 2)


def real_trajectory(chain: Chain, image_BCHW: torch.Tensor, noise_NBCHW: torch.Tensor) -> list[torch.Tensor]:
    """Return the latents x_N, ..., x_0 [B, C, H, W] of real images: x_N ~ q(x_N | x), then q(x_i-1 | x_i, x).

    ``noise_NBCHW`` holds N + 1 draws: that of the first latents, then one per step.
    """
    first = chain.signal_before[0]
    latents = [first.sqrt() * image_BCHW + (1 - first).sqrt() * noise_NBCHW[0]]
    for step in range(len(chain)):
        noise = chain.noise(step, latents[-1], image_BCHW)
        latents.append(chain.mean(step, latents[-1], noise) + chain.sigma[step] * noise_NBCHW[step + 1])
    return latents


def exact_spin(
    player: Denoiser,
    reference: Denoiser,
    winner_BCHW: torch.Tensor,
    noise_NBCHW: torch.Tensor,
    chain: Chain,
    scale: float,
    link: str,
    accumulate: Callable[[Callable[[], torch.Tensor], bool], None] | None,
) -> Objective:
    """Exact SPIN, Eq. 3.8: the sum over the steps of both trajectories stands inside the link.

    ::

        drift_i = log p_reference(x_i-1 | x_i) - log p_player(x_i-1 | x_i)
        loss    = mean( link( scale * sum_i ( drift_i(loser) - drift_i(winner) ) ) )          scale: lambda of Eq. 3.8

    The losers' trajectories are the reference's own reverse process, drawn here from ``noise_NBCHW`` (nothing of them
    has to be stored between stages); the winners' come from the forward posterior, with the same draws.

    Plain autograd keeps the activations of all N steps, which the paper's rebuttal calls impractical. But the gradient
    of link(sum) is link'(sum) times the sum of gradients: a first pass without gradient gives the sum, a second one
    goes backward through one step at a time. Memory does not grow with N, but for the latents themselves: both
    trajectories wait in main memory; the noise stays on the device, and the winners' latents do in the first pass.
    Cost per step: the reference once, the player forward twice and backward once.

    The measure ``margin`` is in nats per trajectory; the errors are those of the predicted noise along the winners'
    trajectories, means over C, H, W and steps, as the approximate objective reports them.

    Args:
        scale: lambda of Eq. 3.8; method note: 0.009 to 0.023 answer the approximate loss at beta 2000 to 5000.
        accumulate: called once per step with a function that gives the step's share of the loss (a scalar with a
            graph, to go backward through) and whether it is the last step; ``None``: value alone.
    """
    device = winner_BCHW.device
    batch = len(winner_BCHW)
    with torch.no_grad():
        winner = real_trajectory(chain, winner_BCHW, noise_NBCHW)
        latents = torch.cat([winner[0], noise_NBCHW[0]])
        kept = [latents.cpu()]
        drift, errors = torch.zeros(2 * batch, device=device), torch.zeros(2, device=device)
        references = []
        for step in range(len(chain)):
            timestep = chain.timesteps[step].expand(2 * batch)
            seen_by_reference, seen = reference(latents, timestep).float(), player(latents, timestep).float()
            loser = chain.mean(step, latents[batch:], seen_by_reference[batch:])
            after = torch.cat([winner[step + 1], loser + chain.sigma[step] * noise_NBCHW[step + 1]])
            drift += transition_drift(chain, step, latents, after, seen, seen_by_reference)
            noise = chain.noise(step, winner[step], winner_BCHW)
            errors += torch.stack([(side[:batch] - noise).pow(2).mean() for side in (seen, seen_by_reference)])
            references.append(seen_by_reference.cpu())
            kept.append(after.cpu())
            latents = after
    del winner
    winner_drift_B, loser_drift_B = drift[:batch], drift[batch:]
    advantage_B = (scale * (loser_drift_B - winner_drift_B)).requires_grad_()
    loss = LINKS[link](advantage_B).mean()
    if accumulate is not None:
        (weight_B,) = torch.autograd.grad(loss, advantage_B)
        sides = torch.cat([-weight_B, weight_B]) * scale

        def share(step: int) -> torch.Tensor:
            before, after = kept[step].to(device), kept[step + 1].to(device)
            seen = player(before, chain.timesteps[step].expand(2 * batch)).float()
            return (sides * transition_drift(chain, step, before, after, seen, references[step].to(device))).sum()

        for step in range(len(chain)):
            accumulate(partial(share, step), step == len(chain) - 1)
    margin_B = (loser_drift_B - winner_drift_B).detach()
    return Objective(
        loss.detach(),
        {
            "loss": loss.detach(),
            "implicit_accuracy": (margin_B > 0).float().mean(),
            "margin": margin_B.mean(),
            "winner_drift": (errors[0] - errors[1]) / len(chain),
            "error_winner": errors[0] / len(chain),
            "reference_error_winner": errors[1] / len(chain),
        },
    )
