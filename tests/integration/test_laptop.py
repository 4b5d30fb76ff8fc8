import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import psutil
import pytest
from minio import Minio
from minio.error import S3Error

import pipelines.laptop
from pipelines.laptop import BUCKETS, Laptop, laptop
from spin.errors import SpinError

pytestmark = pytest.mark.integration

OWNER = """
import sys, time
from pathlib import Path
from pipelines.laptop import laptop
with laptop(Path(sys.argv[1]), with_mlflow=False) as found:
    print(found.s3_endpoint, flush=True)
    time.sleep(600)
"""


def client(found: Laptop, secret_key: str = "") -> Minio:
    host = found.s3_endpoint.removeprefix("http://")
    return Minio(host, found.access_key, secret_key or found.secret_key, secure=False, region="us-east-1")


def leaders(folder: Path) -> list[psutil.Process]:
    return [psutil.Process(row["pid"]) for row in json.loads((folder / "servers.json").read_text())]


def family(folder: Path) -> list[psutil.Process]:
    return [process for leader in leaders(folder) for process in (leader, *leader.children(recursive=True))]


def listening(processes: list[psutil.Process]) -> list[tuple[str, int]]:
    return [
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def answers(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_both_servers_answer(laptop_servers: Laptop) -> None:
    import mlflow

    store = client(laptop_servers)
    assert {bucket.name for bucket in store.list_buckets()} == set(BUCKETS)
    store.put_object("spin", "greeting", BytesIO(b"hello"), 5)
    with store.get_object("spin", "greeting") as answer:
        assert answer.read() == b"hello"

    mlflow.set_experiment("laptop")
    with mlflow.start_run() as run:
        mlflow.log_metric("score", 0.5)
        mlflow.log_text("hello", "greeting.txt")
    assert mlflow.get_run(run.info.run_id).data.metrics == {"score": 0.5}
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/greeting.txt") == "hello"
    names = [item.object_name or "" for item in store.list_objects("mlflow", recursive=True)]
    assert [name for name in names if name.endswith(f"{run.info.run_id}/artifacts/greeting.txt")]


def test_environment_leads_to_the_servers(laptop_servers: Laptop) -> None:
    import boto3

    assert os.environ["MLFLOW_TRACKING_URI"] == laptop_servers.mlflow_uri
    names = [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]
    assert set(names) == set(BUCKETS)


def test_wrong_key_is_refused(laptop_servers: Laptop) -> None:
    assert laptop_servers.secret_key not in repr(laptop_servers)
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        list(client(laptop_servers, secret_key="0" * 40).list_buckets())
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{laptop_servers.s3_endpoint}/spin", timeout=10)


def test_folder_keeps_the_data_and_has_one_user(tmp_path: Path) -> None:
    def fail_inside() -> tuple[Laptop, list[psutil.Process], list[tuple[str, int]]]:
        with laptop(tmp_path, with_mlflow=False) as found:
            client(found).put_object("spin", "kept", BytesIO(b"hello"), 5)
            addresses = listening(family(tmp_path))
            seen.append((found, family(tmp_path), addresses))
            raise KeyError("from inside")

    seen: list[tuple[Laptop, list[psutil.Process], list[tuple[str, int]]]] = []
    with pytest.raises(KeyError, match="from inside"):
        fail_inside()
    first, processes, addresses = seen[0]
    assert len(addresses) == 10
    assert {host for host, _ in addresses} == {"127.0.0.1"}
    assert not any(process.is_running() for process in processes)
    assert not any(answers(address) for address in addresses)
    assert not [path for _, port in addresses for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]
    assert not (tmp_path / "servers.json").exists()
    credentials = tmp_path / "credentials.json"
    assert credentials.stat().st_mode & 0o777 == 0o600

    with laptop(tmp_path, with_mlflow=False) as second:
        assert (second.access_key, second.secret_key) == (first.access_key, first.secret_key)
        assert "MLFLOW_TRACKING_URI" not in second.environment()
        with client(second).get_object("spin", "kept") as answer:
            assert answer.read() == b"hello"
        with (
            pytest.raises(SpinError, match=re.escape(f"expected {tmp_path} to be unused")),
            laptop(tmp_path, with_mlflow=False),
        ):
            pass
        assert client(second).bucket_exists("spin")


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_servers_end_with_their_owner(tmp_path: Path, ending: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE)
    with owner:
        assert owner.stdout
        assert owner.stdout.readline().startswith(b"http://127.0.0.1:")
        processes = family(tmp_path)
        owner.send_signal(ending)
    assert gone(processes, 20)


def test_leftovers_of_a_killed_owner_are_stopped(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE)
    with owner:
        assert owner.stdout
        port = int(owner.stdout.readline().rpartition(b":")[2])
        [server] = leaders(tmp_path)
        for guard in server.children(recursive=True):
            guard.kill()
        owner.kill()
    assert answers(("127.0.0.1", port))
    # A process that merely got the id of a former server stays.
    record = tmp_path / "servers.json"
    rows = json.loads(record.read_text())
    innocent = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        rows.append({"pid": innocent.pid, "create_time": time.time(), "command": ["weed", "mini"]})
        rows.append({"pid": innocent.pid, "create_time": time.time() - 60, "command": ["sleep", "600"]})
        record.write_text(json.dumps(rows))
        with laptop(tmp_path, with_mlflow=False) as found:
            assert not server.is_running()
            assert not answers(("127.0.0.1", port))
            assert not Path(f"/tmp/seaweedfs-s3-{port}.sock").exists()
            assert client(found).bucket_exists("spin")
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_server_that_dies_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho no luck\nexit 3\n")
    weed.chmod(0o755)
    monkeypatch.setattr(pipelines.laptop, "_program", lambda name: str(tmp_path / name))
    log = tmp_path / "data" / "logs" / "s3.log"
    with (
        pytest.raises(SpinError, match=f"S3 server to run, got exit code 3; see {re.escape(str(log))}"),
        laptop(tmp_path / "data", with_mlflow=False),
    ):
        pass
    assert log.read_text() == "no luck\n"


def test_server_that_does_not_answer_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weed = tmp_path / "weed"
    weed.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    weed.chmod(0o755)
    monkeypatch.setattr(pipelines.laptop, "_program", lambda name: str(tmp_path / name))
    monkeypatch.setattr(pipelines.laptop, "START_SECONDS", 1.0)
    with (
        pytest.raises(SpinError, match=r"S3 server to answer within 1 s"),
        laptop(tmp_path / "data", with_mlflow=False),
    ):
        pass
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_unusable_surroundings_are_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SpinError, match=f"{port}, which is in use"), laptop(tmp_path, mlflow_port=port):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(SpinError, match="expected a folder to write to"), laptop(tmp_path / "file"):
        pass
    (tmp_path / "credentials.json").write_text("{}")
    with pytest.raises(SpinError, match="expected access_key"), laptop(tmp_path):
        pass
