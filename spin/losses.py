"""The objectives: pure functions of per-pair denoising errors. B is the number of pairs; all tensors are float32 [B].

An error is the mean over C, H, W of the squared error of the predicted noise (``spin.diffusion.denoising_error``),
for the *same* timestep and noise on all four: player and reference, winner and loser.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

MAX_EXPONENT = 10.0


def logistic(advantage_B: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(-u)): the paper's link. Its slope fades where a pair is won, so no pair can dominate.

    Trap: with a large beta every margin is won at once (loss near 0) and nothing is learnt from then on.
    """
    return softplus(-advantage_B)


def hinge(advantage_B: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - u): the slope is constant up to a margin of 1 and exactly 0 beyond it.

    Trap: pairs past the margin give no gradient at all; with none left the step is weight decay alone.
    """
    return (1 - advantage_B).clamp(min=0)


def correlation(advantage_B: torch.Tensor) -> torch.Tensor:
    """-u: denoising loss on the real image minus that on the opponent's.

    Trap: unbounded below. The loser's error can be raised for ever, so it needs few steps and the winner's alarm.
    """
    return -advantage_B


def exponential(advantage_B: torch.Tensor) -> torch.Tensor:
    """exp(-u), continued as a straight line below u = -10, so that one bad pair cannot overflow the step.

    Trap: the worst pairs dominate the gradient; a single mislabelled pair weighs e^u times a balanced one.
    """
    bounded_B = (-advantage_B).clamp(max=MAX_EXPONENT)
    beyond_B = (-advantage_B - MAX_EXPONENT).clamp(min=0)
    return bounded_B.exp() * (1 + beyond_B)


LINKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "logistic": logistic,
    "hinge": hinge,
    "correlation": correlation,
    "exponential": exponential,
}
"""Links: decreasing, convex functions of the advantage u = beta/2 * margin, [B] -> [B] (Assumption 4.1)."""


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
    link: str = "logistic",
    loser_gradient_scale: float = 1.0,
) -> Objective:
    """Approximate SPIN objective, Eq. 3.9 in its epsilon form.

    ::

        winner_drift = error_winner - reference_error_winner        (below 0: better on the real image)
        loser_drift  = error_loser  - reference_error_loser
        margin       = loser_drift - winner_drift
        loss         = mean( link(beta/2 * margin) )                (logistic: log(1 + exp(-beta/2 * margin)))

    The convention for beta, once for the whole project: errors are *means* over C, H, W and beta carries a factor
    1/2, as in Diffusion-DPO's code; so the paper's 2000 and 5000 are used as they stand. With a player equal to its
    opponent the logistic loss is ln 2 and its gradient is beta/4 * (grad error_winner - grad error_loser).

    The implicit accuracy (share of pairs with margin > 0) tells nothing about health: it nears 1 in runs that
    collapse. ``winner_drift`` does: a player that grows worse on real images wins by ruining both.
    """
    if loser_gradient_scale < 1:
        # The same value with a smaller slope.
        error_loser_B = error_loser_B.detach() + loser_gradient_scale * (error_loser_B - error_loser_B.detach())
    winner_drift_B = error_winner_B - reference_error_winner_B
    loser_drift_B = error_loser_B - reference_error_loser_B
    margin_B = loser_drift_B - winner_drift_B
    loss = LINKS[link](0.5 * beta * margin_B).mean()
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
