"""What training costs, so that rivals get equal budgets: passes of one image through the denoiser.

A backward pass counts as two. Encoding, decoding and optimizer steps are left out: they are small beside them.
"""

from spin.config import RunConfig

FORWARD, BACKWARD = 1, 2


def passes_per_pair(config: RunConfig) -> int:
    """Return the passes that one training pair costs.

    - ``sft``: the winner forward and backward.
    - ``spin``, ``dpo``: both sides forward and backward by the player, forward by the reference.
    - ``exact-spin``: per trajectory step and side, the reference once, the player twice forward and once backward.
    """
    train = config.train
    learnt = FORWARD + BACKWARD
    if train.objective == "sft":
        return learnt
    if train.objective == "exact-spin":
        return 2 * train.trajectory_steps * (learnt + 2 * FORWARD)
    return 2 * (learnt + FORWARD)


def passes(config: RunConfig, pairs: int, iterations: int) -> int:
    """Return the passes of a whole run on ``pairs`` training pairs: training, and drawing the losers before it."""
    train = config.train
    steps = sum(train.of(k)[1] for k in range(1, iterations + 1))
    drawn = iterations * pairs * (train.ranked_draws if train.ranks else 1) if train.needs_losers else 0
    per_image = config.generate.num_inference_steps * (2 if config.generate.of_losers.guidance_scale > 1 else 1)
    return steps * train.batch_size * passes_per_pair(config) + drawn * per_image


def steps_for(config: RunConfig, pairs: int, budget: int) -> int:
    """Return the steps of a single iteration of ``config`` that cost at most ``budget`` passes, at least 1."""
    train = config.train
    drawing = passes(config, pairs, 1) - train.of(1)[1] * train.batch_size * passes_per_pair(config)
    return max(1, (budget - drawing) // (train.batch_size * passes_per_pair(config)))
