"""The images as they are run: non-root, read-only, complete; and the whole pipeline in them."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
import requests
import yaml

from pipelines.laptop import Laptop
from spin.run import Run, iteration_stage
from spin.store import Store

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
USER = 10001
Record = Callable[[str, object], None]
MOST_BYTES = {"runtime": 2.5e9, "mlflow": 1.5e9}
# As the restricted Pod Security Standard has it, and nothing writable but /tmp.
RESTRICTED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": {"/tmp": f"rw,uid={USER},gid={USER},mode=1777"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
}


@pytest.fixture(scope="session", params=["runtime", "mlflow"])
def image(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return each image's kind and name."""
    return request.param, request.getfixturevalue(request.param)


def run(client: docker.DockerClient, image: str, *command: str, **options: Any) -> str:
    """Return what a restricted container prints."""
    output: bytes = client.containers.run(image, list(command), remove=True, **(RESTRICTED | options))
    return output.decode()


def test_what_an_image_says_of_itself(
    client: docker.DockerClient, image: tuple[str, str], record_property: Record
) -> None:
    kind, name = image
    found = client.images.get(name)
    config = found.attrs["Config"]

    assert config["User"] == f"{USER}:{USER}"
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["version"] == "0.1.0"
    assert labels["revision"] == "c0ffee"
    assert labels["source"] == "https://git.example/spin"
    assert labels["created"] == "2026-01-01T00:00:00Z"
    assert {"title", "description", "licenses"} <= set(labels)
    record_property("megabytes", round(found.attrs["Size"] / 1e6))
    assert found.attrs["Size"] < MOST_BYTES[kind]
    assert not [entry for entry in config["Env"] if "KEY" in entry or "SECRET" in entry or "PASSWORD" in entry]


def test_nothing_to_build_with_and_nothing_of_this_machine_is_left(
    client: docker.DockerClient, image: tuple[str, str]
) -> None:
    said = run(
        client,
        image[1],
        *("sh", "-c", "id -u; ls /opt/venv/bin; ls /build /etc/pip.conf /run/secrets 2>&1; touch /opt/x 2>&1 || true"),
    )
    tools = run(client, image[1], "sh", "-c", "for tool in cc gcc ld as make git; do command -v $tool; done; true")

    assert said.splitlines()[0] == str(USER)
    assert "pip" not in said.split()
    assert not tools, "the CUDA image alone has a compiler"
    assert said.count("No such file") == 3
    assert "Read-only file system" in said
    built = "\n".join(str(layer.get("CreatedBy")) for layer in client.images.get(image[1]).history())
    assert "127.0.0.1" not in built


def test_the_cuda_image_can_compile(
    client: docker.DockerClient, base_image: str, cuda_base: str, record_property: Record
) -> None:
    """As Triton does for every kernel that torch.compile makes: a C module for this Python, as the image's user."""
    options = {"tmpfs": {"/tmp": f"{RESTRICTED['tmpfs']['/tmp']},exec"}, "user": str(USER)}
    assert run(client, cuda_base, "python3", "-c", COMPILE, **options).strip() == "42"
    tools = run(client, cuda_base, "sh", "-c", "for tool in make git; do command -v $tool; done; true")
    assert not tools, "no more than torch.compile needs"
    more = client.images.get(cuda_base).attrs["Size"] - client.images.get(base_image).attrs["Size"]
    record_property("megabytes of the compiler", round(more / 1e6))
    assert more < 3e8


COMPILE = """
import pathlib, subprocess, sys, sysconfig
source = pathlib.Path("/tmp/answer.c")
source.write_text('''
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_answer(void) {
  PyObject *made = PyModule_Create(&module);
  PyModule_AddIntConstant(made, "answer", 42);
  return made;
}
''')
include = sysconfig.get_path("include")
subprocess.run(["gcc", "-O3", "-shared", "-fPIC", f"-I{include}", "-o", "/tmp/answer.so", str(source)], check=True)
sys.path.insert(0, "/tmp")
import answer
print(answer.answer)
"""


def test_the_packages_are_the_pinned_ones(client: docker.DockerClient, image: tuple[str, str]) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    lines = run(client, image[1], "cat", "/opt/venv/packages.txt").splitlines()
    packages = dict(line.split("==") for line in lines if "==" in line)

    assert len(packages) > 50
    for name, version in packages.items():
        if (key := name.lower().replace("_", "-")) not in ("pip", "setuptools"):
            assert version.partition("+")[0] == pinned.get(key), name


def test_the_packages_are_listed_for_auditors(
    client: docker.DockerClient, image: tuple[str, str], tmp_path: Path
) -> None:
    """``make sbom``, in CycloneDX's form."""
    command = ["make", "sbom", f"SBOM={tmp_path}", f"PYTHON={sys.executable}"]
    subprocess.run([*command, f"IMAGES={image[1]}"], cwd=ROOT, check=True)
    name = image[1].rpartition("/")[2].partition(":")[0]
    found = json.loads((tmp_path / f"{name}.cdx.json").read_text())
    assert found["bomFormat"] == "CycloneDX"
    listed = {part["name"]: part["version"] for part in found["components"]}
    packages = dict(line.split("==") for line in run(client, image[1], "cat", "/opt/venv/packages.txt").splitlines())
    assert listed == packages
    assert subprocess.run([*command, "IMAGES=spin-test/none:1"], cwd=ROOT).returncode


def test_a_component_needs_nothing_else(client: docker.DockerClient, runtime: str, record_property: Record) -> None:
    started = time.monotonic()
    imports = "import kfp.dsl.executor_main, spin.stages.train, spin.scoring, spin.preflight"
    said = run(client, runtime, "python3", "-c", imports, environment={"_KFP_RUNTIME": "true"})
    record_property("start and imports, seconds", round(time.monotonic() - started, 1))

    assert "Traceback" not in said
    assert "preflight" in run(client, runtime, "python3", "-m", "spin", "--help")


def test_the_mlflow_image_serves(
    client: docker.DockerClient, mlflow: str, laptop_servers: Laptop, record_property: Record
) -> None:
    servers = laptop_servers.environment().items()
    keys = {name: value for name, value in servers if name.startswith(("AWS_", "MLFLOW_S3"))}
    settings = {"MLFLOW_BACKEND_STORE_URI": "sqlite:////tmp/mlflow.db", "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow"}
    serve = "mlflow server --host 127.0.0.1 --port 15073 --serve-artifacts"
    objects = yaml.safe_load_all((ROOT / "tests" / "golden" / "manifests-kind.yaml").read_text())
    migration = next(item for item in objects if item["metadata"]["name"] == "mlflow-migration")
    (migrate,) = migration["spec"]["template"]["spec"]["containers"]
    command = f"{shlex.join(migrate['args'])} && exec {serve}"
    started = time.monotonic()
    container = client.containers.run(
        mlflow, ["sh", "-c", command], environment=keys | settings, network_mode="host", detach=True, **RESTRICTED
    )
    uri = "http://127.0.0.1:15073"
    try:
        while True:
            try:
                version = requests.get(f"{uri}/version", timeout=5).text
                break
            except requests.ConnectionError:
                container.reload()
                assert container.status != "exited", container.logs().decode()[-3000:]
                assert time.monotonic() - started < 300
                time.sleep(1)
        record_property(f"seconds until MLflow {version} answers", round(time.monotonic() - started, 1))
        # An artifact goes through the server into S3: database, proxy and boto3 work.
        put = requests.put(f"{uri}/api/2.0/mlflow-artifacts/artifacts/probe.txt", data=b"hello", timeout=60)
        assert put.status_code == 200, put.text
        got = requests.get(f"{uri}/api/2.0/mlflow-artifacts/artifacts/probe.txt", timeout=60)
        assert got.content == b"hello"
        assert "psycopg" in run(client, mlflow, "python3", "-c", "import psycopg, boto3; print(psycopg.__name__)")
    finally:
        container.remove(force=True)


def test_the_pipeline_runs_in_containers(
    runtime: str, laptop_servers: Laptop, tmp_path: Path, record_property: Record
) -> None:
    """KFP's DockerRunner, each task a restricted container; S3 and MLflow are outside."""
    root = tmp_path / "pipeline"
    root.mkdir()
    for folder in (*tmp_path.parents, tmp_path, root):
        # The containers' user must get through to the folder that it shares with KFP, and write there.
        if folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(0o777)
    params = {
        "run_key": "containers",
        "iterations": 1,
        "shards": 1,
        "gpu_count": 0,
        "gpu_pool": {},
        "store_uri": "s3://spin/containers",
        "store_endpoint": laptop_servers.s3_endpoint,
        "tracking_uri": laptop_servers.mlflow_uri,
        "experiment": "containers",
        "model_name": "containers",
        "overrides": {
            "data": {"limit": 160},
            "generate": {"num_inference_steps": 2},
            "train": {"steps": [2], "batch_size": 8, "micro_batch_size": 8, "checkpoint_every": 2},
            "score": {"max_prompts": 4},
        },
    }
    (tmp_path / "params.json").write_text(json.dumps(params))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPIN_COMMIT")}
    environment |= laptop_servers.environment() | {"SPIN_RUNTIME_IMAGE": runtime, "OMP_NUM_THREADS": "1"}
    compiled = tmp_path / "spin.yaml"
    subprocess.run(
        [sys.executable, ROOT / "pipelines" / "spin.py", "--check", "--output", compiled], check=True, env=environment
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(compiled), str(tmp_path / "params.json"), str(root), json.dumps(RESTRICTED)],
        env=environment,
        capture_output=True,
        text=True,
        umask=0,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    record_property("seconds", round(time.monotonic() - started))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in laptop_servers.environment().items():
            patch.setenv(name, value)
        run = Run(Store("s3://spin/containers", laptop_servers.s3_endpoint), "containers")
        stages = ["prepare", "register", *(iteration_stage(k, "score") for k in (0, 1)), iteration_stage(1, "train")]
        indexes = [run.find(stage) for stage in stages]
    assert all(indexes)
    # The image's commit: it was computed there.
    assert {index.producer["commit"] for index in indexes if index} == {"c0ffee"}
    (table,) = root.rglob("preflight/table")
    assert table.read_text().startswith("# Preflight: ready")


# In a process of its own: KFP's local runner changes builtins and keeps what it was told.
RUN = """
import json, os, sys
from kfp import components, local
package, params, root, restricted = sys.argv[1:]
names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "OMP_NUM_THREADS")
environment = {name: os.environ[name] for name in names}
options = json.loads(restricted) | {"environment": environment}
hosts = {"network_mode": "host"}
local.init(local.DockerRunner(**options, **hosts), pipeline_root=root)
components.load_component_from_file(package)(**json.loads(open(params).read()))
"""
