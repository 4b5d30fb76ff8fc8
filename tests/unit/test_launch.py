"""A TrainJob from creation to end, on an API server over HTTP that checks it against Trainer's published API."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components.spin_train_nodes.component import spin_train_nodes
from spin.errors import SpinError
from spin.run import Index
from spin.stages import Place, launch
from spin.store import Ref
from spin.trainjob import LABELS, PodSettings, name_of
from tests.kubernetes_api import Step, Trainer, api_server, schema_fault

PLACE = Place("a_Run.1", "s3://spin/runs", "http://s3:9000", "http://mlflow:5000")
NAME = name_of(PLACE.store_uri, PLACE.run_key, 2)
SECRET = {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "spin-s3", "key": "AWS_ACCESS_KEY_ID"}}}
# Not every secret has one.
REGION = {
    "name": "AWS_DEFAULT_REGION",
    "valueFrom": {"secretKeyRef": {"name": "spin-s3", "key": "AWS_DEFAULT_REGION", "optional": True}},
}
SETTINGS = PodSettings(
    resources={"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi", "nvidia.com/gpu": "4"}},
    env=[SECRET, REGION],
    node_selector={"pool": "gpu"},
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_NAMESPACE", "runs")
    monkeypatch.setenv("KFP_POD_NAME", "launcher")
    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LOOKS", 0.01)


@contextmanager
def served(folder: Path, trainer: Trainer, status: int = 200) -> Iterator[Trainer]:
    with pytest.MonkeyPatch.context() as patch, api_server(folder, [], status=status, trainer=trainer) as kubeconfig:
        patch.setenv("KUBECONFIG", str(kubeconfig))
        yield trainer


def run(settings: PodSettings = SETTINGS) -> None:
    launch.launch(PLACE, 2, 3, 2, 4, settings)


def refusal() -> str:
    with pytest.raises(SpinError) as error:
        run()
    assert "\n" not in str(error.value)
    return str(error.value)


def pending(reason: str) -> Step:
    waits = {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": "no such image"}}}]}
    return lambda trainer, job: [trainer.set_pod(job, node, "Pending", **waits) for node in range(2)] and None


def running(*lines: str, node: int = 0) -> Step:
    def step(trainer: Trainer, job: dict[str, Any]) -> None:
        trainer.logs.setdefault(trainer.set_pod(job, node, "Running"), []).extend(lines)

    return step


def failed(node: int, *lines: str, reason: str = "Error", code: int = 2) -> Step:
    def step(trainer: Trainer, job: dict[str, Any]) -> None:
        ended = {"containerStatuses": [{"state": {"terminated": {"reason": reason, "exitCode": code}}}]}
        trainer.logs.setdefault(trainer.set_pod(job, node, "Failed", **ended), []).extend(lines)

    return step


def end(word: str, *why: str) -> Step:
    return lambda trainer, job: trainer.end(job, word, *why)


def test_a_train_job_from_creation_to_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents: list[dict[str, Any]] = []

    def keep(_: Trainer, job: dict[str, Any]) -> None:
        documents.append(dict(job))

    play = [keep, pending("ImagePullBackOff"), running("one"), running("two", "three"), end("Complete")]
    with served(tmp_path, Trainer(play)) as trainer:
        run()
    assert capsys.readouterr().out.split() == ["one", "two", "three"]
    assert trainer.made == ["POST", "DELETE"]
    assert trainer.jobs == {}
    (job,) = documents
    assert job["metadata"]["name"] == NAME
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Pod", "name": "launcher", "uid": "uid-1"}
    ]
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert job["spec"]["trainer"] == {
        "image": "spin:1",
        "numNodes": 2,
        "resourcesPerNode": SETTINGS.resources,
        "env": [SECRET, REGION],
        "command": [
            *("python3", "-m", "spin", "train", "--run-key=a_Run.1", "--store-uri=s3://spin/runs"),
            *("--store-endpoint=http://s3:9000", "--tracking-uri=http://mlflow:5000", "--experiment=spin-diffusion"),
            *("--iteration=2", "--shards=3", "--accelerators=4"),
        ],
    }
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert node["name"] == "node"
    assert (pod["nodeSelector"], pod["tolerations"]) == (SETTINGS.node_selector, SETTINGS.tolerations)
    assert pod["volumes"] == [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}]
    assert pod["securityContext"]["runAsNonRoot"] is True


def test_it_waits_in_the_queue_of_the_pod_that_launches_it(tmp_path: Path) -> None:
    """Kueue's label, which the namespace's default queue or a person gave that pod; no queue, no label."""
    queues: list[dict[str, str]] = []
    for labels in ({}, {"kueue.x-k8s.io/queue-name": "default", "pipeline/runid": "1"}):
        trainer = Trainer([lambda _, job: queues.append(job["metadata"]["labels"]), end("Complete")])
        trainer.pods["launcher"]["metadata"]["labels"] = labels
        with served(tmp_path, trainer):
            run()
    assert queues == [LABELS, LABELS | {"kueue.x-k8s.io/queue-name": "default"}]


def test_names_fit_into_host_names() -> None:
    names = {name_of("s3://a", key, 1) for key in ("x" * 63, "x" * 62 + "y", "-", "A.b_c")}
    assert len(names) == 4
    assert max(len(f"{name}-node-0-0") for name in names) <= 63
    for name in names:
        document = {"metadata": {"name": name}, "spec": {"runtimeRef": {"name": "torch-distributed"}}}
        assert schema_fault(document) == ""


def test_the_server_sees_what_the_api_does_not_know() -> None:
    document: dict[str, Any] = {"metadata": {"name": "a"}, "spec": {"runtimeRef": {"name": "torch-distributed"}}}
    assert schema_fault(document) == ""
    document["spec"]["podTemplateOverrides"] = []
    assert "unknown field spec.podTemplateOverrides" in schema_fault(document)
    document["spec"] = {"runtimeRef": {"name": "torch-distributed"}, "trainer": {"numNodes": "two"}}
    assert "invalid" in schema_fault(document)


def test_the_first_fault_is_told_in_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    above = "error: expected 4 processes to finish, got one that ended with 1; read its lines above"
    play = [failed(0, above), failed(1, "loading", "error: expected a, got b; do c"), end("Failed", "JobsFailed", "x")]
    with served(tmp_path, Trainer(play)) as trainer:
        said = refusal()
    assert said == f"expected the 2 nodes of the TrainJob {NAME} to finish, got node 1: expected a, got b; do c"
    assert "node 1: loading" in capsys.readouterr().out
    assert trainer.made == ["POST", "DELETE"]


@pytest.mark.parametrize(
    ("play", "expected"),
    [
        ([failed(1, "half a line", reason="OOMKilled", code=137)], "node 1: OOMKilled, exit code 137; read the lines"),
        ([pending("ErrImagePull")], "node 0 has not started: ErrImagePull: no such image; read the lines"),
        ([], "DeadlineExceeded: too long; read the lines"),
    ],
)
def test_what_kubernetes_says_is_told_too(tmp_path: Path, play: list[Step], expected: str) -> None:
    with served(tmp_path, Trainer([*play, end("Failed", "DeadlineExceeded", "too long")])):
        assert f"got {expected}" in refusal()


@pytest.mark.parametrize("status", [400, 503])
def test_a_log_that_cannot_be_read_hides_no_end(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    """A pod that never started a container has none; a node that is lost does not hand it out."""

    def unreadable(trainer: Trainer, _: dict[str, Any]) -> None:
        trainer.log_status = status

    def readable(trainer: Trainer, _: dict[str, Any]) -> None:
        trainer.log_status = 200

    caplog.set_level("INFO", "spin")
    monkeypatch.setattr(launch, "SECONDS_AWAY", 0)
    with served(tmp_path, Trainer([running("one"), unreadable, running("two"), readable, end("Complete")])):
        run()
    assert capsys.readouterr().out.split() == ["one", "two"]
    assert len([line for line in caplog.messages if "the log of " in line]) == 1, "at each look would be too often"
    with served(tmp_path, Trainer([unreadable, running("one"), failed(1, reason="Evicted"), end("Failed")])) as trainer:
        assert "got node 1: Evicted, exit code 2; read the lines" in refusal()
    assert trainer.made == ["POST", "DELETE"]


def test_somebody_else_deletes_it(tmp_path: Path) -> None:
    def deleted(trainer: Trainer, job: dict[str, Any]) -> None:
        del trainer.jobs[job["metadata"]["name"]]

    with served(tmp_path, Trainer([running("one"), deleted])):
        assert "got it deleted by somebody else; run again" in refusal()


def left_behind(tmp_path: Path, change: Callable[[Trainer, dict[str, Any]], None]) -> tuple[Trainer, dict[str, Any]]:
    """Return a trainer that holds the TrainJob of a launcher that has died, changed."""
    jobs: list[dict[str, Any]] = []
    with served(tmp_path, Trainer([lambda _, job: jobs.append(job), end("Complete")])):
        run()
    job = jobs[0] | {"status": {}}
    job["metadata"]["ownerReferences"][0]["uid"] = "uid-0"
    trainer = Trainer()
    trainer.jobs[NAME] = job
    change(trainer, job)
    return trainer, job


def test_a_train_job_under_way_is_followed(tmp_path: Path) -> None:
    trainer, job = left_behind(tmp_path, lambda *_: None)
    trainer.play = iter([running("on"), end("Complete")])
    with served(tmp_path, trainer):
        run()
    assert trainer.made == ["POST", "PATCH", "DELETE"]
    assert job["metadata"]["ownerReferences"][0]["uid"] == "uid-1"


def _of_three_nodes(_: Trainer, job: dict[str, Any]) -> None:
    job["spec"]["trainer"]["numNodes"] = 3


@pytest.mark.parametrize("change", [end("Failed"), end("Complete"), _of_three_nodes], ids=["failed", "done", "other"])
def test_what_an_earlier_attempt_left_goes_first(tmp_path: Path, change: Step) -> None:
    trainer, _ = left_behind(tmp_path, change)
    looks: Step = lambda *_: None  # noqa: E731
    trainer.play = iter([looks, running("new"), end("Complete")])
    with served(tmp_path, trainer):
        run()
    assert trainer.made == ["POST", "DELETE", "POST", "DELETE"]


def test_asked_to_stop_it_stops_the_nodes(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with served(tmp_path, Trainer([running("one"), stop])) as trainer, pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 128 + signal.SIGTERM
    assert trainer.made == ["POST", "DELETE"]
    assert trainer.jobs == {}


def test_asked_to_stop_it_does_not_wait_for_its_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop_soon(*_: object) -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LOOKS", 60)
    monkeypatch.setattr(launch.logger, "propagate", True)
    began = time.monotonic()
    with (
        caplog.at_level(logging.INFO, "spin"),
        served(tmp_path, Trainer([stop_soon])) as trainer,
        pytest.raises(SystemExit),
    ):
        run()
    assert time.monotonic() - began < 30
    assert trainer.made == ["POST", "DELETE"]
    assert f"kubectl -n runs delete trainjob {NAME}" in caplog.text


def test_numbers_as_loops_in_kubeflow_pipelines_hand_them_over(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = []
    with served(tmp_path, Trainer([lambda _, job: jobs.append(job), end("Complete")])):
        launch.launch(PLACE, 2.0, 3.0, 2.0, 4.0, SETTINGS)  # type: ignore[arg-type]
    (trainer,) = (job["spec"]["trainer"] for job in jobs)
    assert (jobs[0]["metadata"]["name"], trainer["command"][-3:], repr(trainer["numNodes"])) == (
        NAME,
        ["--iteration=2", "--shards=3", "--accelerators=4"],
        "2",
    )
    with pytest.raises(SpinError, match="expected an iteration number"):
        launch.launch(PLACE, 0, 3, 2, 4, SETTINGS)


def test_a_server_that_is_away_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = [], Trainer.answer

    def unwell(self: Trainer, *arguments: Any) -> tuple[int, Any]:
        asked.append(arguments)
        return (503, {"message": "etcd"}) if 4 <= len(asked) <= 9 else answer(self, *arguments)

    monkeypatch.setattr(Trainer, "answer", unwell)
    with served(tmp_path, Trainer([running("one"), end("Complete")])) as trainer:
        run()
    assert trainer.jobs == {}
    asked.clear()
    monkeypatch.setattr(launch, "SECONDS_AWAY", 0)
    with served(tmp_path, Trainer([running("one"), end("Complete")])) as trainer:
        assert "got 503" in refusal()
    assert list(trainer.jobs) == [NAME], "the next attempt finds it"


def test_what_is_missing_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpinError, match=r"expected Kubeflow Pipelines 2\.15 or newer"):
        run()
    with served(tmp_path, Trainer()), pytest.raises(SpinError, match="got no such settings"):
        run(PodSettings({}))
    with served(tmp_path, Trainer(installed=False)):
        assert refusal() == "expected Kubeflow Trainer, got none in this cluster; install it, or set train_nodes to 1"
    with served(tmp_path, Trainer(), status=403):
        assert "access.yaml" in refusal()
    monkeypatch.setenv("KFP_POD_NAME", "another")
    with served(tmp_path, Trainer()):
        assert "set KFP_POD_NAME" in refusal()


def test_a_trainer_that_is_too_old_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kubernetes_api.schema_fault", lambda _: 'unknown field "spec.runtimePatches"')
    with served(tmp_path, Trainer()):
        assert refusal() == (
            'expected a TrainJob, got 400 unknown field "spec.runtimePatches"; needed is Kubeflow Trainer 2.2 or newer'
        )


def test_the_task_hands_on_what_kubeflow_pipelines_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def train_on_nodes(*arguments: Any) -> Index:
        given.extend(arguments)
        facts = {"verdict": "improved", "reason": "why", "final_loss": 0.5, "held_out": {"error_change": {"value": -1}}}
        outputs = {"model": Ref(kind="folder", digest="0" * 64, size=1, uri="s3://spin/folders/0")}
        return Index(stage="s", iteration=2, inputs={}, outputs=outputs, facts=facts, seconds=3, items=4, producer={})

    monkeypatch.setattr(launch, "train_on_nodes", train_on_nodes)
    model, metrics = dsl.Model(uri=str(tmp_path / "model")), dsl.Metrics()
    model.path = str(tmp_path / "model")
    pod = dsl.TaskConfig(
        resources=dict(SETTINGS.resources),
        env=[SECRET, REGION],
        node_selector={"pool": "gpu"},
        tolerations=SETTINGS.tolerations,
    )
    where = (PLACE.store_uri, PLACE.store_endpoint, PLACE.tracking_uri, PLACE.experiment)
    spin_train_nodes.python_func(PLACE.run_key, 2, 3, 2, 4, *where, [], model, metrics, pod)
    assert given == [PLACE, 2, 3, 2, 4, SETTINGS]
    assert (model.metadata["verdict"], model.metadata["iteration"]) == ("improved", 2)
    assert metrics.metadata == {"final_loss": 0.5, "held_out_error_change": -1, "seconds": 3}
