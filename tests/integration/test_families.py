"""Every family, played on the command line: prepare, generate, train, score; the stock pipeline draws."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from spin import models
from tests import tiny
from tests.integration.world import World

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("family", "pipeline", "training"),
    [
        ("sd1", "StableDiffusionPipeline", {}),
        ("sd2", "StableDiffusionPipeline", {}),
        ("sdxl", "StableDiffusionXLPipeline", {"lora_rank": 2}),
        ("sd3-t5", "StableDiffusion3Pipeline", {"ema_decay": 0.5}),
    ],
)
def test_a_family_is_played_on_the_command_line(
    world: World, tmp_path: Path, family: str, pipeline: str, training: dict[str, object]
) -> None:
    base = tiny.base(tmp_path / "base", family)
    options = tiny.overrides(world.judge, steps=[2], learning_rate=1e-3, warmup_steps=0, **training)
    world.spin(
        "prepare", family, f"--base-model={base}", f"--data-source={world.images}", "--iterations=2",
        f"--overrides={json.dumps(options)}",
    )  # fmt: skip
    for iteration in (1, 2):
        world.spin("generate", family, f"--iteration={iteration}")
        world.spin("train", family, f"--iteration={iteration}")
    world.spin("score", family, "--iteration=0")
    world.spin("score", family, "--iteration=1")

    run = world.run(family)
    assert run.need("prepare", "test").facts["latents_shape"] == list(tiny.latents_shape(family))
    trained = [run.need(f"iteration-00{k}/train", "test") for k in (1, 2)]
    assert trained[1].inputs["opponent"] == trained[0].outputs["model"].digest
    assert [index.facts["first_loss"] for index in trained] == pytest.approx([0.6931472] * 2, abs=1e-6)

    folder = world.store().get(trained[1].outputs["model"])
    stock = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    assert type(stock).__name__ == pipeline
    predicts = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
    assert stock.scheduler.config.get("prediction_type") == predicts.get(family)
    ours = models.load(folder, torch.device("cpu"))
    theirs, before = getattr(stock, ours.family.denoiser), models.load(base, torch.device("cpu")).denoiser
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.denoiser.state_dict().items())
    assert not all(torch.equal(value, theirs.state_dict()[name]) for name, value in before.state_dict().items())
    stock.set_progress_bar_config(disable=True)
    drawn = stock("colour 1", height=32, width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert drawn.images[0].size == (32, 32)
