"""What training costs, so that rivals get equal budgets: passes of one image through the denoiser.

A backward pass counts as two. Encoding, decoding and optimizer steps are left out: they are small beside them. Equal
passes are not equal seconds: a pass within a large batch, or without gradients, is faster than another.
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


def passes_in(config: RunConfig, pairs: int, iteration: int) -> int:
    """Return the passes of one ``iteration`` on ``pairs`` training pairs: training, and drawing the losers before it.

    Drawing for validation and for scores is left out: how often a player is validated depends on how it fares.
    """
    train = config.train
    steps = train.of(iteration)[1]
    return steps * train.batch_size * passes_per_pair(train) + min(pairs, train.consumes(iteration)) * _drawing(config)


def passes(config: RunConfig, pairs: int, iterations: int) -> int:
    """Return the passes of a whole run: see ``passes_in``."""
    return sum(passes_in(config, pairs, k) for k in range(1, iterations + 1))


def steps_for(config: RunConfig, pairs: int, budget: int) -> int:
    """Return the steps of a single iteration of ``config`` that cost at most ``budget`` passes, at least 1."""
    drawing, learning = _drawing(config), passes_per_pair(config.train)
    batch = config.train.batch_size
    # Either every pair is drawn, or there are so few steps that each trains on pairs of its own.
    return max(1, (budget - pairs * drawing) // (batch * learning), budget // (batch * (learning + drawing)))


def _drawing(config: RunConfig) -> int:
    """Return the passes that drawing costs for each pair that is trained on at least once."""
    train = config.train
    if not train.needs_losers:
        return 0
    return (train.ranked_draws if train.ranks else 1) * passes_per_image(config.generate.of_losers)
