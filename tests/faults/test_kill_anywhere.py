"""Kill the whole pipeline at random moments, start it again, until it is done: it ends as if nothing had happened.

``--kills`` strikes are spread over ``--runs`` tests (``make faults``: 50 over 10); the usual test run has a few. A run
that ends before its share of them is checked, and followed by another. Moments and signals follow from ``--seed``; the
first strike of each test falls into a task of its own, so that every kind of task is hit however short it is. Shards
store a part for every batch, as they do every two minutes where runs last days.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from spin.run import iteration_stage
from spin.stages.generate import shard_stage
from tests.faults.promises import Bucket, broken
from tests.integration.world import minio_of
from tests.local_run import ITERATIONS, SHARDS, Pipeline, kill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(7200)]

GRACE_SECONDS = 30.0
"""What Kubernetes leaves between SIGTERM and SIGKILL unless told otherwise."""
SMALL_PARTS = Path(__file__).with_name("small_parts")
TASKS = ("generate-synthetic", "spin-train", "score-metrics", "register-model", "prepare-data", "score-shard")
"""The tasks that do work, in the order in which tests aim at them."""
DRAWN = re.compile(r"iteration (\d+): shard (\d+) of \d+: \d+ of \d+ images")
BEGAN = re.compile(r"Executing task [^']*'([a-z-]+)'")
IN_FLIGHT = 2 * SHARDS
"""Batches that a kill may cost: each shard's that is drawn, and the one before it, which is being stored."""


@dataclass
class Killer:
    """Strikes a pipeline at random moments, and looks at the store after each."""

    pipeline: Pipeline
    bucket: Bucket
    dice: random.Random
    seconds: float
    """How long a run takes that nothing interrupts; less as soon as one was seen to take less."""
    struck: Counter[str]
    """What hit a running task, by task and signal."""
    drawn: Counter[str] = field(default_factory=Counter)
    """Batches of losers that were drawn, by shard, over all attempts."""

    def strike(self, aim: str = "") -> bool:
        """Start the pipeline and kill it, in the task ``aim`` if given; return whether it was still running then."""
        before, process = self.pipeline.indexes(), self.pipeline.start()
        began, evicted = time.monotonic(), self.dice.random() < 0.5
        while aim and aim not in BEGAN.findall(self.pipeline.log.read_text()) and process.poll() is None:
            time.sleep(0.1)
        # A task takes some seconds to import what it needs.
        moment = self.dice.uniform(0, 6) if aim else self.dice.uniform(2, self.seconds)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            if evicted:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
        else:
            assert process.returncode == 0, f"it failed by itself:\n{self.pipeline.log.read_text()[-5000:]}"
            # On a machine that is less busy now, later moments would all miss; a resumed run is shorter than a whole.
            self.seconds = max(time.monotonic() - began, self.seconds / 2)
        running = process.returncode != 0
        kill(process)
        said = self.pipeline.log.read_text()
        if running:
            self.struck[f"{(BEGAN.findall(said) or ['start'])[-1]} {'SIGTERM' if evicted else 'SIGKILL'}"] += 1
        self.look(before, said)
        return running

    def look(self, before: dict[str, Any], said: str) -> None:
        """Check what must hold at any moment, and that nothing finished is made again."""
        assert broken(self.bucket) == [], said[-3000:]
        now = self.pipeline.indexes()
        for stage, index in before.items():
            assert index is None or now[stage] == index, f"{stage} was made again:\n{said[-3000:]}"
        drawn = Counter(shard_stage(int(k), int(shard) - 1, SHARDS) for k, shard in DRAWN.findall(said))
        assert not {stage for stage in drawn if before[stage]}, said[-3000:]
        self.drawn += drawn


def curves(pipeline: Pipeline) -> dict[str, list[tuple[int, float]]]:
    """Return the loss curve of every iteration as MLflow shows it: by step, whenever its points came."""
    client = MlflowClient(pipeline.servers.mlflow_uri)
    experiment = client.get_experiment_by_name(f"e2e-{pipeline.key}")
    assert experiment
    found = {}
    for k in range(1, ITERATIONS + 1):
        stage = iteration_stage(k, "train")
        (run,) = client.search_runs([experiment.experiment_id], f"tags.`spin.stage` = '{stage}'")
        found[stage] = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss"))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        runs, kills = (int(metafunc.config.getoption(name)) for name in ("--runs", "--kills"))
        metafunc.parametrize("number", range(min(runs, kills)))


def test_killed_anywhere_it_ends_the_same(
    number: int,
    whole: Pipeline,
    tiny_run_options: dict[str, Any],
    tmp_path: Path,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    kills, runs, seed = (int(pytestconfig.getoption(name)) for name in ("--kills", "--runs", "--seed"))
    share = kills // runs + (number < kills % runs)
    wanted, shown = whole.digests(), curves(whole)
    struck: Counter[str] = Counter()
    client, dice, ended, seconds = minio_of(whole.servers), random.Random(f"{seed}-{number}"), 0, whole.seconds
    batches = Counter(
        {stage: index.facts["batches"] for stage, index in whole.indexes().items() if "/generate-" in stage}
    )
    aim, again = TASKS[number % len(TASKS)], 0
    while struck.total() < share:
        key = f"killed-{seed}-{number}-{ended}"
        pipeline = Pipeline(whole.servers, tmp_path / key, tiny_run_options, key, python_path=str(SMALL_PARTS))
        killer = Killer(pipeline, Bucket(client, "spin", key), dice, seconds, struck)
        earlier = struck.total()
        while struck.total() < share and killer.strike("" if struck else aim):
            pass
        before = pipeline.indexes()
        killer.look(before, pipeline.succeed())
        ended, seconds = ended + 1, killer.seconds
        twice = (killer.drawn - batches).total()
        assert twice <= IN_FLIGHT * (struck.total() - earlier), f"seed {seed}, {key}: {killer.drawn}"
        again += twice
        assert pipeline.digests() == wanted, f"seed {seed}, {key}: {struck}"
        assert curves(pipeline) == shown, f"seed {seed}, {key}: {struck}"
    assert any(name.startswith(aim) for name in struck), f"{aim} was not hit: {struck}"
    found = {"seed": seed, "runs": ended, "seconds": round(whole.seconds), "batches drawn twice": again, **struck}
    for name, value in found.items():
        record_property(name, value)
