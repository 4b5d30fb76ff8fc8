"""What every test shares: quiet worker threads, one pair of real servers per session, the faults' options."""

import os
from collections.abc import Iterator

import pytest

from pipelines.laptop import Laptop, laptop

# Spinning OpenMP threads starve the other processes of a small machine; libraries read this when they are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    faults = parser.getgroup("faults", "how hard tests/faults strikes")
    faults.addoption("--kills", default="3", help="kills of a running pipeline, in all")
    faults.addoption("--runs", default="1", help="runs that the kills are spread over")
    faults.addoption("--seed", default="0", help="decides on the moments")


@pytest.fixture(scope="session")
def laptop_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """Give running S3 and MLflow servers, with the environment variables that lead to them set."""
    with laptop(tmp_path_factory.mktemp("laptop")) as found, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        for name, value in found.environment().items():
            patch.setenv(name, value)
        yield found
