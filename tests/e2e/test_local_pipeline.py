"""The compiled pipeline, run by its own command on real servers: it finishes, resumes, fails clearly, goes on."""

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.laptop import Laptop
from spin.run import Index, iteration_stage
from tests.local_run import ITERATIONS, SHARDS, Pipeline, kill, tiny_options

# The first test of the file also starts the servers and waits for the first run.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_options(tmp_path_factory.mktemp("tiny"))


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
        assert f"iteration 1: resuming from step {progress['facts']['step']}" in said
    assert "iteration 1: shard 1 of 2 complete" in said
    assert pipeline.digests()[iteration_stage(2, "train")] == whole.digests()[iteration_stage(2, "train")]
    assert pipeline.digests() == whole.digests()
