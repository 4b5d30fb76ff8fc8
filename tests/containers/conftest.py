"""A docker daemon, a base image and both images, as the bake file has them; what is missing skips the tests, or, with
CI=true, fails them.

No registry is needed: the base image is a Debian with Python, made here. PyTorch for the CPU comes from its usual
index, or, where that is out of reach, from wherever pip found the one of this environment. What was built is kept in
``build/docker``.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any, NoReturn

import docker
import pytest
import requests
import torch

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "docker"
BASE_IMAGE = "spin-test/python:bookworm"
BAKE = json.loads((ROOT / "images" / "docker-bake.json").read_text())
VARIABLES = {"REGISTRY": "spin-test", "VERSION": "0.1.0", "COMMIT": "c0ffee"}
VARIABLES |= {"SOURCE": "https://git.example/spin", "CREATED": "2026-01-01T00:00:00Z"}
TORCH_INDEX = BAKE["target"]["runtime-cpu"]["args"]["TORCH_INDEX"]
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def _without(reason: str) -> NoReturn:
    """End a test that cannot run here."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _answers() -> bool:
    try:
        return bool(docker.from_env(timeout=10).ping())
    except docker.errors.DockerException:
        return False


@pytest.fixture(scope="session")
def daemon() -> Iterator[None]:
    """Use the daemon that DOCKER_HOST names or that runs here; else start one and stop it afterwards."""
    if _answers():
        yield
        return
    if not shutil.which("dockerd") or os.geteuid():
        _without("no docker daemon answers, and none can be started here: that needs dockerd and root")
    KEPT.mkdir(parents=True, exist_ok=True)
    socket = KEPT / "docker.sock"
    with (KEPT / "dockerd.log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(
            [
                *("dockerd", "--data-root", KEPT / "data", "--exec-root", KEPT / "exec"),
                *("--pidfile", KEPT / "dockerd.pid", "--host", f"unix://{socket}"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        patch.setenv("DOCKER_HOST", f"unix://{socket}")
        try:
            deadline = time.monotonic() + 60
            while not _answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    _without(f"dockerd does not start: see {KEPT / 'dockerd.log'}")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="session")
def client(daemon: None) -> Iterator[docker.DockerClient]:  # noqa: ARG001
    made = docker.from_env(timeout=600)
    yield made
    made.close()


def _program() -> str:
    """Return the docker command of the distribution: another one on the PATH may lack BuildKit."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


@pytest.fixture(scope="session")
def base_image(client: docker.DockerClient) -> str:
    if not client.images.list(BASE_IMAGE):
        if not shutil.which("debootstrap"):
            _without(f"no image {BASE_IMAGE}, and no debootstrap to make one")
        folder = KEPT / "debian"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", folder], check=True)
        pack = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)
        subprocess.run([_program(), "import", "-", BASE_IMAGE], stdin=pack.stdout, check=True)
        assert pack.wait() == 0
        shutil.rmtree(folder)
    return BASE_IMAGE


def baked(name: str) -> dict[str, Any]:
    """Return a target of the bake file with what it inherits and the tests' variables in place."""
    variables = {key: entry["default"] for key, entry in BAKE["variable"].items()} | VARIABLES
    found: dict[str, Any] = json.loads(Template(json.dumps(BAKE["target"][name])).substitute(variables))
    for parent in map(baked, found.pop("inherits", [])):
        found = parent | found | {"args": parent.get("args", {}) | found.get("args", {})}
    return found


def _build(name: str, folder: Path, stage: str = "", **arguments: str) -> str:
    target = baked(name)
    (tag,) = target["tags"]
    # This machine's way to PyPI, if it has one of its own; as secrets, so that nothing of it stays in the image.
    settings = folder / "pip.conf"
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    cert = CERTIFICATES if "cert=" in listed else ""
    settings.write_text(f"[global]\ntimeout = 180\n{f'cert = {cert}' if cert else ''}\n")
    command = [_program(), "build", "--network=host", "--file", target["dockerfile"]]
    if stage:
        tag = f"{tag}-{stage}"
        command += ["--target", stage]
    command += ["--tag", tag]
    command += ["--secret", f"id=pip,src={settings}"]
    if cert:
        command += ["--secret", f"id=ca,src={CERTIFICATES}"]
    for key, value in (target["args"] | arguments).items():
        command += ["--build-arg", f"{key}={value}"]
    done = subprocess.run(
        [*command, target["context"]],
        cwd=ROOT,
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stderr[-5000:]}", pytrace=False)
    return tag


@pytest.fixture(scope="session")
def torch_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the address of an index with PyTorch for the CPU."""
    try:
        requests.head(TORCH_INDEX, timeout=10)
    except requests.RequestException:
        folder = tmp_path_factory.mktemp("index")
        wanted = f"torch=={torch.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder / "torch", wanted]
        if subprocess.run(command, capture_output=True).returncode:
            _without(f"{TORCH_INDEX} is out of reach, and pip finds no {wanted} elsewhere")
        handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
        try:
            # Always the same port: the address is part of what a built layer is found again by.
            server = ThreadingHTTPServer(("127.0.0.1", 18099), handler)
        except OSError:
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        with server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/"
            server.shutdown()
    else:
        yield TORCH_INDEX


@pytest.fixture(scope="session")
def built(base_image: str, torch_index: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the names of the CPU runtime's and the MLflow server's image, built side by side."""
    arguments = {"runtime-cpu": {"TORCH_INDEX": torch_index}, "mlflow": {}}
    with ThreadPoolExecutor() as pool:
        under_way = {
            name: pool.submit(_build, name, tmp_path_factory.mktemp(name), BASE_IMAGE=base_image, **own)
            for name, own in arguments.items()
        }
        return {name: each.result() for name, each in under_way.items()}


@pytest.fixture(scope="session")
def runtime(built: dict[str, str]) -> str:
    """Return the CPU runtime image's name."""
    return built["runtime-cpu"]


@pytest.fixture(scope="session")
def cuda_base(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the name of what the CUDA runtime image begins with."""
    return _build("runtime", tmp_path_factory.mktemp("runtime"), stage="base", BASE_IMAGE=base_image)


@pytest.fixture(scope="session")
def mlflow(built: dict[str, str]) -> str:
    """Return the MLflow server image's name."""
    return built["mlflow"]
