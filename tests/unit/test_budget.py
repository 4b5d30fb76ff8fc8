"""Equal budgets: what the passes are, counted by hand and on a real denoiser."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spin import models
from spin.budget import passes, passes_per_image, passes_per_pair, steps_for
from spin.config import RunConfig, override
from spin.data.dataset import Dataset, Latents
from spin.presets import preset
from spin.training import Trainer
from tests import tiny


def config(**train: object) -> RunConfig:
    options = {"steps": [10], "batch_size": 4, "micro_batch_size": 4, "decay_steps": 0, "warmup_steps": 0}
    return override(preset("emoji-cpu"), {"train": {**options, **train}})


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"objective": "sft"}, 3),
        ({}, 8),
        ({"objective": "dpo"}, 8),
        ({"objective": "exact-spin", "trajectory_steps": 5}, 50),
    ],
)
def test_passes_are_those_of_a_real_step(tmp_path: Path, train: dict[str, Any], expected: int) -> None:
    options = config(**train)
    assert passes_per_pair(options.train) == expected
    data = Dataset(tiny.dataset(tmp_path / "data", pairs=4))
    paired = options.train.needs_losers or options.train.needs_pairs
    losers = Latents([tiny.losers(tmp_path / "losers.safetensors", data.ids)]) if paired else None
    model = models.load(tiny.base(tmp_path / "base"), torch.device("cpu"))
    trainer = Trainer(model, data, losers, options.train, 1, "fp32")
    seen = []

    def count(_: object, given: tuple[torch.Tensor], __: object) -> None:
        seen.append(len(given[0]) * (3 if torch.is_grad_enabled() else 1))

    for denoiser in {trainer.player, trainer.reference}:
        denoiser.register_forward_hook(count)
    trainer.train_step()
    assert sum(seen) == expected * 4


def test_a_run_is_its_steps_and_its_losers() -> None:
    # 2 iterations of 10 and 20 steps, 4 pairs of 8 passes; losers of 20 steps, two passes for guidance: of the 40
    # pairs that the first trains on, and of all 60 in the second.
    assert passes(config(steps=[10, 20]), pairs=60, iterations=2) == 30 * 4 * 8 + (40 + 60) * 40
    unguided = override(config(steps=[10]), {"generate": {"opponent_guidance": 1}})
    assert passes(unguided, pairs=100, iterations=1) == 10 * 4 * 8 + 40 * 20
    assert passes(config(objective="sft"), pairs=100, iterations=1) == 10 * 4 * 3
    # 3 draws per prompt, of which two are learnt from.
    ranked = config(objective="dpo", pairs="ranked", ranked_draws=3)
    assert passes(ranked, pairs=100, iterations=1) == 10 * 4 * 8 + 3 * 40 * 40
    assert passes(config(objective="dpo"), pairs=100, iterations=1) == 10 * 4 * 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 40),
        ({"guidance_scale": 1}, 20),
        ({"guidance_interval": [0.25, 0.75]}, 30),
        ({"solver": "pndm", "num_inference_steps": 50}, 102),
        # 2 n - 1 looks, two passes each
        ({"solver": "edm", "num_inference_steps": 18}, 70),
        ({"solver": "edm", "num_inference_steps": 18, "guidance_scale": 1}, 35),
    ],
)
def test_passes_of_an_image(options: dict[str, Any], expected: int) -> None:
    assert passes_per_image(override(config(), {"generate": options}).generate) == expected


def test_steps_for_a_budget() -> None:
    budget = passes(config(), pairs=100, iterations=3)
    steps = steps_for(config(objective="sft"), 100, budget)
    assert steps == (3 * 10 * 4 * 8 + 3 * 40 * 40) // 12
    assert passes(config(objective="sft", steps=[steps]), 100, 1) <= budget
    assert steps_for(config(), 100, budget) == (budget - 4000) // 32
    assert steps_for(config(), 100, 0) == 1


@pytest.mark.parametrize("pairs", [40, 322, 100_000], ids=["drawn again", "all drawn", "more than are learnt from"])
@pytest.mark.parametrize("draws", [2, 4])
def test_ranked_draws_are_paid_from_the_budget(pairs: int, draws: int) -> None:
    budget = passes(config(steps=[200]), pairs=322, iterations=3)
    ranked = config(objective="dpo", pairs="ranked", ranked_draws=draws)
    steps = steps_for(ranked, pairs, budget)

    def spent(steps: int) -> int:
        return passes(config(objective="dpo", pairs="ranked", ranked_draws=draws, steps=[steps]), pairs, 1)

    assert 1 < spent(steps) <= budget < spent(steps + 1)
