"""What a run leaves in a real MLflow server, and what becomes of it without one."""

import json
import logging
import math
import os
import re
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.entities import Run as MlflowRun

from spin import tracking
from spin.config import RunConfig
from spin.errors import SpinError
from spin.measures import estimates, followed
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.register import register
from spin.stages.score import score
from spin.stages.train import train
from spin.training import Stopped, Trainer
from tests.integration.conftest import Played
from tests.integration.world import BUCKET, EXPERIMENT, PREFIX, World

pytestmark = pytest.mark.integration


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def client(world: World) -> MlflowClient:
    return MlflowClient(tracking_uri=world.servers.mlflow_uri, registry_uri=world.servers.mlflow_uri)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a server that is not there."""
    # The code under test fills these in where they are not set; what it writes must not outlive the test.
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def runs(client: MlflowClient, run_key: str) -> dict[str, list[MlflowRun]]:
    """Return the MLflow runs of a run key, by stage."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id], f"tags.`spin.run_key` = '{run_key}'")
    stages: dict[str, list[MlflowRun]] = defaultdict(list)
    for run in found:
        stages[run.data.tags["spin.stage"]].append(run)
    return dict(stages)


def only(client: MlflowClient, run_key: str, stage: str) -> MlflowRun:
    (run,) = runs(client, run_key)[stage]
    return client.get_run(run.info.run_id)


def points(client: MlflowClient, run: MlflowRun, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric in the order that they arrived in."""
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def artifacts(client: MlflowClient, run: MlflowRun, folder: str = "") -> list[str]:
    names = []
    for item in client.list_artifacts(run.info.run_id, folder or None):
        names += artifacts(client, run, item.path) if item.is_dir else [item.path]
    return names


def sheets(client: MlflowClient, run: MlflowRun) -> list[int]:
    """Return the steps of the contact sheets of a run."""
    names = [re.fullmatch(r"images/contact_sheet\Wstep\W(\d+)\W.+\.png", name) for name in artifacts(client, run)]
    return sorted(int(name[1]) for name in names if name)


def everything(client: MlflowClient, run_key: str) -> dict[str, Any]:
    """Return all that the server knows of a run key, but system metrics."""
    return {
        run.info.run_id: (
            stage,
            run.info.status,
            run.data.params,
            run.data.tags,
            {name: points(client, run, name) for name in run.data.metrics if not name.startswith("system/")},
            artifacts(client, run),
        )
        for stage, found in runs(client, run_key).items()
        for run in found
    }


def assert_complete(client: MlflowClient, run_key: str, iterations: int) -> None:
    """Assert that every stage of a run in one shard has been logged, each thing once."""
    iteration_stages = [f"iteration-{k:03d}/{s}" for k in range(1, iterations + 1) for s in ("train", "score")]
    drawn = [f"iteration-{k:03d}/generate-0000-of-0001" for k in range(1, iterations + 1)]
    found = runs(client, run_key)
    assert found.keys() == {"pipeline", "prepare", "iteration-000/score", *iteration_stages, *drawn}
    parent = only(client, run_key, "pipeline")
    assert parent.data.params["train.batch_size"] == "8"
    for split in ("validation", "test"):
        assert [step for step, _ in points(client, parent, f"{split}.clip_score")] == [*range(iterations + 1)]
    assert sheets(client, parent) == [*range(iterations + 1)]
    for stage, (run, *more) in found.items():
        assert not more
        assert run.info.status == ("RUNNING" if stage == "pipeline" else "FINISHED")
        if stage.endswith("train"):
            assert [step for step, _ in points(client, run, "loss")] == [1, 2, 3]
        if stage != "pipeline":
            assert "index.json" in artifacts(client, run)


def test_one_parent_with_a_child_per_stage(client: MlflowClient, played: Played) -> None:
    found = runs(client, "played")
    assert found.keys() == {"pipeline", *played.indexes} - {"register"}
    assert all(len(stage) == 1 for stage in found.values())
    parent = found.pop("pipeline")[0]
    assert parent.info.run_name == "played"
    assert parent.info.run_id == played.indexes["register"].facts["mlflow_run_id"]
    for stage, (run,) in found.items():
        assert run.info.run_name == stage
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["spin.iteration"] == str(played.indexes[stage].iteration)
        assert run.info.status == "FINISHED"
    assert parent.info.status == "FINISHED"


def test_parent_shows_the_whole_config(client: MlflowClient, world: World, played: Played, tmp_path: Path) -> None:
    parent, config = only(client, "played", "pipeline"), world.run(played.place.run_key).config()
    logged = Path(client.download_artifacts(parent.info.run_id, "config.json", str(tmp_path)))
    assert RunConfig.model_validate_json(logged.read_text()) == config
    assert parent.data.params["preset"] == "emoji-cpu"
    assert parent.data.params["train.steps"] == "[3]"
    assert parent.data.params["data.source"] == str(world.images)
    sections = [value if isinstance(value, dict) else {"": value} for value in config.model_dump(mode="json").values()]
    assert len(parent.data.params) == sum(len(section) for section in sections)


def test_children_show_facts_and_digests(client: MlflowClient, played: Played) -> None:
    for stage, index in played.indexes.items():
        if stage == "register":
            continue
        run = only(client, "played", stage)
        for name, ref in index.outputs.items():
            assert run.data.tags[f"spin.{name}"] == ref.digest
        assert run.data.tags["spin.producer.commit"] == "c0ffee"
        assert run.data.metrics["items"] == index.items
        assert run.data.metrics["seconds"] == index.seconds
        assert "index.json" in artifacts(client, run)
    trained = only(client, "played", "iteration-002/train")
    assert trained.data.metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert only(client, "played", "prepare").data.metrics["train_rows"] == played.indexes["prepare"].items


def test_loss_curve_has_each_step_once_and_in_order(client: MlflowClient, played: Played) -> None:
    for k in (1, 2):
        run = only(client, "played", f"iteration-00{k}/train")
        for name in ("loss", "implicit_accuracy", "winner_drift", "grad_norm", "learning_rate"):
            assert [step for step, _ in points(client, run, name)] == [1, 2, 3]
        assert points(client, run, "loss")[-1][1] == played.indexes[f"iteration-00{k}/train"].facts["final_loss"]


def test_parent_shows_each_iteration(client: MlflowClient, played: Played) -> None:
    parent = only(client, "played", "pipeline")
    for split in ("validation", "test"):
        for name, iterations in (("clip_score", [0, 1, 2]), ("win_rate", [1, 2])):
            wanted = [
                (k, played.indexes[f"iteration-00{k}/score"].facts["metrics"][split][name]["value"]) for k in iterations
            ]
            assert points(client, parent, f"{split}.{name}") == wanted


def test_parent_shows_sheet_and_report(client: MlflowClient, played: Played) -> None:
    parent = only(client, played.place.run_key, "pipeline")
    assert {f"report/iteration-00{k}.html" for k in (0, 1, 2)} <= set(artifacts(client, parent))
    assert sheets(client, parent) == [0, 1, 2]


def test_rerun_logs_nothing_twice(client: MlflowClient, world: World, played: Played) -> None:
    before = everything(client, "played")
    world.play(played.place, iterations=2, shards=2)
    register(played.place, played.model_name, 2)
    assert everything(client, "played") == before


def test_resumed_training_continues_its_curve(
    client: MlflowClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server knows a step more than the checkpoint when training stops."""
    place = world.place("resumed", world.servers.mlflow_uri)
    world.prepare(place, checkpoint_every=2, steps=[5])
    generate(place, 1)
    watch = Trainer.watch

    def stop(self: Trainer, measures: dict[str, float]) -> None:
        watch(self, measures)
        if self.step == 4:
            raise Interrupted("in the middle")

    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.0)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "watch", stop)
        with pytest.raises(Interrupted):
            train(place, 1)
    stopped = only(client, "resumed", "iteration-001/train")
    assert stopped.info.status == "FAILED"
    # Nobody may ever go on with it.
    assert only(client, "resumed", "pipeline").info.status == "FAILED"
    assert stopped.data.tags["spin.failure"] == "in the middle"
    assert [step for step, _ in points(client, stopped, "loss")] == [1, 2, 3]
    assert world.run("resumed").read_progress("iteration-001/train")["facts"]["step"] == 2
    train(place, 1)
    run = only(client, "resumed", "iteration-001/train")
    assert run.info.run_id == stopped.info.run_id
    assert run.info.status == "FINISHED"
    assert only(client, "resumed", "pipeline").info.status == "RUNNING"
    assert "spin.failure" not in run.data.tags
    for name in ("loss", "winner_drift", "learning_rate"):
        assert [step for step, _ in points(client, run, name)] == [1, 2, 3, 4, 5]
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    train(place, 1)
    assert [step for step, _ in points(client, run, "loss")] == [1, 2, 3, 4, 5]


def test_nodes_that_do_not_start_are_told_of(client: MlflowClient, world: World) -> None:
    place = world.place("no-node", world.servers.mlflow_uri)
    world.prepare(place, objective="sft")

    def refused() -> None:
        raise SpinError("expected Kubeflow Trainer, got none; install it")

    with pytest.raises(SpinError, match="expected Kubeflow Trainer"):
        train(place, 1, elsewhere=refused)
    run = only(client, "no-node", "iteration-001/train")
    assert (run.info.status, run.data.tags["spin.failure"]) == (
        "FAILED",
        "expected Kubeflow Trainer, got none; install it",
    )
    assert only(client, "no-node", "pipeline").info.status == "FAILED"


def test_an_evicted_stage_is_killed_not_failed(
    client: MlflowClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.place("evicted-and-told", world.servers.mlflow_uri)
    world.prepare(place)
    generate(place, 1)

    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        with pytest.raises(SystemExit):
            train(place, 1)
    run = only(client, "evicted-and-told", "iteration-001/train")
    assert (run.info.status, run.data.tags["spin.failure"]) == (
        "KILLED",
        "asked to stop (SIGTERM); run the stage again to go on",
    )
    assert only(client, "evicted-and-told", "pipeline").info.status == "KILLED"
    train(place, 1)
    run = only(client, "evicted-and-told", "iteration-001/train")
    assert run.info.status == "FINISHED"
    assert "spin.failure" not in run.data.tags
    assert only(client, "evicted-and-told", "pipeline").info.status == "RUNNING"


def test_scores_are_a_table_of_each_stage(client: MlflowClient, world: World, played: Played) -> None:
    for k in (0, 1, 2):
        run = only(client, "played", f"iteration-00{k}/score")
        logged = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/scores.json")
        rows = pq.read_table(world.store().get(played.indexes[f"iteration-00{k}/score"].outputs["scores"]))
        assert logged["columns"] == rows.column_names
        assert len(logged["data"]) == len(rows)
        estimated = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/estimates.json")
        wanted = [list(row.values()) for row in estimates(played.indexes[f"iteration-00{k}/score"].facts)]
        assert estimated["columns"] == ["split", "kind", "of", "score", "median", "value", "low", "high"]
        assert [row[:4] for row in estimated["data"]] == [row[:4] for row in wanted]
        for logged_row, row in zip(estimated["data"], wanted, strict=True):
            assert logged_row[5:] == pytest.approx(row[5:])
        assert {"scores.json", "estimates.json"} <= {
            table["path"] for table in json.loads(run.data.tags["mlflow.loggedArtifacts"])
        }


def test_all_estimates_are_followed_over_iterations(client: MlflowClient, played: Played) -> None:
    parent = only(client, played.place.run_key, "pipeline")
    for k in (0, 1, 2):
        for name, value in followed(played.indexes[f"iteration-00{k}/score"].facts).items():
            assert (k, pytest.approx(value)) in points(client, parent, name)
    assert [step for step, _ in points(client, parent, "test.win_rates.iteration 1.clip_score")] == [2]
    assert [step for step, _ in points(client, parent, "test.median.clip_score")] == [0, 1, 2]


def test_pictures_of_a_prompt_are_steps_of_one_key(client: MlflowClient, played: Played) -> None:
    names = artifacts(client, only(client, played.place.run_key, "pipeline"))
    found = [re.fullmatch(r"images/prompts~(colour \d+)\+step\+(\d)\+.+\.png", name) for name in names]
    steps = defaultdict(list)
    for name in filter(None, found):
        steps[name[1]].append(int(name[2]))
    assert len(steps) == 3
    assert all(sorted(some) == [0, 1, 2] for some in steps.values())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:secret@mlflow:5000/x", "http://mlflow:5000/x"),
        ("request to https://ann:p@ss@mlflow failed", "request to https://mlflow failed"),
        ("http://mlflow:5000/a@b", "http://mlflow:5000/a@b"),
    ],
)
def test_passwords_are_not_repeated(text: str, shown: str) -> None:
    assert tracking.without_password(text) == shown


def test_a_password_in_the_address_is_not_logged(
    world: World, away: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = away.replace("http://", "http://ann:secret@")
    with tracking.stage(world.place("password", address), "prepare", 0):
        pass
    with pytest.raises(SpinError) as refused:
        tracking.Registry(address).aliased("any", "champion")
    assert "out of reach" in caplog.text
    with pytest.raises(SpinError, match="expected an answer from MLflow at http://127") as silent:
        tracking.server_version(address)
    assert "secret" not in caplog.text + str(refused.value) + str(silent.value)


def test_the_verdict_and_its_reason_are_tags(client: MlflowClient, world: World) -> None:
    place = world.place("diverged-tracked", world.servers.mlflow_uri)
    world.prepare(place, learning_rate=10.0, steps=[30], warmup_steps=0)
    generate(place, 1)
    facts = train(place, 1).facts
    run = only(client, "diverged-tracked", "iteration-001/train")
    assert run.data.tags["spin.verdict"] == facts["verdict"] == "diverged"
    assert run.data.tags["spin.reason"] == facts["reason"]
    assert run.info.status == "FINISHED"


def test_registry_has_a_version_per_iteration(client: MlflowClient, played: Played) -> None:
    versions = {v.tags["spin.iteration"]: v for v in client.search_model_versions(f"name = '{played.model_name}'")}
    assert versions.keys() == {"1", "2"}
    registered = played.indexes["register"].facts
    for k, version in versions.items():
        trained, scored = played.indexes[f"iteration-00{k}/train"], played.indexes[f"iteration-00{k}/score"]
        assert str(version.version) == registered["versions"][k]
        assert version.tags["spin.uri"] == trained.outputs["model"].uri
        assert version.run_id == only(client, "played", f"iteration-00{k}/train").info.run_id
        assert version.status == "READY"
        wanted = {
            "spin.run_key": "played",
            "spin.preset": "emoji-cpu",
            "spin.digest": trained.outputs["model"].digest,
            "spin.dataset_digest": played.indexes["prepare"].outputs["dataset"].digest,
            "spin.base_digest": played.indexes["prepare"].outputs["base"].digest,
            "spin.opponent_digest": trained.inputs["opponent"],
            "spin.scores_digest": scored.outputs["scores"].digest,
            "spin.commit": "c0ffee",
            "spin.objective": "spin",
        }
        for split, metrics in scored.facts["metrics"].items():
            wanted |= {f"spin.{split}.{name}": f"{metric['value']:.4f}" for name, metric in metrics.items()}
        assert version.tags.items() >= wanted.items()
        # MLflow's table of models compares the iterations by their scores.
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        scores = {metric.key: metric.value for metric in model.metrics}
        assert scores["test.clip_score"] == scored.facts["metrics"]["test"]["clip_score"]["value"]
        assert model.params["iteration"] == k
    best = max("12", key=lambda k: float(versions[k].tags["spin.validation.clip_score"]))
    challenger = client.get_model_version_by_alias(played.model_name, "challenger")
    assert str(challenger.version) == registered["version"] == str(versions[best].version)


def test_registering_again_makes_no_second_version(client: MlflowClient, world: World, played: Played) -> None:
    where = f"name = '{played.model_name}'"
    before = [dict(version) for version in client.search_model_versions(where)]
    # The registry was told, then the index was lost.
    world.minio().remove_object(BUCKET, f"{PREFIX}/runs/played/register.json")
    again = register(played.place, played.model_name, 2)
    assert again.facts == played.indexes["register"].facts
    assert {version["version"] for version in before} == {v.version for v in client.search_model_versions(where)}
    challenger = client.get_model_version_by_alias(played.model_name, "challenger")
    assert str(challenger.version) == again.facts["version"]
    world.run("played").finish(played.indexes["register"], instead_of=again)


def test_a_training_that_mlflow_missed_has_a_finished_run_below_the_pipelines(
    client: MlflowClient, world: World, played: Played
) -> None:
    world.copy(played.place.run_key, "untold")
    # Nor does the store know of a run in MLflow.
    for name in ("register", "mlflow"):
        world.minio().remove_object(BUCKET, f"{PREFIX}/runs/untold/{name}.json")
    register(world.place("untold", world.servers.mlflow_uri), "untold", 2)
    parent = only(client, "untold", "pipeline")
    for k in (1, 2):
        run = only(client, "untold", f"iteration-00{k}/train")
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["spin.iteration"] == str(k)


def test_a_run_that_has_all_its_stages_again_is_finished(client: MlflowClient, world: World, played: Played) -> None:
    world.copy(played.place.run_key, "failed-later")
    for name in ("register", "mlflow"):
        world.minio().remove_object(BUCKET, f"{PREFIX}/runs/failed-later/{name}.json")
    place = world.place("failed-later", world.servers.mlflow_uri)
    register(place, "failed-later", 2)
    with pytest.raises(SystemExit), tracking.stage(place, "iteration-002/train", 2):
        raise SystemExit(143)
    assert only(client, "failed-later", "pipeline").info.status == "KILLED"
    register(place, "failed-later", 2)
    assert only(client, "failed-later", "pipeline").info.status == "FINISHED"


def test_more_iterations_add_versions(world: World, played: Played) -> None:
    world.copy("played", "grown")
    world.minio().remove_object(BUCKET, f"{PREFIX}/runs/grown/register.json")
    place = world.place("grown", world.servers.mlflow_uri)
    first, second = (register(place, "grown", iterations) for iterations in (1, 2))
    assert first.facts["versions"] == {"1": "1"}
    assert second.facts["versions"] == {"1": "1", "2": "2"}
    assert played.indexes["register"].iteration == second.iteration


@pytest.fixture
def injected(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Give the ids of two runs of another owner; the first is in the environment."""
    experiment = client.get_experiment_by_name("owner") or client.create_experiment("owner")
    experiment = getattr(experiment, "experiment_id", experiment)
    ids = [client.create_run(experiment).info.run_id for _ in range(2)]
    monkeypatch.setenv("MLFLOW_RUN_ID", ids[0])
    yield ids
    for id in ids:
        client.set_terminated(id)


def test_injected_run_is_used_and_not_ended(client: MlflowClient, world: World, injected: list[str]) -> None:
    place = world.place("injected", world.servers.mlflow_uri)
    world.prepare(place)
    generate(place, 1)
    train(place, 1)
    run = client.get_run(injected[0])
    assert run.info.status == "RUNNING"
    assert run.data.tags["spin.run_key"] == "injected"
    assert [step for step, _ in points(client, run, "loss")] == [1, 2, 3]
    assert "index.json" in artifacts(client, run)
    assert runs(client, "injected").keys() == {"pipeline"}
    assert only(client, "injected", "pipeline").data.params["preset"] == "emoji-cpu"


def test_injected_run_of_a_failing_stage_is_not_ended(
    client: MlflowClient, world: World, injected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.place("injected-failing", world.servers.mlflow_uri)
    world.prepare(place)
    generate(place, 1)

    def stop(*_: object) -> None:
        raise Interrupted("by its owner")

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(Interrupted):
        train(place, 1)
    run = client.get_run(injected[0])
    assert run.info.status == "RUNNING"
    assert run.data.tags["spin.failure"] == "by its owner"


def test_parent_is_not_told_twice_by_two_injected_runs(
    client: MlflowClient, world: World, injected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second workflow of the same run key brings runs of its own, which know nothing yet."""
    place = world.place("injected-twice", world.servers.mlflow_uri)
    world.prepare(place)
    score(place, 0)
    before = everything(client, "injected-twice")
    monkeypatch.setenv("MLFLOW_RUN_ID", injected[1])
    score(place, 0)
    assert everything(client, "injected-twice") == before
    assert "index.json" in artifacts(client, client.get_run(injected[1]))


def test_run_without_a_server_is_logged_later(
    client: MlflowClient,
    world: World,
    away: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = world.place("away", away)
    started = time.monotonic()
    world.prepare(place)
    assert time.monotonic() - started < 60
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any(line.startswith(f"MLflow at {away} is out of reach (") for line in lines)
    assert any("prepare is safe in the store, run the stage again to log it" in line for line in lines)
    assert not any("\n" in line for line in lines)

    # The other stages wait no longer, so they need not wait at all here.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    indexes = world.play(place, iterations=1)
    assert time.monotonic() - started < 60
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.servers.mlflow_uri)
    assert runs(client, "away") == {}
    assert world.play(world.place("away", world.servers.mlflow_uri), iterations=1) == indexes
    assert_complete(client, "away", iterations=1)


def test_hanging_server_costs_a_bounded_time(world: World, hanging: str, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    assert world.prepare(world.place("hanging", hanging)).items > 0
    assert time.monotonic() - started < 60
    assert "out of reach" in caplog.text


def test_absent_server_does_not_slow_training_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for it, however long each attempt hangs; and it is not asked all the time."""
    attempts = []

    def hang(_: object) -> None:
        attempts.append(time.monotonic())
        time.sleep(0.2)
        raise TimeoutError

    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.0)
    monkeypatch.setattr(tracking, "SECONDS_BEFORE_RETRY", 0.5)
    monkeypatch.setattr(tracking.StageLog, "_connect", hang)
    log = tracking.StageLog(world.place("slow", "http://127.0.0.1:9"), "iteration-001/train", 1)
    end, waits, step = time.monotonic() + 2, [], 0
    while time.monotonic() < end:
        step += 1
        began = time.monotonic()
        log.step(step, {"loss": 0.5})
        waits.append(time.monotonic() - began)
        time.sleep(0.01)
    assert max(waits) < 0.1
    assert 2 <= len(attempts) <= 4
    log.close()


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////{}/x.db",
        "file://{}/runs",
        "{}/runs",
        "databricks",
        "http://",
        "http://h:99999",
        "ftp://h",
        "http://h x",
    ],
)
def test_tracking_is_a_server(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """What MLflow's client would take for a database or a folder of this machine is refused before anything is done."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    uri = uri.format(tmp_path)
    place = world.place("no-server", uri)
    for act in (
        lambda: world.prepare(place),
        lambda: tracking.StageLog(place, "prepare", 0),
        lambda: tracking.Registry(uri),
        lambda: tracking.server_version(uri),
    ):
        with pytest.raises(SpinError) as refused:
            act()
        assert re.fullmatch(r"expected an MLflow server like .+, got .+; set tracking_uri", str(refused.value))
    assert list(tmp_path.iterdir()) == []
    assert world.documents("no-server") == {}


class Cut(tracking.StageLog):
    """The log of a stage whose server takes so many requests, and is gone."""

    def __init__(self, place: Place, requests: int, told: list[Metric]):
        super().__init__(place, "iteration-001/train", 1)
        self._client, self.requests, self.told = self, requests, told
        self._sent = {metric.step for metric in told if metric.key == "loss"}

    def _connect(self) -> None:
        pass

    def log_batch(self, _: str, metrics: list[Metric]) -> None:
        """As MLflow's client does: a thousand to a request."""
        for start in range(0, len(metrics), 1000):
            if not self.requests:
                raise ConnectionError
            self.requests -= 1
            self.told += metrics[start : start + 1000]

    def set_terminated(self, *_: object) -> None:
        pass


def test_a_curve_that_was_cut_between_two_requests_is_whole_later(world: World) -> None:
    """MLflow's limit of points in a request falls in the middle of a step."""
    names = ("loss", "implicit_accuracy", "margin", "winner_drift", "loser_drift", "grad_norm", "learning_rate")
    history = [{"step": step, **dict.fromkeys(names, 1.0)} for step in range(1, 301)]
    place, told = world.place("cut", "http://127.0.0.1:9"), []
    for requests in (1, 0, 9):
        log = Cut(place, requests, told)
        log.curves(history)
        log.close()
        assert told
    for name in names:
        assert [metric.step for metric in told if metric.key == name] == [*range(1, 301)]


def test_server_that_goes_away_in_between_is_told_later(
    client: MlflowClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever call it is that fails, a rerun makes up for all that is missing."""
    place = world.place("between", world.servers.mlflow_uri)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    stages = {"log_dict": world.prepare, "log_image": lambda place: score(place, 0)}
    for method, stage in stages.items():
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, method, fail)
            stage(place)
        stage(place)
    generate(place, 1)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", fail)
        train(place, 1)
    train(place, 1)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_tag", fail)
        score(place, 1)
    score(place, 1)
    found = only(client, "between", "pipeline")
    assert "config.json" in artifacts(client, found)
    assert [step for step, _ in points(client, found, "test.clip_score")] == [0, 1]
    assert sheets(client, found) == [0, 1]
    trained = only(client, "between", "iteration-001/train")
    assert [step for step, _ in points(client, trained, "loss")] == [1, 2, 3]
    assert trained.info.status == "FINISHED"


def test_register_without_a_server_is_refused(world: World, played: Played, away: str) -> None:
    world.copy("played", "unregistered")
    world.minio().remove_object(BUCKET, f"{PREFIX}/runs/unregistered/register.json")
    before = world.documents("unregistered")
    started = time.monotonic()
    with pytest.raises(SpinError) as refused:
        register(world.place("unregistered", away), played.model_name, 2)
    line = str(refused.value)
    assert re.fullmatch(r"expected .+, got .+; .+", line)
    assert away in line
    assert time.monotonic() - started < 60
    assert world.documents("unregistered") == before


@pytest.mark.parametrize("name", ["", "a/b", "a:b"])
def test_registry_name_is_plain(played: Played, name: str) -> None:
    with pytest.raises(SpinError, match=r"^expected a registry name"):
        register(played.place, name, 2)


def test_without_tracking_no_server_is_asked(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that the environment names. And nothing stays behind in the temporary folder."""
    asked = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(tracking, "_client", lambda uri: asked.append(uri))
    indexes = world.play(world.place("untracked"), iterations=1)
    assert len(indexes) == 5
    closed = register(world.place("untracked"), "untracked", 1)
    assert not asked
    assert list(tmp_path.iterdir()) == []
    assert closed.outputs["model"] == indexes["iteration-001/train"].outputs["model"]
    assert (closed.facts["version"], closed.facts["versions"]) == ("", {})


def test_a_tracking_server_that_comes_later_registers_what_was_not(world: World, played: Played) -> None:
    world.copy(played.place.run_key, "later")
    world.minio().remove_object(BUCKET, f"{PREFIX}/runs/later/register.json")
    assert register(world.place("later"), "later", 2).facts["version"] == ""
    assert register(world.place("later", world.servers.mlflow_uri), "later", 2).facts["version"]
