"""Training as a user types it: the losses and gradients of every step, and all that they must not depend on.

``RENEW=1`` records the trajectories anew.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spin.config import override
from spin.run import Index
from spin.stages.launch import train_on_nodes
from spin.trainjob import PodSettings
from tests import tiny
from tests.integration.world import World
from tests.kubernetes_api import Trainer, api_server

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectories.json"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "spin": {},
    "exact-spin": {"objective": "exact-spin", "trajectory_steps": 3, "trajectory_scale": 1e-4},
    "sft": {"objective": "sft"},
    "dpo": {"objective": "dpo"},
}
# beta multiplies the rounding of the errors, about 1e-7, and the epsilon keeps Adam from turning the rounding of tiny
# gradients into whole steps.
PLAIN = {
    "mixed_precision": "no", "steps": [5], "beta": [20], "learning_rate": 1e-3, "adam_epsilon": 1e-4,
    "warmup_steps": 2, "decay_steps": 8, "prompt_dropout": 0.3, "max_grad_norm": 1e9, "max_winner_drift": 10,
    "micro_batch_size": 8, "checkpoint_every": 100,
}  # fmt: skip

VALIDATION_PROMPTS = 3
"""Odd, so that two processes cannot share them evenly."""
Begin = Callable[..., str]


@pytest.fixture(scope="module")
def begin(world: World, tmp_path_factory: pytest.TempPathFactory) -> Begin:
    """Give a function that begins a run with its own training options, and returns its key.

    All of them have the data set, base and losers of one run, which is prepared and drawn once.
    """
    folder = tiny.pairs(tmp_path_factory.mktemp("trajectories") / "pairs")
    options = tiny.overrides(world.judge, **PLAIN, objective="dpo")
    options["score"]["max_prompts"] = VALIDATION_PROMPTS  # type: ignore[index]
    with pytest.MonkeyPatch.context() as patch:
        # Where the hardware multiplies bfloat16, latents would differ from the recorded ones.
        patch.setattr("spin.sampling.fast_precision", lambda _: "fp32")
        world.spin(
            "prepare", "paired", f"--base-model={world.base}", f"--data-source={folder}",
            f"--overrides={json.dumps(options)}",
        )  # fmt: skip
        shared = world.run("paired")
        run = world.run("drawn")
        run.begin(override(shared.config(), {"train": {"objective": "spin"}}))
        run.finish(shared.need("prepare", ""))
        world.spin("generate", "drawn", "--iteration=1")
    done = [run.need("prepare", ""), run.need("iteration-001/generate-0000-of-0001", "")]

    def new(name: str, **training: object) -> str:
        own = world.run(f"trajectory-{name}")
        own.begin(override(run.config(), {"train": training}))
        for index in done:
            own.finish(index)
        return own.key

    return new


def train(world: World, run_key: str, *arguments: str) -> Index:
    world.spin("train", run_key, "--iteration=1", *arguments)
    return world.run(run_key).need("iteration-001/train", "")


def trajectory(world: World, index: Index) -> list[dict[str, float]]:
    lines = world.store().get(index.outputs["history"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(world: World, index: Index) -> dict[str, torch.Tensor]:
    return load_file(world.store().get(index.outputs["model"]) / "unet" / "diffusion_pytorch_model.safetensors")


def farthest(world: World, one: Index, other: Index) -> float:
    ours, theirs = weights(world, one), weights(world, other)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def undivided(world: World, begin: Begin) -> Callable[[str], Index]:
    """Give a function that trains an objective by one process in whole batches, once."""
    known: dict[str, Index] = {}

    def trained(objective: str) -> Index:
        if objective not in known:
            known[objective] = train(world, begin(objective, **OBJECTIVES[objective]))
        return known[objective]

    return trained


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_the_recorded_ones(
    world: World, undivided: Callable[[str], Index], objective: str
) -> None:
    found = [[row["loss"], row["grad_norm"]] for row in trajectory(world, undivided(objective))]
    recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("RENEW"):
        recorded[objective] = found
        GOLDEN.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
    # Processors differ in the order of their sums.
    assert found == [pytest.approx(row, rel=1e-3) for row in recorded[objective]]
    assert len({loss for loss, _ in found}) == 5


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_may_come_in_parts(
    world: World, begin: Begin, undivided: Callable[[str], Index], objective: str, micro: int
) -> None:
    """8 pairs as 1 x 8, 2 x 4 and 4 x 2."""
    parts = train(world, begin(f"{objective}-by-{micro}", **OBJECTIVES[objective], micro_batch_size=micro))
    for row, other in zip(trajectory(world, undivided(objective)), trajectory(world, parts), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert farthest(world, undivided(objective), parts) < 1e-5


@pytest.mark.parametrize(("objective", "sharding"), [("spin", "none"), ("exact-spin", "none"), ("exact-spin", "fsdp")])
def test_two_processes_train_as_one(
    world: World, begin: Begin, undivided: Callable[[str], Index], objective: str, sharding: str
) -> None:
    """The same batches, losses and gradients; sums over processes round differently."""
    key = begin(f"{objective}-by-two-{sharding}", **OBJECTIVES[objective], micro_batch_size=2, sharding=sharding)
    together = train(world, key, "--processes=2")
    assert together.items == undivided(objective).items
    for row, other in zip(trajectory(world, undivided(objective)), trajectory(world, together), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-6)
    assert farthest(world, undivided(objective), together) < 1e-5
    assert train(world, key, "--processes=2") == together, "finished"


@pytest.mark.parametrize(
    ("sharding", "kept"), [("none", {}), ("fsdp", {}), ("fsdp", {"ema_decay": 0.5})], ids=["none", "fsdp", "average"]
)
def test_two_processes_choose_the_player_that_one_would(
    world: World, begin: Begin, sharding: str, kept: dict[str, Any]
) -> None:
    """They share the drawing of three prompts; the best player is not the last, so it must be brought back."""
    chosen = {"learning_rate": 3e-2, "steps": [6], "validate_every": 1, "patience": 2, "max_winner_drift": 1e9, **kept}
    name = "-".join(["chosen", *kept])
    alone = train(world, begin(f"{name}-{sharding}-alone", **chosen))
    together = train(
        world, begin(f"{name}-{sharding}", **chosen, micro_batch_size=2, sharding=sharding), "--processes=2"
    )
    assert world.run("drawn").need("prepare", "").facts["validation_rows"] >= VALIDATION_PROMPTS
    scores = [[row["validation_score"] for row in trajectory(world, index)] for index in (alone, together)]
    assert scores[1] == pytest.approx(scores[0], rel=5e-3)
    assert 0 < alone.facts["best_step"] < alone.facts["steps"]
    for fact in ("best_step", "steps", "verdict"):
        assert together.facts[fact] == alone.facts[fact]
    assert farthest(world, alone, together) < 1e-4


class Nodes:
    """Runs a TrainJob's command on each of its nodes, told of the others as Trainer's torch runtime tells them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, trainer: Trainer, job: dict[str, Any]) -> None:
        wanted = job["spec"]["trainer"]
        if not self.processes:
            self.start(wanted)
        codes = [process.poll() for process in self.processes]
        for node, code in enumerate(codes):
            pod = trainer.set_pod(job, node, "Running" if code is None else "Failed" if code else "Succeeded")
            trainer.logs[pod] = (self.folder / f"{node}.log").read_text().splitlines()
        if None not in codes:
            trainer.end(job, "Failed" if any(codes) else "Complete")

    def start(self, wanted: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = wanted["numNodes"]
        for node in range(count):
            meeting = {"NNODES": count, "NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with (self.folder / f"{node}.log").open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, *wanted["command"][1:]],
                    env=os.environ | {f"PET_{name}": str(value) for name, value in meeting.items()},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def test_two_nodes_train_as_one(
    world: World,
    begin: Begin,
    undivided: Callable[[str], Index],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The TrainJob's own command, in two real pods' stead; they meet by torch's static rendezvous over TCP."""
    key = begin("spin-on-two-nodes", **OBJECTIVES["spin"], micro_batch_size=2)
    monkeypatch.setenv("KFP_NAMESPACE", "runs")
    monkeypatch.setenv("KFP_POD_NAME", "launcher")
    nodes, settings = Nodes(tmp_path), PodSettings({"limits": {"memory": "1Gi"}})
    with api_server(tmp_path, [], trainer=Trainer(repeat(nodes))) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        try:
            together = train_on_nodes(world.place(key), 1, 1, 2, 0, settings)
        finally:
            nodes.stop()
    said = capsys.readouterr().out
    assert said.count("step 5 of 5") == 1, "the first node speaks, the other does not"
    assert together.items == undivided("spin").items
    for row, other in zip(trajectory(world, undivided("spin")), trajectory(world, together), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-6)
    assert farthest(world, undivided("spin"), together) < 1e-5
    monkeypatch.delenv("KUBECONFIG")
    assert train_on_nodes(world.place(key), 1, 1, 2, 0, settings) == together, "complete: no cluster is asked"


@pytest.mark.parametrize("training", [{"ema_decay": 0.5}, {"lora_rank": 2}], ids=["full", "lora"])
def test_a_killed_run_ends_as_if_it_had_not_been(
    world: World, begin: Begin, tmp_path: Path, training: dict[str, Any]
) -> None:
    """Bitwise: weights and moments, the rate's schedule, the draws of noise and timesteps, the place in the data."""
    name, options = next(iter(training)), {**training, "steps": [40], "decay_steps": 50, "checkpoint_every": 3}
    uninterrupted = train(world, begin(f"{name}-uninterrupted", **options))
    key = begin(f"{name}-killed", **options)
    run, stage = world.run(key), "iteration-001/train"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "spin", *world.command("train", key, "--iteration=1")]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not ((progress := run.read_progress(stage)) and progress["facts"]["step"] >= 6):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    assert run.find(stage) is None
    resumed = train(world, key)
    assert resumed.outputs == uninterrupted.outputs
    assert resumed.facts == uninterrupted.facts
    rows = trajectory(world, resumed)
    assert [row["step"] for row in rows] == list(range(1, 41))
