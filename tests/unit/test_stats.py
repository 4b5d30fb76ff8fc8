"""Means, win rates and bootstrap intervals."""

import tracemalloc

import numpy as np
import pytest

from spin.stats import Estimate, bootstrap, bootstrap_seeds, per_prompt, wins


def test_two_prompts_by_hand() -> None:
    # Resampled means are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: both 2.5 % tails lie on the extremes.
    assert bootstrap(np.array([0.0, 1.0]), 4000) == Estimate(0.5, 0.0, 1.0)


def test_equal_prompts_leave_no_doubt() -> None:
    assert bootstrap(np.full(7, 0.25), 50) == Estimate(0.25, 0.25, 0.25)


def test_one_prompt_has_an_interval_of_no_width() -> None:
    assert bootstrap(np.array([3.5]), 10) == Estimate(3.5, 3.5, 3.5)


def test_interval_of_many_normal_values() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(values, 4000)
    # 1.96 standard errors: 1.96 * std / sqrt(400)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert found.low < found.value < found.high


def test_same_seed_draws_the_same_prompts_so_rows_are_paired() -> None:
    values = np.random.default_rng(2).normal(size=30)
    one, shifted = bootstrap(values, 200), bootstrap(values + 2, 200)
    assert (shifted.low - one.low, shifted.high - one.high) == pytest.approx((2.0, 2.0))
    assert bootstrap(values, 200) == one
    assert bootstrap(values, 200, seed=1) != one


def test_drawing_some_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=37)
    draws = np.random.default_rng(3).integers(37, size=(1001, 37))
    whole = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    monkeypatch.setattr("spin.stats.AT_ONCE", 100)
    found = bootstrap(values, 1001, seed=3)
    assert [found.low, found.high] == pytest.approx(whole, abs=1e-12)


def test_memory_does_not_grow_with_the_resamples() -> None:
    tracemalloc.start()
    bootstrap(np.zeros(500), 20_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40 * 2**20


def test_seeds_that_disagree_widen_the_interval() -> None:
    prompts = np.random.default_rng(3).normal(size=50)
    agree, disagree = np.stack([prompts] * 3), np.stack([prompts - 1, prompts, prompts + 1])
    assert bootstrap_seeds(agree, 2000).value == pytest.approx(prompts.mean())
    narrow, wide = bootstrap_seeds(agree, 2000), bootstrap_seeds(disagree, 2000)
    # Variances add: that of the prompts' mean, and that of the mean of 3 draws from (-1, 0, 1), 2/9.
    spread = 1.96 * np.sqrt(prompts.var() / 50 + 2 / 9)
    assert (narrow.high - narrow.low) / 2 == pytest.approx(1.96 * prompts.std() / np.sqrt(50), rel=0.1)
    assert (wide.high - wide.low) / 2 == pytest.approx(spread, rel=0.15)


def test_wins_with_ties_at_one_half() -> None:
    assert wins(np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])).tolist() == [1.0, 0.5, 0.0]


def test_wins_against_itself_are_even() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert wins(values, values).mean() == 0.5
    other = np.random.default_rng(4).normal(size=50)
    assert (wins(values, other) + wins(other, values)).tolist() == [1.0] * 50


def test_images_of_a_prompt_are_averaged_first() -> None:
    # prompts: (1, 3), (5, 7)
    assert per_prompt(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [2.0, 6.0]
    assert per_prompt(np.array([1.0, 3.0]), 1).tolist() == [1.0, 3.0]


def test_as_dict() -> None:
    assert Estimate(1.0, 0.5, 1.5).as_dict() == {"value": 1.0, "low": 0.5, "high": 1.5}
