"""Backup and restore, by the commands of the manifests and of docs/operations.md: PostgreSQL and the object store."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipelines.laptop import laptop
from spin.store import Store
from tests import policy

pytestmark = pytest.mark.integration
GOLDEN = Path(__file__).parents[1] / "golden" / "manifests-kind.yaml"


class Postgres:
    """A PostgreSQL server of this computer's own programs, in a folder of its own."""

    def __init__(self, programs: Path, folder: Path):
        self.programs, self.folder = programs, folder
        # It refuses to be root.
        self.user = "postgres" if os.geteuid() == 0 else None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])

    def program(self, name: str, *arguments: str) -> None:
        subprocess.run([self.programs / name, *arguments], check=True, user=self.user, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        data = str(self.folder / "data")
        self.program("initdb", "--auth=trust", "--username=mlflow", "--pgdata", data)
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.program("pg_ctl", "--pgdata", data, "--log", str(self.folder / "log"), "--wait", "-o", options, "start")

    def stop(self) -> None:
        self.program("pg_ctl", "--pgdata", str(self.folder / "data"), "--wait", "--mode", "immediate", "stop")

    @property
    def environment(self) -> dict[str, str]:
        """Return what libpq's programs read."""
        return {"PGHOST": "127.0.0.1", "PGPORT": self.port, "PGUSER": "mlflow"}

    def uri(self, database: str) -> str:
        return f"postgresql://mlflow@127.0.0.1:{self.port}/{database}"


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if not found:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            "no PostgreSQL here: apt-get install postgresql"
        )
    folder = Path(tempfile.mkdtemp(prefix="spin-pg-", dir="/tmp"))
    if os.geteuid() == 0:
        entry = pwd.getpwnam("postgres")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    server = Postgres(Path(found).resolve().parent, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def dump_script() -> str:
    """Return what the CronJob of the manifests runs."""
    objects: list[policy.Object] = list(yaml.safe_load_all(GOLDEN.read_text()))
    job = next(item for item in objects if item["kind"] == "CronJob")
    script: str = policy.template_of(job)["spec"]["containers"][0]["args"][0]
    return script


def test_mlflow_comes_back_from_the_nightly_dump(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in postgres.environment.items():
        monkeypatch.setenv(name, value)
    path = f"{postgres.programs}:{os.environ['PATH']}"
    subprocess.run([postgres.programs / "createdb", "mlflow"], check=True)
    # As the migration Job does: from nothing.
    upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", postgres.uri("mlflow")]
    subprocess.run(upgrade, check=True, capture_output=True)
    before = MlflowClient(postgres.uri("mlflow"))
    run = before.create_run(before.create_experiment("kept", artifact_location="s3://mlflow/1"), run_name="run")
    before.log_metric(run.info.run_id, "loss", 0.5)
    before.create_registered_model("player")
    before.create_model_version("player", "s3://spin/folders/x")
    before.set_registered_model_alias("player", "champion", "1")

    (tmp_path / "mlflow-20200101T000000Z.dump").touch()
    os.utime(tmp_path / "mlflow-20200101T000000Z.dump", (0, 0))
    script = dump_script().replace("/backup", str(tmp_path))
    environment = os.environ | {"PGDATABASE": "mlflow", "PATH": path}
    subprocess.run(["/bin/sh", "-ec", script], check=True, env=environment)
    (dump,) = tmp_path.iterdir()
    assert dump.name.startswith("mlflow-20")

    # docs/operations.md, "Restore".
    subprocess.run([postgres.programs / "createdb", "restored"], check=True)
    command = [postgres.programs / "pg_restore", "--no-owner", "--exit-on-error", "--dbname=restored", dump]
    subprocess.run(command, check=True)
    after = MlflowClient(postgres.uri("restored"))
    restored = after.get_run(run.info.run_id)
    assert restored.data.metrics == {"loss": 0.5}
    assert after.get_model_version_by_alias("player", "champion").source == "s3://spin/folders/x"


def test_the_object_store_comes_back_from_a_copy_of_its_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(found: Any) -> Store:
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        return Store("s3://spin", found.s3_endpoint)

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"weights" * 100_000)
    with laptop(tmp_path / "first", with_mlflow=False) as found:
        ref = store(found).put_folder(tmp_path / "model")
        store(found).write_json("runs/a/run.json", {"config": {}})
    # A snapshot: the volume of a stopped server, and the keys.
    shutil.copytree(tmp_path / "first" / "s3", tmp_path / "second" / "s3")
    shutil.copy(tmp_path / "first" / "credentials.json", tmp_path / "second")
    shutil.rmtree(tmp_path / "first")

    monkeypatch.setenv("SPIN_CACHE", str(tmp_path / "cache"))
    with laptop(tmp_path / "second", with_mlflow=False) as found:
        # Each file is compared with its digest as it is read.
        assert (store(found).get(ref) / "weights.safetensors").read_bytes() == b"weights" * 100_000
        assert store(found).read_json("runs/a/run.json") == {"config": {}}
