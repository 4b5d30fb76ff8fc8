"""The object store's users, as the manifests make them, on the real server: each may do its own part and no more."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from minio import Minio
from minio.error import S3Error

from pipelines import laptop
from spin.errors import SpinError
from spin.preflight import try_scorers_keys
from spin.progress import Progress, forget
from spin.run import Run
from spin.store import Ref, Store

pytestmark = pytest.mark.integration
MANIFESTS = Path(__file__).parents[2] / "manifests"


@dataclass(frozen=True)
class Users:
    """A server with the users of the manifests; ``keys`` by role."""

    endpoint: str
    keys: dict[str, tuple[str, str]]

    def environment(self, role: str) -> dict[str, str]:
        access, secret = self.keys[role]
        return {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret}

    def client(self, role: str) -> Minio:
        return Minio(self.endpoint.removeprefix("http://"), *self.keys[role], secure=False, region=laptop.REGION)


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    folder = tmp_path_factory.mktemp("roles")
    subprocess.run([sys.executable, MANIFESTS / "secrets" / "generate.py", folder], check=True)
    config = folder / "platform" / "s3.json"
    keys = {
        user["name"]: (user["credentials"][0]["accessKey"], user["credentials"][0]["secretKey"])
        for user in json.loads(config.read_text())["identities"]
    }
    ports = laptop._free_ports(5)
    (folder / "s3").mkdir()
    command = [*laptop._s3_command(folder, ports), f"-s3.config={config}"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    found = Users(f"http://{laptop.HOST}:{ports[0]}", keys)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=clean, start_new_session=True)
    try:
        # The Job of the manifests: it waits for the server and makes the buckets.
        script = [sys.executable, MANIFESTS / "components" / "buckets" / "buckets.py", "spin", "mlflow"]
        settings = {"AWS_ENDPOINT_URL_S3": found.endpoint, "AWS_DEFAULT_REGION": laptop.REGION, "WAIT_SECONDS": "120"}
        said = [
            subprocess.run(
                script, env=clean | settings | found.environment("root"), check=True, capture_output=True, text=True
            ).stdout
            for _ in range(2)
        ]
        assert said == ["spin: made\nmlflow: made\n", "spin: was there\nmlflow: was there\n"]
        time.sleep(1)  # the admin server comes up last, and stopping does not work before that
        yield found
    finally:
        laptop._stop([psutil.Process(process.pid)])
        process.wait()
        laptop._remove_sockets(ports)


def store(users: Users, role: str, patch: pytest.MonkeyPatch) -> Store:
    for name, value in users.environment(role).items():
        patch.setenv(name, value)
    return Store("s3://spin", users.endpoint)


@pytest.fixture
def model(users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ref:
    """Return a model that the pipeline's own key has stored."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"weights")
    return store(users, "pipeline", monkeypatch).put_folder(tmp_path / "model")


def test_the_scorer_reads_models_and_writes_scores(
    users: Users, model: Ref, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIN_CACHE", str(tmp_path / "cache"))
    scorer = store(users, "scorer", monkeypatch)

    scorer.check()
    assert (scorer.get(model) / "weights.safetensors").read_bytes() == b"weights"
    (tmp_path / "scores").write_bytes(b"scores")
    assert scorer.put_file(tmp_path / "scores").digest
    scorer.write_json("runs/a/iteration-001/score.json", {"done": True})


def test_the_scorer_keeps_and_removes_parts_of_scores(
    users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a score task does it, which a node's end may stop; another stage's parts it may not write."""
    monkeypatch.setenv("SPIN_CACHE", str(tmp_path / "cache"))
    run = Run(store(users, "scorer", monkeypatch), "a")
    (tmp_path / "chunk").mkdir()
    (tmp_path / "chunk" / "scores.parquet").write_bytes(b"scores")

    Progress(run, "iteration-002/score-0000-of-0001", {}).add(tmp_path / "chunk", 1.0)
    again = Progress(run, "iteration-002/score-0000-of-0001", {})
    assert (again.folders[0] / "scores.parquet").read_bytes() == b"scores"
    forget(run, again.stage)
    names = {str(item.object_name) for item in users.client("root").list_objects("spin", recursive=True)}
    assert not [name for name in names if name.startswith("parts/") or "iteration-002" in name]
    with pytest.raises(SpinError, match="AccessDenied"):
        Progress(run, "iteration-002/train", {}).add(tmp_path / "chunk", 1.0)


def test_the_scorer_writes_no_models(users: Users, model: Ref, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = store(users, "scorer", monkeypatch)
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged" / "weights.safetensors").write_bytes(b"forged")

    with pytest.raises(SpinError, match="AccessDenied"):
        scorer.put_folder(tmp_path / "forged")
    with pytest.raises(SpinError, match="AccessDenied"):
        scorer.write_json(f"folders/{model.digest}.json", {})
    with pytest.raises(SpinError, match="AccessDenied"):
        scorer.remove(model)
    names = {item.object_name for item in users.client("root").list_objects("spin", "folders/", recursive=True)}
    assert names == {f"folders/{model.digest}.json", f"folders/{model.digest}/weights.safetensors"}


@pytest.mark.parametrize(("role", "bucket"), [("pipeline", "mlflow"), ("scorer", "mlflow"), ("mlflow", "spin")])
def test_nobody_reaches_into_anothers_bucket(users: Users, model: Ref, role: str, bucket: str) -> None:
    client = users.client(role)
    calls: list[Any] = [
        lambda: list(client.list_objects(bucket, recursive=True)),
        lambda: client.get_object(bucket, f"folders/{model.digest}.json"),
        lambda: client.fput_object(bucket, "mine", __file__),
        lambda: client.make_bucket("another"),
    ]
    for call in calls:
        with pytest.raises(S3Error) as refused:
            call()
        assert refused.value.code == "AccessDenied"


def test_mlflow_has_its_own_bucket(users: Users) -> None:
    client = users.client("mlflow")

    client.fput_object("mlflow", "1/artifact", __file__)
    assert [item.object_name for item in client.list_objects("mlflow", recursive=True)] == ["1/artifact"]
    client.remove_object("mlflow", "1/artifact")


def test_strangers_are_refused(users: Users) -> None:
    stranger = Minio(users.endpoint.removeprefix("http://"), secure=False, region=laptop.REGION)

    with pytest.raises(S3Error) as refused:
        list(stranger.list_objects("spin"))
    assert refused.value.code == "AccessDenied"


def test_the_scorers_keys_are_tried_where_it_may_write(users: Users, monkeypatch: pytest.MonkeyPatch) -> None:
    store(users, "scorer", monkeypatch)
    try_scorers_keys("s3://spin", users.endpoint)

    store(users, "mlflow", monkeypatch)
    with pytest.raises(SpinError, match=r"score_secret, got: .*"):
        try_scorers_keys("s3://spin", users.endpoint)
