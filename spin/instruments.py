"""Instruments on pairs that are never trained on, and the verdict on an iteration that follows from them.

The paper's theory ends the game where the player's denoising error on real images can fall no further (Theorem 4.2).
That error is measured on a fixed grid: always the same held-out images, timesteps and noise, so that two networks
differ by their weights alone. Shapes: N images, T timesteps, B pairs in one pass, C H W latents.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spin.seeding import noise_of
from spin.sharding import part
from spin.stats import bootstrap
from spin.training import Batch, Diverged, Trainer, order

Verdict = Literal["improved", "converged", "diverged"]

GRID = 8
"""Timesteps of the grid: the middles of as many equal parts of the range that training draws from."""
FEWEST_IMAGES = 4
"""With fewer held-out images an interval says nothing, and there is no verdict."""
GRADIENTS = 8
"""Micro-batches behind the gradient's signal-to-noise ratio, over all processes (at least one each)."""
RESAMPLES = 2000
HARM = 0.01
"""The held-out error may rise by this share before an iteration counts as diverged."""


@dataclass(frozen=True)
class GridErrors:
    """Denoising errors on the grid, float32 [N, T]; ``loser`` is ``None`` where the held-out prompts have none."""

    timesteps: tuple[float, ...]
    winner: torch.Tensor
    loser: torch.Tensor | None


@torch.no_grad()
def errors_on_grid(trainer: Trainer) -> GridErrors:
    """Return the player's errors on the held-out pairs; several processes share the images.

    Raises:
        Diverged: an error is no finite number.
    """
    accelerator, data, losers = trainer.accelerator, trainer.winners, trainer.losers
    device, size = trainer.model.device, trainer.micro_batch_size
    rows = data.validation
    paired = losers is not None and all(row.id in losers for row in rows)
    middles = (torch.arange(GRID) + 0.5) / GRID
    timesteps = trainer.process.at(middles.to(device))
    denoiser = accelerator.unwrap_model(trainer.player)
    # Each process fills in its own images, zeros elsewhere; the sum is the whole grid. All go through equally many
    # images, since sharded weights are gathered by all: who has none left repeats some, into rows that are cut off.
    filled = math.ceil(len(rows) / accelerator.num_processes) * accelerator.num_processes
    errors = torch.zeros(2, filled, GRID, device=device)
    mine = range(accelerator.process_index, filled, accelerator.num_processes)
    for start in range(0, len(mine), size):
        places = list(mine[start : start + size])
        shown = [rows[place % len(rows)] for place in places]
        ids = [row.id for row in shown]
        winner = data.winners(ids).to(device)
        loser = losers.of(ids).to(device) if paired and losers is not None else None
        conditioning = trainer.embed([row.prompt for row in shown])
        for column in range(GRID):
            noise = torch.stack([noise_of(data.latents_shape, "held-out", id, column) for id in ids]).to(device)
            timestep = timesteps[column].repeat(len(ids))
            pair = Batch(winner, loser, noise, noise, timestep, conditioning)
            for side, error in enumerate(trainer.errors(denoiser, pair)):
                if error is not None:
                    errors[side, places, column] = error
    errors = accelerator.reduce(errors, "sum").cpu()[:, : len(rows)]
    if not errors.isfinite().all():
        raise Diverged("expected finite errors on held-out images, got none; lower train.learning_rate")
    return GridErrors(tuple(float(t) for t in timesteps), errors[0], errors[1] if paired else None)


def gradient_snr(trainer: Trainer) -> float | None:
    """Return |mean g|^2 / (tr Cov(g) / n) over n micro-batches at the opponent's weights: about 1 is noise alone.

    ``None`` where the micro-batches do not differ, or training has no two of them. Processes that share their weights
    out add up every gradient before they see it: then a micro-batch is that of all of them together.

    To be asked before the first step, when the player is its opponent. The buffer for the mean is as large as one of
    the optimizer's moments, which do not exist yet.
    """
    accelerator, size = trainer.accelerator, trainer.micro_batch_size
    processes, sharded = accelerator.num_processes, trainer.sharded
    parameters = list(trainer.weights().values())
    total = [torch.zeros_like(part(parameter)) for parameter in parameters]
    squares = torch.zeros((), device=trainer.model.device)
    rounds = max(2 if sharded else 1, math.ceil(GRADIENTS / processes))
    # Pairs that training will not reach may have no loser.
    rounds = min(rounds, trainer.config.consumes(trainer.iteration) // (processes * size))
    n = rounds if sharded else rounds * processes
    if n < 2:
        return None
    places = order(trainer.winners.ids, trainer.config.seed, trainer.iteration, 0, rounds * processes * size)
    mine = places[accelerator.process_index :: processes]
    for start in range(0, len(mine), size):
        trainer.learn(trainer.batch(mine[start : start + size]), last=sharded)
        for parameter, running in zip(parameters, total, strict=True):
            if parameter.grad is not None:
                running += part(parameter.grad)
                squares += part(parameter.grad).square().sum()
        trainer.optimizer.zero_grad(set_to_none=True)
    squares = accelerator.reduce(squares, "sum")
    if sharded:
        mean = torch.stack([(running / n).square().sum() for running in total]).sum()
        mean_square = float(accelerator.reduce(mean, "sum"))
    else:
        mean_square = sum(float((accelerator.reduce(running, "sum") / n).square().sum()) for running in total)
    variance = (float(squares) - n * mean_square) / (n - 1)
    return mean_square / (variance / n) if variance > 0 else None


def measure(opponent: GridErrors, player: GridErrors) -> dict[str, Any]:
    """Return what changed from opponent to player, with 95 % intervals over held-out images.

    ``error_change``: of the real images' error, as a share of the opponent's (below 0: better). With losers also
    ``implicit_accuracy``, the share of (image, timestep) with a margin above 0, and ``margin`` in units of the error.
    ``by_timestep`` holds the means of each column of the grid.
    """
    change = (player.winner - opponent.winner) / opponent.winner.mean()
    found: dict[str, torch.Tensor] = {"error_change": change}
    if player.loser is not None and opponent.loser is not None:
        margin = (player.loser - opponent.loser) - (player.winner - opponent.winner)
        found |= {"implicit_accuracy": (margin > 0).float(), "margin": margin}
    overall = {name: bootstrap(values.mean(1).numpy(), RESAMPLES).as_dict() for name, values in found.items()}
    columns = {
        f"{timestep:04.0f}": {name: float(values[:, column].mean()) for name, values in found.items()}
        for column, timestep in enumerate(player.timesteps)
    }
    return {**overall, "images": len(change), "by_timestep": columns}


def verdict(measures: dict[str, Any], chosen: int | None = None) -> tuple[Verdict, str]:
    """Return the verdict on an iteration and its reason, one line that ends with the rule that decided.

    Where a held-out score chose the player, that score decides: ``improved``, or ``converged`` where no step was better
    than the opponent. The error is told beside it: it rises in a long fine-tuning whose images still get better.
    ``chosen`` is that step, 0 for the opponent itself. Else:

    - ``diverged``: the held-out real images' error rose, surely, by more than ``HARM``.
    - ``improved``: it fell, surely; or the player surely tells unseen real images from its opponent's better than by
      chance, and their error did not surely rise by that much. Also with fewer than ``FEWEST_IMAGES``: play goes on.
    - ``converged``: neither; a next iteration would play against the same opponent.

    "Surely" means that the 95 % interval lies on that side. The accuracy alone is no proof: it nears 1 in runs that
    ruin real images, but the losers faster. Training may have called an iteration diverged before (``Diverged``).
    """
    change, accuracy = measures["error_change"], measures.get("implicit_accuracy")
    told = f"error on {measures['images']} held-out real images {_percent(change, signed=True)}"
    if accuracy:
        told += f", told from the opponent's {_percent(accuracy)}"
    if chosen is not None:
        scored = f"best score at step {chosen}" if chosen else "no step scored better than the opponent"
        return "improved" if chosen else "converged", f"{scored}, {told}"
    if measures["images"] < FEWEST_IMAGES:
        return "improved", f"{told}: too few images to tell, raise data.held_out_share"
    if change["low"] > HARM:
        return "diverged", f"{told}: the error surely rose by more than {100 * HARM:.0f} %"
    if change["high"] < 0:
        return "improved", f"{told}: the error surely fell"
    if accuracy and accuracy["low"] > 0.5:
        return "improved", f"{told}: told apart surely better than by chance"
    return "converged", f"{told}: no sure change"


def _percent(estimate: dict[str, float], signed: bool = False) -> str:
    value, low, high = (format(100 * estimate[name], "+.1f" if signed else ".1f") for name in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"
