"""The compiled pipeline, run by its own command on real servers: it finishes, finds all complete, fails clearly."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.laptop import Laptop
from spin.run import Index, iteration_stage
from tests.local_run import ITERATIONS, SHARDS, Pipeline

# The first test also starts the servers and waits for the first run.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


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
        *(f"iteration {k}: score shard {n} of {SHARDS} complete" for k in range(ITERATIONS + 1) for n in (1, 2)),
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
    laptop_servers: Laptop, tiny_run_options: dict[str, Any], tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    pipeline = Pipeline(laptop_servers, tmp_path / "run", tiny_run_options | {"data_source": str(nowhere)}, "failing")

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


def test_play_ends_with_an_iteration_that_converged(
    laptop_servers: Laptop, tiny_run_options: dict[str, Any], tmp_path: Path
) -> None:
    """A step too small to change anything: the second iteration is skipped, and what there is gets registered."""
    still = {"steps": [2], "learning_rate": 1e-30, "warmup_steps": 0, "stop_when_converged": True}
    overrides = tiny_run_options["overrides"]
    options = {"overrides": overrides | {"train": overrides["train"] | still}, "iterations": 2, "shards": 1}
    pipeline = Pipeline(laptop_servers, tmp_path / "run", tiny_run_options | options, "converged")

    said = pipeline.succeed()

    run = pipeline.run()
    assert run.find(iteration_stage(1, "score"))
    assert run.find(iteration_stage(2, "generate-0000-of-0001")) is None
    assert run.find(iteration_stage(2, "train")) is None
    assert said.count("iteration 2 is not played; iteration 1: converged, ") == 1
    assert run.find("register")
    (version,) = MlflowClient(laptop_servers.mlflow_uri).search_model_versions("name = 'e2e-converged'")
    assert version.tags["spin.verdict"] == "converged"
