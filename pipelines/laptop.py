"""A real S3 server (SeaweedFS) and a real MLflow server on this computer, for the demo and the tests."""

import contextlib
import fcntl
import http.client
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import psutil
import urllib3
from minio import Minio
from minio.error import MinioException

from spin.errors import SpinError

HOST = "127.0.0.1"
REGION = "us-east-1"
BUCKETS = ("spin", "mlflow")
START_SECONDS = 180.0
STOP_SECONDS = 10.0

# SeaweedFS listens for gRPC at the HTTP port + 10000, and its worker finds the admin server by that rule alone. Both
# ranges lie below the ports that the kernel hands out to outgoing connections.
_PORTS = range(12000, 22000)
_GRPC = 10000
_SERVICES = ("s3", "master", "volume", "filer", "admin")

# Runs beside the server in its process group and holds the reading end of a pipe whose writing end only the owner
# has: however the owner ends, the pipe closes and the group is stopped. A parent-death signal would not do: it fires
# when the starting thread ends, does not reach MLflow's own children, and exists on Linux only.
_GUARDED = (
    "exec 3<&0 </dev/null; "
    "(trap '' INT TERM; read -r _ <&3; kill -TERM 0; "
    "for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 $$ || break; sleep 1; done 2>/dev/null; kill -KILL 0) & "
    'exec 3<&-; exec "$@"'
)


@dataclass(frozen=True)
class Laptop:
    """Where the two servers listen, and the key that opens the store."""

    s3_endpoint: str
    mlflow_uri: str
    """Empty where MLflow was not asked for."""
    access_key: str
    secret_key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which boto3, MLflow and the components reach the servers."""
        variables = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.s3_endpoint,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }
        return variables | ({"MLFLOW_TRACKING_URI": self.mlflow_uri} if self.mlflow_uri else {})


@contextmanager
def laptop(folder: Path, mlflow_port: int | None = None, with_mlflow: bool = True) -> Iterator[Laptop]:
    """Run the servers on the data in ``folder`` until the block ends; they listen on this computer only.

    The folder keeps ``s3/``, ``mlflow.db``, ``credentials.json`` and ``logs/``; one process at a time may use it.
    ``mlflow_port`` fixes the port of MLflow, otherwise every port is chosen anew.
    """
    folder = folder.resolve()
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        (folder / "s3").mkdir(exist_ok=True)
    except OSError as error:
        raise SpinError(f"expected a folder to write to, got {error}; choose another folder") from error
    with ExitStack() as stack:
        stack.enter_context(_lock(folder))
        _stop_leftovers(folder)
        any_port, *s3_ports = _free_ports(1 + len(_SERVICES))
        if with_mlflow and mlflow_port and not _is_free(mlflow_port):
            raise SpinError(f"expected a free port for MLflow, got {mlflow_port}, which is in use; choose another one")
        access_key, secret_key = _credentials(folder / "credentials.json")
        mlflow_uri = f"http://{HOST}:{mlflow_port or any_port}" if with_mlflow else ""
        found = Laptop(f"http://{HOST}:{s3_ports[0]}", mlflow_uri, access_key, secret_key)

        # Left over from earlier ports; what they knew is in the volumes.
        for state in (folder / "s3").glob("m" + "[0-9]" * 5):
            shutil.rmtree(state)
        stack.callback(_remove_sockets, s3_ports)
        servers = stack.enter_context(_servers(folder, _server_environment(found)))
        s3 = servers.start("S3", _s3_command(folder, s3_ports), logs / "s3.log")
        mlflow = None
        if with_mlflow:
            mlflow = servers.start("MLflow", _mlflow_command(folder, mlflow_port or any_port), logs / "mlflow.log")
        deadline = time.monotonic() + START_SECONDS
        s3.wait(lambda: _check_s3(found, s3_ports), deadline)
        if mlflow:
            mlflow.wait(lambda: _check_mlflow(found), deadline)
        yield found


@dataclass(frozen=True)
class _Server:
    name: str
    command: list[str]
    log: Path
    popen: subprocess.Popen[bytes]
    process: psutil.Process

    def wait(self, check: Callable[[], None], deadline: float) -> None:
        """Return when ``check`` passes; refuse when the server has ended or time is up."""
        while True:
            problem: Exception
            try:
                check()
                return
            except (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, MinioException) as error:
                problem = error
            if (code := self.popen.poll()) is not None:
                raise SpinError(f"expected the {self.name} server to run, got exit code {code}; see {self.log}")
            if time.monotonic() > deadline:
                raise SpinError(
                    f"expected the {self.name} server to answer within {START_SECONDS:.0f} s, got {problem!r}; "
                    f"see {self.log}"
                )
            time.sleep(0.1)


class _Servers:
    def __init__(self, record: Path, environment: Mapping[str, str], guard: int) -> None:
        self._record, self._environment, self._guard = record, environment, guard
        self.started: list[_Server] = []

    def start(self, name: str, command: list[str], log: Path) -> _Server:
        with log.open("wb") as output:
            popen = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDED, "laptop", *command],
                stdin=self._guard,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._record.parent,
                env=self._environment,
                start_new_session=True,
            )
        server = _Server(name, command, log, popen, psutil.Process(popen.pid))
        self.started.append(server)
        rows = [
            {"pid": s.popen.pid, "create_time": s.process.create_time(), "command": s.command} for s in self.started
        ]
        _write(self._record, rows)
        return server


@contextmanager
def _servers(folder: Path, environment: Mapping[str, str]) -> Iterator[_Servers]:
    """Give a starter of servers, all of which end with the block, and with this process in any case."""
    reading, writing = os.pipe()
    servers = _Servers(folder / "servers.json", environment, reading)
    try:
        yield servers
    finally:
        _stop([server.process for server in servers.started])
        for server in servers.started:
            server.popen.wait()
        (folder / "servers.json").unlink(missing_ok=True)
        os.close(reading)
        os.close(writing)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpinError(
                f"expected {folder} to be unused, got another process that runs its servers; stop that one or choose "
                "another folder"
            ) from None
        yield


def _stop_leftovers(folder: Path) -> None:
    """Stop the servers of an owner that could not do so itself."""
    record = folder / "servers.json"
    try:
        rows = json.loads(record.read_text())
        leftovers = [process for row in rows if (process := _find(**row))]
    except FileNotFoundError:
        return
    except (ValueError, TypeError) as error:
        raise SpinError(
            f"expected a list of servers in {record}, got {error}; stop servers that still run, then delete the file"
        ) from error
    _stop(leftovers)
    _remove_sockets([int(port) for port in re.findall(r"\.port=(\d+)", json.dumps(rows))])
    record.unlink()


def _find(pid: int, create_time: float, command: list[str]) -> psutil.Process | None:
    """Return the process only if it is the recorded one, not another that got its id."""
    try:
        process = psutil.Process(pid)
        # An interpreter or the guarding shell may stand before the command; a clock adjustment shifts the time.
        same = process.cmdline()[1 - len(command) :] == command[1:] and abs(process.create_time() - create_time) < 2
    except psutil.Error:
        return None
    return process if same else None


def _stop(leaders: list[psutil.Process]) -> None:
    """Stop the process groups of ``leaders``: ask, wait, then kill what is left.

    SeaweedFS now and then hangs when asked. Its data is with the kernel by then, so that a kill loses nothing.
    """
    members = list(leaders)
    for leader in leaders:
        with contextlib.suppress(psutil.Error):
            members += leader.children(recursive=True)
    try:
        _signal(leaders, signal.SIGTERM)
        psutil.wait_procs(leaders, timeout=STOP_SECONDS)
    finally:
        _signal(leaders, signal.SIGKILL)
    psutil.wait_procs(members, timeout=STOP_SECONDS)


def _signal(leaders: list[psutil.Process], number: signal.Signals) -> None:
    for leader in leaders:
        # A group whose members are all gone or unreaped is no error.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader.pid, number)


def _s3_command(folder: Path, ports: list[int]) -> list[str]:
    # The data folder remembers the ports of its last run, so all of them are named.
    options = [
        option
        for name, port in zip(_SERVICES, ports, strict=True)
        for option in (f"-{name}.port={port}", f"-{name}.port.grpc={port + _GRPC}")
    ]
    return [
        _program("weed"),
        "-logtostderr=true",
        "mini",
        f"-dir={folder / 's3'}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *options,
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.preStopSeconds=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
    ]


def _mlflow_command(folder: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--serve-artifacts", "--artifacts-destination", "s3://mlflow"),
    ]


def _program(name: str) -> str:
    """Find a program that a Python package brought along, even where its environment is not on the PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise SpinError(f"expected the program {name}, got none; run: pip install 'spin-diffusion[pipelines]'")
    return path


def _server_environment(found: Laptop) -> dict[str, str]:
    """Return this process's environment without its own ties to other stores and servers."""
    foreign = ("AWS_", "MLFLOW_", "_MLFLOW_", "S3_", "WEED_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    hosts = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST]))
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "no_proxy": hosts, "NO_PROXY": hosts}
    # With its 5 further connections one for each of the 40 threads that answer: else many at once are refused.
    own["MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW"] = "35"
    # A webhook may lead to this computer, and is heard of at once.
    own |= {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    own |= {"MLFLOW_WEBHOOK_CACHE_TTL": "0"}
    return kept | {key: value for key, value in found.environment().items() if key != "MLFLOW_TRACKING_URI"} | own


def _check_s3(found: Laptop, ports: list[int]) -> None:
    """Raise unless every bucket exists (made here if need be) and keeps what is put there."""
    # The admin server comes up last, and SeaweedFS does not stop when asked before that.
    for port in ports:
        for number in (port, port + _GRPC):
            socket.create_connection((HOST, number), timeout=5).close()
    host = found.s3_endpoint.removeprefix("http://")
    with urllib3.PoolManager(timeout=5.0, retries=False) as http_client:
        client = Minio(
            host,
            access_key=found.access_key,
            secret_key=found.secret_key,
            secure=False,
            region=REGION,
            http_client=http_client,
        )
        for bucket in BUCKETS:
            if not client.bucket_exists(bucket):
                client.make_bucket(bucket)
            client.put_object(bucket, ".ready", BytesIO(b"ready"), 5)
            with client.get_object(bucket, ".ready") as answer:
                if answer.read() != b"ready":
                    raise OSError(f"bucket {bucket} returned other bytes than were put")
            client.remove_object(bucket, ".ready")


def _check_mlflow(found: Laptop) -> None:
    connection = http.client.HTTPConnection(found.mlflow_uri.removeprefix("http://"), timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        if (status := connection.getresponse().status) != 200:
            raise OSError(f"/health answered {status}")


def _credentials(path: Path) -> tuple[str, str]:
    """Return the access key and the secret key of the folder, made at the first call."""
    if not path.exists():
        _write(path, {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)})
    try:
        path.chmod(0o600)
        content = json.loads(path.read_text())
        return str(content["access_key"]), str(content["secret_key"])
    except (ValueError, TypeError, KeyError) as error:
        raise SpinError(
            f"expected access_key and secret_key in {path}, got {error!r}; delete the file to get new keys"
        ) from error


def _write(path: Path, content: object) -> None:
    """Write JSON that only the user may read, whole or not at all."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    part.write_text(json.dumps(content))
    part.replace(path)


def _free_ports(count: int) -> list[int]:
    """Return ports that are free and whose gRPC companions are free as well."""
    ports = (port for port in random.SystemRandom().sample(_PORTS, len(_PORTS)) if _is_free(port, port + _GRPC))
    found = [port for port, _ in zip(ports, range(count), strict=False)]
    if len(found) < count:
        raise SpinError(
            f"expected {count} free ports from {_PORTS.start} to {_PORTS.stop}, got {len(found)}; stop other servers"
        )
    return found


def _is_free(*ports: int) -> bool:
    for port in ports:
        with socket.socket() as probe:
            # As the servers do: a connection that has just been closed does not keep the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                return False
    return True


def _remove_sockets(ports: list[int]) -> None:
    """Remove the Unix sockets that SeaweedFS makes beside its ports and does not always take away."""
    for port in ports:
        for number in filter(_is_free, (port, port + _GRPC)):
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                path.unlink(missing_ok=True)
