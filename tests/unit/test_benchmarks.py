"""The benchmarks measure what they say: rounds, ratios, differences, and a plain step that is ours done slowly."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.measure import interleaved, rates, speed_up
from benchmarks.sampling import difference
from benchmarks.training import Plain, data_of, trainer_of
from benchmarks.world import World
from spin import models
from tests import tiny

CPU = torch.device("cpu")


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    said: list[str] = []
    told = interleaved({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, CPU, repeats=2)
    assert said == ["a", "b"] * 3
    assert {name: len(found["seconds"]) for name, found in told.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_round_by_round() -> None:
    # A neighbour that makes the second round ten times slower changes neither ratio.
    fast, slow = {"seconds": [1.0, 10.0, 1.0]}, {"seconds": [3.0, 30.0, 3.0]}
    assert speed_up(fast, slow, 4, 4) == 3
    assert speed_up(fast, slow, 4, 2) == 6
    told = {"way": {"median": 2.0}}
    rates(told, {"way": 4}, {"way": 1e9}, 1e10)
    assert told == {"way": {"median": 2.0, "items_per_second": 2.0, "mfu": 0.2}}


def test_images_apart() -> None:
    one, other = np.zeros((2, 1, 1, 4), np.uint8), np.array([0, 0, 4, 20], np.uint8).reshape(1, 1, 1, 4)
    assert difference(one, other) == {"mean": 6.0, "share_above_8": 0.25}


def test_the_plain_step_learns_what_ours_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 and with the autoencoder's mean, both lose the same in every step: they do the same work."""
    model = models.load(tiny.base(tmp_path / "base"), CPU)
    place = World("tiny", None, model, tiny.RESOLUTION, 3.5)
    pixels = tuple(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (1, 2))
    ids = [f"p{i}" for i in range(8)]
    (tmp_path / "data").mkdir()
    data = data_of(tmp_path / "data", ids, place.prompts(8), *(model.encode(side) for side in pixels))
    ours = trainer_of(place, data, "fp32", False, batch_size=8, micro_batch_size=4, learning_rate=2e-5)
    plain = Plain(place, ours, (pixels[0], pixels[1]), half=False)
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    monkeypatch.setattr(Posterior, "sample", Posterior.mode)
    for _ in range(2):
        # Ours reads latents that were kept in float16.
        assert plain() == pytest.approx(ours.train_step()["loss"], rel=2e-3)
