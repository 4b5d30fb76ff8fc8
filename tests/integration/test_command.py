"""``python pipelines/spin.py`` as a user types it: a process of its own, from some folder, with or without a server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.kfp_contract import ContractServer, serving

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PIPELINE_NAME = "spin-diffusion"
IMAGE = "registry.example/team/spin:1"
SCRIPT = ROOT / "pipelines" / "spin.py"
DEFAULT = ROOT / "build" / "spin-diffusion.yaml"


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with serving() as contract:
        yield contract


def command(
    folder: Path, *arguments: str | Path, script: str | Path = SCRIPT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script in ``folder`` with none of this process's ties to servers, nor its module path."""
    foreign = ("KFP_", "KF_", "SPIN_", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder,
        env=kept
        | {"SPIN_RUNTIME_IMAGE": IMAGE, "HOME": str(folder), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a fault of the user's ends with."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_by_a_relative_path_from_another_folder(tmp_path: Path) -> None:
    before = DEFAULT.stat().st_mtime_ns if DEFAULT.exists() else 0
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    said = succeeds(command(folder, script=os.path.relpath(SCRIPT, folder)))

    assert said.startswith(f"compiled {DEFAULT} (")
    assert said.endswith(
        "no KFP endpoint is configured: set --host or KFP_HOST (and KFP_TOKEN) to upload, or use --local\n"
    )
    assert DEFAULT.stat().st_mtime_ns > before
    assert list(folder.iterdir()) == []


def test_check_with_parameters_by_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("preset: sd15-lora\niterations: 3\noverrides: {train: {beta: [3000]}}\n")

    said = succeeds(command(tmp_path, "--check", "--params", "p.yaml", "--output", "out/spin.yaml"))

    assert said.startswith("compiled out/spin.yaml (")
    assert said.endswith("the pipeline and its parameters are in order\n")
    assert (tmp_path / "out" / "spin.yaml").is_file()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["p.yaml", "spin.yaml"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("itertions: 3\n", "got 'itertions'; did you mean 'iterations'?"),
        ("overrides: {train: {betta: [1]}}\n", "got 'train.betta'; did you mean 'beta'?"),
        ("iterations: [3\n", "expected YAML in p.yaml, got "),
    ],
    ids=["unknown", "unknown-override", "broken"],
)
def test_wrong_parameters(tmp_path: Path, server: ContractServer, content: str, expected: str) -> None:
    (tmp_path / "p.yaml").write_text(content)

    done = command(tmp_path, "--run", "--params", "p.yaml", "--output", "spin.yaml", "--host", server.url)

    assert expected in refusal(done)
    assert server.received == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--run", "--local", "--check"), "expected one of --run, --local and --check, got --run and --local and --ch"),
        (("--local", "--check"), "expected one of --run, --local and --check, got --local and --check; choose one"),
        (("--params", "p.yaml"), "expected --run, --local or --check beside --params, got none; add one: "),
    ],
)
def test_flags_that_contradict_each_other(
    tmp_path: Path, server: ContractServer, arguments: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "p.yaml").write_text("iterations: 3\n")

    done = command(tmp_path, *arguments, "--output", "spin.yaml", "--host", server.url)

    assert refusal(done).startswith(expected)
    assert not (tmp_path / "spin.yaml").exists()
    assert server.received == []


@pytest.mark.parametrize("flags", [(), ("--run",)], ids=["upload", "run"])
def test_an_upload_needs_an_image_of_ones_own(tmp_path: Path, server: ContractServer, flags: tuple[str, ...]) -> None:
    done = command(tmp_path, *flags, "--output", "spin.yaml", "--host", server.url, SPIN_RUNTIME_IMAGE="")

    assert "nothing was uploaded: set SPIN_RUNTIME_IMAGE to it" in refusal(done)
    assert server.pipelines == server.runs == {}


def test_each_script_runs_a_pipeline_of_its_own(tmp_path: Path, server: ContractServer) -> None:
    for script in ("spin.py", "compare.py"):
        done = command(
            tmp_path, "--run", "--output", f"{script}.yaml", "--host", server.url, script=ROOT / "pipelines" / script
        )
        assert succeeds(done).splitlines()[1].startswith("created the pipeline with version ")

    assert [pipeline["name"] for pipeline in server.pipelines.values()] == [PIPELINE_NAME, "spin-comparison"]
    started = [run["pipeline_version_reference"]["pipeline_id"] for run in server.runs.values()]
    assert started == list(server.pipelines)
    assert server.violations == []


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert refusal(command(tmp_path, "--output", "file/spin.yaml")).startswith("expected a file to write to, got file/")


def test_a_run_needs_an_endpoint(tmp_path: Path) -> None:
    message = refusal(command(tmp_path, "--run", "--output", "spin.yaml"))

    assert message == "expected a KFP endpoint for --run, got none; set --host or KFP_HOST, or use --local"


def test_a_run_needs_an_endpoint_that_answers(tmp_path: Path) -> None:
    with serving() as gone:
        pass

    message = refusal(command(tmp_path, "--run", "--output", "spin.yaml", "--host", gone.url))

    assert message.startswith(f"KFP server {gone.url} cannot be reached: ")
    assert "check KFP_HOST" in message


def test_upload_and_upload_again(tmp_path: Path, server: ContractServer) -> None:
    said = succeeds(command(tmp_path, "--output", "spin.yaml", "--host", server.url))

    (pipeline,) = server.pipelines.values()
    (version,) = server.versions.values()
    link = f"{server.url}/#/pipelines/details/{pipeline['pipeline_id']}/version/{version['pipeline_version_id']}"
    assert pipeline["name"] == PIPELINE_NAME
    assert said.splitlines()[1:] == [f"created the pipeline with version {version['name']}: {link}"]
    assert server.runs == {}

    message = refusal(command(tmp_path, "--output", "spin.yaml", KFP_HOST=server.url))

    assert f"got {version['name']}, which pipeline {PIPELINE_NAME} already has ({link})" in message
    assert len(server.versions) == 1
    assert server.violations == []


def test_run_with_parameters(tmp_path: Path, server: ContractServer) -> None:
    params = {"preset": "sd15-paper", "iterations": 3, "gpu_count": 8, "overrides": {"train": {"beta": [2000, 5000]}}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(params))
    server.token, server.multi_user = "good-token", True

    said = succeeds(
        command(
            tmp_path,
            *("--run", "--params", "p.yaml", "--output", "spin.yaml", "--host", server.url, "--namespace", "team"),
            KFP_TOKEN="good-token",
        )
    )

    (run,) = server.runs.values()
    (experiment,) = server.experiments.values()
    (version,) = server.versions.values()
    assert run["runtime_config"]["parameters"] == params
    assert run["display_name"] == version["name"]
    assert (experiment["display_name"], experiment["namespace"]) == ("spin-diffusion", "team")
    assert said.splitlines()[-1] == f"started a run: {server.url}/#/runs/details/{run['run_id']}"
    assert "good-token" not in said
    assert server.violations == []
