"""The compiled pipeline, run by its own command on real servers: it finishes, resumes, fails clearly, goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipelines.laptop import Laptop
from spin.run import Index, Run, iteration_stage
from spin.store import Store
from tests import tiny

# The first test of the file also starts the servers and waits for the first run.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, SHARDS = 2, 2
STAGES = [
    "prepare",
    iteration_stage(0, "score"),
    *(
        iteration_stage(k, stage)
        for k in range(1, ITERATIONS + 1)
        for stage in (*(f"generate-{shard:04d}-of-{SHARDS:04d}" for shard in range(SHARDS)), "train", "score")
    ),
    "register",
]


@dataclass
class Pipeline:
    """A folder, a bucket prefix and a run key of its own; the models, images and options are those of all runs."""

    servers: Laptop
    folder: Path
    options: dict[str, Any]
    key: str
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir(parents=True)
        self.log = self.folder / "log"
        params = {
            "run_key": self.key,
            "iterations": ITERATIONS,
            "generate_shards": SHARDS,
            "gpu_count": 0,
            "store_uri": f"s3://spin/{self.key}",
            "store_endpoint": self.servers.s3_endpoint,
            "tracking_uri": self.servers.mlflow_uri,
            "experiment": f"e2e-{self.key}",
            "model_name": f"e2e-{self.key}",
            **self.options,
        }
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own; both of its streams go to the log."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, ROOT / "pipelines" / "spin.py", "--local"),
                    *("--params", "params.yaml", "--output", "spin.yaml"),
                ],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
                | self.servers.environment()
                | {
                    "SPIN_CACHE": str(self.folder / "cache"),
                    "TMPDIR": str(self.folder / "tmp"),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONUNBUFFERED": "1",
                },
            )

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 300) -> tuple[int, str]:
        """Wait for the command's end; return its exit code and all that it said."""
        try:
            process.wait(seconds)
        finally:
            kill(process)
        return process.returncode, self.log.read_text()

    def succeed(self) -> str:
        code, said = self.finish(self.start())
        assert code == 0, said[-5000:]
        assert said.splitlines()[-1] == "the pipeline has finished"
        return said

    def run(self) -> Run:
        return Run(Store(f"s3://spin/{self.key}", self.servers.s3_endpoint), self.key)

    def indexes(self) -> dict[str, Index | None]:
        run = self.run()
        return {stage: run.find(stage) for stage in STAGES}

    def digests(self) -> dict[str, dict[str, str]]:
        """Return what every stage made; all of it is determined by the config."""
        return {
            stage: {name: ref.digest for name, ref in index.outputs.items()} if index else {}
            for stage, index in self.indexes().items()
        }


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, whatever is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "base_model": str(tiny.base(folder / "base")),
        "data_source": str(tiny.images(folder / "images")),
        "overrides": tiny.overrides(tiny.judge(folder / "judge"), steps=[8], checkpoint_every=2),
    }


@pytest.fixture(scope="module")
def whole(laptop_servers: Laptop, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A run that nothing has interrupted."""
    pipeline = Pipeline(laptop_servers, tmp_path_factory.mktemp("whole") / "run", options, "whole")
    pipeline.succeed()
    return pipeline


def test_the_pipeline_finishes(whole: Pipeline) -> None:
    indexes = whole.indexes()

    assert [stage for stage, index in indexes.items() if index is None] == []
    digests = whole.digests()
    players = [digests["prepare"]["base"], *(digests[iteration_stage(k, "train")]["model"] for k in (1, 2))]
    assert len(set(players)) == 3
    registered = indexes["register"]
    assert registered
    client = MlflowClient(whole.servers.mlflow_uri)
    versions = client.search_model_versions("name = 'e2e-whole'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    challenger = client.get_model_version_by_alias("e2e-whole", "challenger")
    assert str(challenger.version) == registered.facts["version"]
    # The indexes that KFP shows are the store's.
    shown = Index.model_validate_json(
        max(whole.folder.rglob("register-model/model"), key=lambda path: path.stat().st_mtime).read_text()
    )
    assert shown == registered


def test_again_everything_is_complete(whole: Pipeline) -> None:
    before = whole.indexes()

    said = whole.succeed()

    for line in (
        "prepare: complete,",
        *(f"iteration {k}: scores complete" for k in range(ITERATIONS + 1)),
        *(f"iteration {k}: shard {n} of {SHARDS} complete" for k in (1, 2) for n in (1, 2)),
        *(f"iteration {k}: training complete, player" for k in (1, 2)),
    ):
        assert said.count(line) == 1, line
    assert "resuming" not in said
    # Whatever is made anew has another time of production.
    assert whole.indexes() == before
    versions = MlflowClient(whole.servers.mlflow_uri).search_model_versions("name = 'e2e-whole'")
    assert len(versions) == ITERATIONS


def test_a_failing_run_ends_with_one_clear_line(
    laptop_servers: Laptop, options: dict[str, Any], tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    pipeline = Pipeline(laptop_servers, tmp_path / "run", options | {"data_source": str(nowhere)}, "failing")

    code, said = pipeline.finish(pipeline.start())

    assert code == 2
    lines = said.splitlines()
    assert lines[-1] == (
        "error: expected the pipeline to finish, got a failed task (Pipeline 'spin-diffusion' finished with status "
        "FAILURE. Inner task failed: 'require-preflight'); its output is above"
    )
    reason = [line for line in lines if line.lstrip().startswith("spin.errors.SpinError: ")]
    assert len(reason) == 1
    assert str(nowhere) in reason[0]
    assert "Score base" not in said
    assert pipeline.run().find("prepare") is None


def test_a_killed_run_goes_on_to_the_same_player(
    whole: Pipeline, laptop_servers: Laptop, options: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = Pipeline(laptop_servers, tmp_path / "run", options, "killed")
    training, run = iteration_stage(1, "train"), pipeline.run()
    process = pipeline.start()
    try:
        while not run.read_progress(training) and not run.find(training):
            assert process.poll() is None, pipeline.log.read_text()[-5000:]
            time.sleep(0.02)
    finally:
        kill(process)
    progress, trained = run.read_progress(training), run.find(training)
    assert progress or trained
    assert run.find("register") is None

    said = pipeline.succeed()

    if trained:
        assert "iteration 1: training complete, player" in said
    else:
        assert progress
        assert f"iteration 1: resuming from step {progress['step']}" in said
    assert "iteration 1: shard 1 of 2 complete" in said
    assert pipeline.digests()[iteration_stage(2, "train")] == whole.digests()[iteration_stage(2, "train")]
    assert pipeline.digests() == whole.digests()
