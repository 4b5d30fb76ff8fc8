"""Means and win rates with bootstrap intervals over prompts."""

from dataclasses import asdict, dataclass

import numpy as np

AT_ONCE = 2**20
"""Prompts drawn at a time."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(per_prompt: np.ndarray, resamples: int, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Return the mean of ``per_prompt`` (float [P]) with its percentile bootstrap interval over prompts.

    Resampling prompts, not images, keeps several images of one prompt from passing as independent. The same ``seed``
    draws the same prompts for every iteration, so differences between rows are paired.
    """
    random, count = np.random.default_rng(seed), len(per_prompt)
    # Some at a time: all of them, with their values, could take gigabytes.
    rows = max(1, AT_ONCE // count)
    shares = (min(rows, resamples - start) for start in range(0, resamples, rows))
    means = np.concatenate([per_prompt[random.integers(count, size=(share, count))].mean(axis=1) for share in shares])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(per_prompt.mean()), float(low), float(high))


def bootstrap_seeds(per_seed: np.ndarray, resamples: int, seed: int = 0) -> Estimate:
    """Return the mean of ``per_seed`` (float [S, P]: training seeds, prompts) with its interval over both.

    Seeds and prompts are resampled independently, each draw serving all cells (crossed factors): a difference that
    only one training seed shows does not pass. With very few seeds the interval is too narrow, not too wide.
    """
    random = np.random.default_rng(seed)
    seeds = random.integers(per_seed.shape[0], size=(resamples, per_seed.shape[0]))
    prompts = random.integers(per_seed.shape[1], size=(resamples, per_seed.shape[1]))
    means = np.array([per_seed[s][:, p].mean() for s, p in zip(seeds, prompts, strict=True)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(per_seed.mean()), float(low), float(high))


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return per image 1 where ``ours`` is higher, 0.5 at a tie, else 0; images are paired by prompt and seed."""
    return np.where(ours > theirs, 1.0, np.where(ours == theirs, 0.5, 0.0))


def per_prompt(values: np.ndarray, images_per_prompt: int) -> np.ndarray:
    """Average [P * n] values, ordered by prompt, to [P]."""
    return values.reshape(-1, images_per_prompt).mean(axis=1)
