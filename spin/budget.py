"""What training costs, so that rivals get equal budgets: passes of one image through the denoiser.

A backward pass counts as two. Encoding, decoding and optimizer steps are left out: they are small beside them.
"""

from spin.config import GenerateConfig, RunConfig, TrainConfig

FORWARD, BACKWARD = 1, 2


def passes_per_pair(train: TrainConfig) -> int:
    """Return the passes that one training pair costs.

    - ``sft``: the winner forward and backward.
    - ``spin``, ``dpo``: both sides forward and backward by the player, forward by the reference.
    - ``exact-spin``: per trajectory step and side, the reference once, the player twice forward and once backward.
    """
    learnt = FORWARD + BACKWARD
    if train.objective == "sft":
        return learnt
    if train.objective == "exact-spin":
        return 2 * train.trajectory_steps * (learnt + 2 * FORWARD)
    return 2 * (learnt + FORWARD)


def passes_per_image(config: GenerateConfig) -> int:
    """Return the passes that one drawn image costs; a guided one counts twice."""
    # Pseudo-linear multistep methods begin with a second look at their first step.
    calls = config.num_inference_steps + (config.solver == "pndm")
    if config.solver == "edm":
        # Heun's method looks twice at every step but the last.
        calls = 2 * config.num_inference_steps - 1
    return calls + sum(config.guided(calls))


def passes(config: RunConfig, pairs: int, iterations: int) -> int:
    """Return the passes of a whole run on ``pairs`` training pairs: training, and drawing the losers before it."""
    train = config.train
    steps = sum(train.of(k)[1] for k in range(1, iterations + 1))
    drawn = sum(min(pairs, train.consumes(k)) for k in range(1, iterations + 1)) if train.needs_losers else 0
    drawn *= train.ranked_draws if train.ranks else 1
    return steps * train.batch_size * passes_per_pair(train) + drawn * passes_per_image(config.generate.of_losers)


def steps_for(config: RunConfig, pairs: int, budget: int) -> int:
    """Return the steps of a single iteration of ``config`` that cost at most ``budget`` passes, at least 1."""
    train = config.train
    drawing = pairs * passes_per_image(config.generate.of_losers) if train.needs_losers else 0
    return max(1, (budget - drawing) // (train.batch_size * passes_per_pair(train)))
