"""A registered player answers prompts through MLflow's own server, with nothing of spin on its path."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from mlflow import MlflowClient
from PIL import Image

from spin import models
from spin.config import GenerateConfig
from spin.sampling import decode, sample_latents
from spin.stages.generate import generate
from spin.stages.prepare import prepare
from spin.stages.register import register
from spin.stages.score import score
from spin.stages.train import train
from tests import tiny
from tests.integration.conftest import Played
from tests.integration.world import World

# The first test also starts the servers, plays a run and waits for the model to be loaded.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def server(world: World, played: Played, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow models serve` on the challenger."""
    folder = tmp_path_factory.mktemp("serving")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Whoever serves knows MLflow alone: no keys of the store, no spin.
    hidden = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"MLFLOW_TRACKING_URI": world.servers.mlflow_uri, "OMP_NUM_THREADS": "1"}
    # As in an activated environment: MLflow looks for its web server by name.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [
        *(str(Path(sys.executable).with_name("mlflow")), "models", "serve", "--env-manager", "local"),
        *("-m", f"models:/{played.model_name}@challenger", "--port", str(port)),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            try:
                with urllib.request.urlopen(f"{address}/ping", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except (OSError, AssertionError):
                assert process.poll() is None, (folder / "log").read_text()[-5000:]
                time.sleep(0.2)
        else:
            raise AssertionError((folder / "log").read_text()[-5000:])
        yield address
    finally:
        process.terminate()
        process.wait(20)


def ask(server: str, prompts: list[str], **params: Any) -> list[Image.Image]:
    """Ask as ``docs/registry.md`` does."""
    body = json.dumps({"inputs": {"prompt": prompts}, "params": params})
    request = urllib.request.Request(
        f"{server}/invocations", body.encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        rows = json.loads(answer.read())["predictions"]
    return [Image.open(io.BytesIO(base64.b64decode(row["image"]))) for row in rows]


def test_a_prompt_is_answered_by_a_png(server: str, world: World, played: Played) -> None:
    params = {"num_inference_steps": 3, "guidance_scale": 2.0, "seed": 7}
    (image,) = ask(server, ["colour 1"], **params)
    assert (image.format, image.size) == ("PNG", (32, 32))

    player = world.store().get(played.indexes["register"].outputs["model"])
    pipeline = StableDiffusionPipeline.from_pretrained(player, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++"
    )

    wanted = pipeline(
        "colour 1",
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert image.tobytes() == wanted.tobytes()


def test_equal_seeds_draw_equal_images(server: str) -> None:
    one, again, other = ask(server, ["colour 1", "colour 1", "colour 2"], num_inference_steps=2)
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert ask(server, ["colour 1"], num_inference_steps=2, seed=1)[0].tobytes() != one.tobytes()


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"num_inference_steps": 0}, "expected num_inference_steps from 1 to 1000, got 0; change it"),
        ({"guidance_scale": 0.5}, "expected guidance_scale from 1 to 1000, got 0.5; change it"),
        ({"seed": -1}, "expected seed from 0 to "),
    ],
)
def test_parameters_out_of_range_are_told(server: str, params: dict[str, Any], line: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, ["colour 1"], **params)
    assert refused.value.code == 400
    assert line in json.loads(refused.value.read())["message"]


def test_a_player_is_served_guided_where_it_was_scored_guided(world: World, tmp_path: Path) -> None:
    """The interval goes from the run's options through the registry into what the packed model draws."""
    place, options = world.place("guided-in-part", world.servers.mlflow_uri), tiny.overrides(world.judge)
    # So much guidance that an untrained player is seen to hear it.
    options["generate"] |= {"guidance_scale": 300, "guidance_interval": [0.25, 0.75], "num_inference_steps": 4}  # type: ignore[operator]
    prepare(place, "emoji-cpu", str(world.base), str(world.images), options, iterations=1)
    score(place, 0)
    generate(place, 1)
    train(place, 1)
    score(place, 1)
    made = register(place, "guided-in-part", 1)

    client = MlflowClient(world.servers.mlflow_uri, world.servers.mlflow_uri)
    source = client.get_model_version("guided-in-part", made.facts["version"]).source
    player = mlflow.pyfunc.load_model(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path)))
    (answer,) = player.predict(pd.DataFrame({"prompt": ["colour 1"]}), params={"seed": 7})["image"]
    found = np.asarray(Image.open(io.BytesIO(answer)), float)

    model = models.load(world.store().get(made.outputs["model"]), torch.device("cpu"))
    noise = torch.randn(1, *tiny.LATENTS, generator=torch.Generator().manual_seed(7))

    def drawn(config: GenerateConfig) -> np.ndarray:
        latents = sample_latents(model, ["colour 1"], noise, config, "fp32")
        return decode(model, latents, "fp32").numpy()[0].astype(float)

    as_scored = world.run(place.run_key).config().generate
    assert abs(found - drawn(as_scored)).max() <= 1
    throughout = as_scored.model_copy(update={"guidance_interval": (0.0, 1.0)})
    assert abs(found - drawn(throughout)).max() > 50


def test_the_packed_model_needs_nothing_of_spin(world: World, played: Played, tmp_path: Path) -> None:
    client = MlflowClient(world.servers.mlflow_uri, world.servers.mlflow_uri)
    version = client.get_model_version_by_alias(played.model_name, "challenger")
    folder = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=str(tmp_path)))
    requirements = (folder / "requirements.txt").read_text()
    assert "diffusers==" in requirements
    assert "spin" not in requirements
    assert "+" not in requirements
    player = world.store().get(played.indexes["register"].outputs["model"])
    packed = folder / "artifacts" / player.name
    assert {p.relative_to(packed): p.read_bytes() for p in packed.rglob("*") if p.is_file()} == {
        p.relative_to(player): p.read_bytes() for p in player.rglob("*") if p.is_file()
    }
    signature = mlflow.models.get_model_info(str(folder)).signature
    assert [column.name for column in signature.inputs] == ["prompt"]
    defaults = {param.name: param.default for param in signature.params}
    assert defaults == {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 0}
