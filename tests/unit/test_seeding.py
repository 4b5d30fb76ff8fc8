"""Random numbers belong to their name: the same for everyone, different for every name."""

import random

import pytest
import torch

from spin.seeding import generator_of, noise_of, seed_of


def test_golden_seed() -> None:
    # printf '5:noise1:01:11:x' | sha256sum -> a54ab60395a713dd...; 0xa54ab60395a713dd >> 1
    assert seed_of("noise", 0, 1, "x") == 5955266145523304942


def test_golden_noise() -> None:
    # Recorded: a change here would change every image and every training run, and forbid resuming old ones.
    assert noise_of((4,), "noise", 0, 1, "x").tolist() == pytest.approx(
        [-0.4393559993, 0.5788724422, 0.7840771675, -0.1717013717], abs=1e-6
    )


def test_seeds_fit_a_signed_integer_of_64_bits() -> None:
    seeds = [seed_of(i) for i in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61


def test_no_collisions_over_iterations_and_ids() -> None:
    names = [("generate", 0, iteration, f"{id}") for iteration in range(1, 21) for id in range(1000)]
    assert len({seed_of(*name) for name in names}) == 20_000


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        (("a", "b"), ("ab",)),
        (("a", ""), ("", "a")),
        (("a",), ("a", "")),
        ((1, 12), (11, 2)),
        (("1:a",), ("a",)),
        (("train", 0), ("timestep", 0)),
    ],
)
def test_parts_are_kept_apart(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert seed_of(*one) != seed_of(*other)
    assert not torch.equal(noise_of((8,), *one), noise_of((8,), *other))


def test_names_beyond_ascii() -> None:
    assert seed_of("é") != seed_of("e")
    assert seed_of("火") == seed_of("火")


def test_noise_is_independent_of_the_order_of_calls() -> None:
    names = [("noise", i) for i in range(6)]
    first = {name: noise_of((2, 3), *name) for name in names}
    random.Random(0).shuffle(names)
    torch.manual_seed(7)
    again = {name: noise_of((2, 3), *name) for name in names}
    assert all(torch.equal(first[name], again[name]) for name in names)


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.randn(2)
    torch.manual_seed(3)
    noise_of((5,), "x")
    generator_of("x").seed()
    assert torch.equal(torch.randn(2), wanted)


def test_noise_is_standard_normal_float32() -> None:
    noise = noise_of((100, 100), "moments")
    assert noise.dtype == torch.float32
    # 10,000 draws: standard errors 0.01 of the mean, 0.007 of the deviation; bounds of 4 of them
    assert abs(float(noise.mean())) < 0.04
    assert abs(float(noise.std()) - 1) < 0.028
