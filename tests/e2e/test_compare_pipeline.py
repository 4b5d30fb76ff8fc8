"""The comparison pipeline, run by its own command: arms played from one data set, a table, and a rerun that computes
nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from pipelines.laptop import Laptop
from spin.budget import passes
from spin.run import Index, Run, iteration_stage
from spin.store import Store
from tests import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "sft": {"train": {"objective": "sft"}},
    "dpo": {"train": {"objective": "dpo", "pairs": "ranked", "ranked_draws": 2}},
    "spin": {},
    "exact": {"train": {"objective": "exact-spin", "trajectory_steps": 2}},
}
DPO = "dpo on pairs ranked by clip_score"


def test_arms_are_played_and_compared(laptop_servers: Laptop, tmp_path: Path) -> None:
    params = {
        "run_key": "rivals",
        "arms": ARMS,
        "iterations": 2,
        "shards": 1,
        "split": "validation",
        "gpu_count": 0,
        "store_uri": "s3://spin/rivals",
        "store_endpoint": laptop_servers.s3_endpoint,
        "tracking_uri": laptop_servers.mlflow_uri,
        "experiment": "rivals",
        "base_model": str(tiny.base(tmp_path / "base")),
        "data_source": str(tiny.images(tmp_path / "images")),
        "overrides": tiny.overrides(tiny.judge(tmp_path / "judge")),
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))

    def play() -> str:
        command = [sys.executable, ROOT / "pipelines" / "compare.py", "--local", "--params", "params.yaml"]
        environment = os.environ | laptop_servers.environment() | {"SPIN_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [*command, "--output", "compare.yaml"],
            cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return done.stdout

    play()
    before = {path: path.read_text() for path in tmp_path.rglob("compare-players/table")}
    store = Store("s3://spin/rivals", laptop_servers.s3_endpoint)
    shared, sft, dpo, spin, exact = (
        Run(store, f"rivals{arm}") for arm in ("", "-sft-0", "-dpo-0", "-spin-0", "-exact-0")
    )
    compared = shared.need("comparison", "")
    assert list(compared.facts["rows"]) == ["base", DPO, "exact 1", "exact 2", "sft", "spin 1", "spin 2"]
    assert compared.facts["best_on_validation"] in compared.facts["rows"]

    def trained(run: Run, k: int) -> Index:
        return run.need(iteration_stage(k, "train"), "")

    # One data set and one base for all; the base is drawn and scored once.
    for arm in (sft, dpo, spin, exact):
        assert arm.need("prepare", "") == shared.need("prepare", "")
        assert arm.need(iteration_stage(0, "score"), "") == shared.need(iteration_stage(0, "score"), "")
    assert trained(spin, 2).inputs["opponent"] == trained(spin, 1).outputs["model"].digest
    # What drawing and ranking cost is not left for steps.
    pairs = shared.need("prepare", "").items
    assert passes(dpo.config(), pairs, 1) <= passes(spin.config(), pairs, 2)
    # The exact arm, which is dearer by the step, has fewer of them, and lifts nobody's budget.
    assert passes(exact.config(), pairs, 2) <= passes(spin.config(), pairs, 2)
    assert trained(exact, 2).facts["steps"] == 1 < trained(spin, 2).facts["steps"]
    assert passes(sft.config(), pairs, 1) <= passes(spin.config(), pairs, 2)
    assert trained(dpo, 1).facts["steps"] < trained(sft, 1).facts["steps"]
    assert trained(sft, 1).facts["steps"] > 2 * trained(spin, 1).facts["steps"], "SFT's steps are cheaper"
    row = compared.facts["rows"]["spin 2"]["clip_score"]
    scored = spin.need(iteration_stage(2, "score"), "").facts["metrics"]["validation"]["clip_score"]
    assert row == pytest.approx({name: scored[name] for name in row}, abs=3)
    ((_, table),) = before.items()
    assert "| spin 2" in table
    assert f"| {DPO}" in table
    client = MlflowClient(laptop_servers.mlflow_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'rivals'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`mlflow.runName` LIKE '%comparison'") or [None]
    assert run is not None
    assert run.data.metrics["rows.sft.clip_score.value"] == compared.facts["rows"]["sft"]["clip_score"]["value"]
    parents = client.search_runs([experiment.experiment_id], "tags.`mlflow.runName` LIKE '%pipeline'")
    assert {parent.info.status for parent in parents} <= {"FINISHED"}

    indexes = [shared.need("comparison", ""), trained(sft, 1), trained(spin, 1), trained(spin, 2)]
    play()
    assert [shared.need("comparison", ""), trained(sft, 1), trained(spin, 1), trained(spin, 2)] == indexes
    assert {path.read_text() for path in tmp_path.rglob("compare-players/table")} == {table}
