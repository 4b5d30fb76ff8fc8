"""What MLflow serves draws what spin's own sampler draws from the same noise."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from mlflow.exceptions import MlflowException
from PIL import Image

from spin import models
from spin.config import MOST_GUIDANCE, GenerateConfig
from spin.sampling import SOLVERS, decode, sample_latents
from spin.served_player import Player, guidance_at
from spin.stages.register import solver_of
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = ["red cat", "a hat"]
SEED = 7
TOLERANCE = 1
"""Of 255, after the same sums in float32 in another grouping."""


def config(**options: Any) -> GenerateConfig:
    # An untrained denoiser hardly hears the prompt: so much guidance makes it heard.
    return GenerateConfig.model_validate({"num_inference_steps": 4, "guidance_scale": 300, **options})


def served(folder: Path, drawn: GenerateConfig, **params: Any) -> np.ndarray:
    """Return what a server answers that was told how the scored images were drawn, float [B, H, W, 3]."""
    solver = solver_of(drawn, models.scheduler_config(folder))
    player = Player()
    player.load_context(
        SimpleNamespace(
            artifacts={"player": str(folder)}, model_config={"resolution": tiny.RESOLUTION, "solver": solver}
        )
    )
    asked = {"num_inference_steps": drawn.num_inference_steps, "guidance_scale": drawn.guidance_scale, "seed": SEED}
    answer = player.predict(None, pd.DataFrame({"prompt": PROMPTS}), asked | params)
    return np.stack([np.asarray(Image.open(io.BytesIO(data)), float) for data in answer["image"]])


def scored(folder: Path, family: str, drawn: GenerateConfig) -> np.ndarray:
    """Return what the sampler draws from the server's noise."""
    noise = torch.randn(1, *tiny.latents_shape(family), generator=torch.Generator().manual_seed(SEED))
    model = models.load(folder, CPU)
    latents = sample_latents(model, PROMPTS, noise.repeat(len(PROMPTS), 1, 1, 1), drawn, "fp32")
    return decode(model, latents, "fp32").numpy().astype(float)


def off(one: np.ndarray, other: np.ndarray) -> float:
    return float(abs(one - other).max())


@pytest.mark.parametrize("interval", [(0, 1), (0.25, 0.75), (0.5, 1), (0, 0)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_guidance_acts_where_it_did_when_the_player_was_scored(
    made: Callable[[str], Path], family: str, interval: tuple[float, float]
) -> None:
    drawn = config(guidance_interval=interval)
    found = served(made(family), drawn)
    assert off(found, scored(made(family), family, drawn)) <= TOLERANCE
    if interval != (0, 1):
        assert off(found, scored(made(family), family, config())) > 50 * TOLERANCE


@pytest.mark.parametrize("name", SOLVERS)
def test_guidance_acts_in_the_same_calls_of_every_solver(made: Callable[[str], Path], name: str) -> None:
    drawn = config(solver=name, guidance_interval=(0.2, 0.6))
    found = served(made("sd1"), drawn)
    assert off(found, scored(made("sd1"), "sd1", drawn)) <= TOLERANCE
    assert off(found, scored(made("sd1"), "sd1", config(solver=name))) > 50 * TOLERANCE


def test_a_request_without_guidance_has_none(made: Callable[[str], Path]) -> None:
    plain = scored(made("sd1"), "sd1", config(guidance_scale=1))
    assert off(served(made("sd1"), config(guidance_interval=(0.25, 0.75)), guidance_scale=1), plain) <= TOLERANCE


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75), (0.1, 0.3), (0.3, 0.3), (1 / 3, 2 / 3)])
def test_the_calls_that_are_guided_are_the_samplers(interval: tuple[float, float]) -> None:
    for calls in range(1, 60):
        ours = [guidance_at(call, calls, 7.5, interval) == 7.5 for call in range(calls)]
        assert ours == config(guidance_interval=interval).guided(calls)


def test_a_flow_draws_no_noise_of_its_own(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made("sd3"), tmp_path / "base")
    FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True).save_pretrained(folder / "scheduler")
    assert off(served(folder, config()), scored(folder, "sd3", config())) <= TOLERANCE


def test_a_server_takes_the_guidance_that_the_options_take(made: Callable[[str], Path]) -> None:
    assert served(made("sd1"), config(guidance_scale=MOST_GUIDANCE)).shape[0] == len(PROMPTS)
    line = f"expected guidance_scale from 1 to {MOST_GUIDANCE}, got {MOST_GUIDANCE + 1}; change it"
    with pytest.raises(MlflowException, match=line):
        served(made("sd1"), config(), guidance_scale=MOST_GUIDANCE + 1)
