"""What every test shares: quiet worker threads, real servers and an uninterrupted run on them, the faults' options."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

# Spinning OpenMP threads starve the other processes of a small machine; libraries read this when they are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pipelines.laptop import Laptop, laptop
from tests.local_run import Pipeline, tiny_options


def pytest_addoption(parser: pytest.Parser) -> None:
    faults = parser.getgroup("faults", "how hard tests/faults strikes")
    faults.addoption("--kills", default="3", help="kills of a running pipeline, in all")
    faults.addoption("--runs", default="1", help="runs that the kills are spread over")
    faults.addoption("--pairs", default="1000", help="pairs that the largest data set has")
    faults.addoption("--seed", default="0", help="decides on the moments")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file, and all that look at the uninterrupted run, in one of several processes.

    Before xdist looks for groups: each process would make an uninterrupted run of its own.
    """
    for item in items:
        shared = "whole" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("whole" if shared else item.path.name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have measured (``record_property``), from whichever process."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.user_properties:
            found = ", ".join(f"{name} {value}" for name, value in report.user_properties)
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {found}")


@pytest.fixture(scope="session")
def laptop_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """Give running S3 and MLflow servers, with the environment variables that lead to them set."""
    with laptop(tmp_path_factory.mktemp("laptop")) as found, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        for name, value in found.environment().items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(scope="session")
def tiny_run_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give the parameters that runs of the whole pipeline have in common."""
    return tiny_options(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def whole(
    laptop_servers: Laptop, tiny_run_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    """Give a finished run of the whole pipeline that nothing has interrupted."""
    pipeline = Pipeline(laptop_servers, tmp_path_factory.mktemp("whole") / "run", tiny_run_options, "whole")
    began = time.monotonic()
    pipeline.succeed()
    pipeline.seconds = time.monotonic() - began
    return pipeline
