"""What holds of the images without building one, and that the tests which build them cannot pass unseen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("told", "code", "word"), [({"CI": "true"}, 1, "error"), ({}, 0, "skipped")])
def test_a_missing_docker_fails_where_it_must_not_be_missing(
    told: dict[str, str], code: int, word: str, tmp_path: Path
) -> None:
    """With CI=true, a run of the images' tests that shows nothing is a failure."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_XDIST_WORKER")}
    environment |= {"PATH": str(tmp_path), "DOCKER_HOST": f"unix://{tmp_path}/none.sock"} | told
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "docker", "-k", "needs_nothing_else", "tests/containers"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout
    assert f"1 {word}" in done.stdout, done.stdout
    assert "dockerd" in done.stdout or not code
