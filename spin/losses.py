"""The objectives: pure functions of per-pair denoising errors. B is the number of pairs; all tensors are float32 [B].

An error is the mean over C, H, W of the squared error of the predicted noise (``spin.diffusion.denoising_error``),
for the *same* timestep and noise on all four: player and reference, winner and loser.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Objective:
    """A loss to minimise and the quantities that tell how the game stands.

    Attributes:
        loss: scalar, the mean over pairs.
        measures: detached means over pairs, by name.
    """

    loss: torch.Tensor
    measures: dict[str, torch.Tensor]


def spin_loss(
    error_winner_B: torch.Tensor,
    error_loser_B: torch.Tensor,
    reference_error_winner_B: torch.Tensor,
    reference_error_loser_B: torch.Tensor,
    beta: float,
) -> Objective:
    """Approximate SPIN objective with the logistic link, Eq. 3.9 in its epsilon form.

    ::

        winner_drift = error_winner - reference_error_winner        (below 0: better on the real image)
        loser_drift  = error_loser  - reference_error_loser
        margin       = loser_drift - winner_drift
        loss         = mean( log(1 + exp(-beta/2 * margin)) )

    The convention for beta, once for the whole project: errors are *means* over C, H, W and beta carries a factor
    1/2, as in Diffusion-DPO's code; so the paper's 2000 and 5000 are used as they stand. With a player equal to its
    opponent the loss is ln 2 and its gradient is beta/4 * (grad error_winner - grad error_loser).

    The implicit accuracy (share of pairs with margin > 0) tells nothing about health: it nears 1 in runs that
    collapse. ``winner_drift`` does: a player that grows worse on real images wins by ruining both.
    """
    winner_drift_B = error_winner_B - reference_error_winner_B
    loser_drift_B = error_loser_B - reference_error_loser_B
    margin_B = loser_drift_B - winner_drift_B
    loss = -logsigmoid(0.5 * beta * margin_B).mean()
    return Objective(
        loss,
        {
            "loss": loss.detach(),
            "implicit_accuracy": (margin_B > 0).float().mean().detach(),
            "margin": margin_B.mean().detach(),
            "winner_drift": winner_drift_B.mean().detach(),
            "loser_drift": loser_drift_B.mean().detach(),
            "error_winner": error_winner_B.mean().detach(),
            "reference_error_winner": reference_error_winner_B.mean().detach(),
        },
    )


def sft_loss(error_winner_B: torch.Tensor) -> Objective:
    """Supervised fine-tuning: the denoising loss on the winners alone (Eq. 2.3), SPIN's baseline."""
    loss = error_winner_B.mean()
    return Objective(loss, {"loss": loss.detach(), "error_winner": loss.detach()})
