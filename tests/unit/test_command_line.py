"""The command line: its options go by one name each, and what is wrong by itself is said before a server is asked."""

import re
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner

from spin.__main__ import app
from spin.errors import SpinError
from spin.stages import Place

PLACE = ["--run-key=mine", "--store-uri=s3://spin", "--store-endpoint=http://localhost:1"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
STAGES = ("preflight", "prepare", "generate", "train", "score-shard", "score", "report", "register")


def options(command: str) -> dict[str, str]:
    return {name: param.help for param in COMMANDS[command].params for name in param.opts}


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Give a function that returns what a command is refused with, which may ask no server."""

    def opened(*_: object) -> None:
        raise AssertionError("the store was asked")

    monkeypatch.setattr(Place, "open", opened)
    monkeypatch.setattr("spin.preflight.Store", opened)

    def call(command: str, *arguments: str) -> str:
        ended = CliRunner().invoke(app, [command, *PLACE, "--tracking-uri=", *arguments])
        assert isinstance(ended.exception, SpinError), ended.output
        return str(ended.exception)

    return call


@pytest.mark.parametrize("command", STAGES)
def test_every_stage_names_its_run_alike(command: str) -> None:
    assert {"--run-key", "--store-uri", "--store-endpoint"} <= options(command).keys()
    assert all(param.param_type_name == "option" for param in COMMANDS[command].params)


def test_preflight_looks_at_what_the_stages_take(refusal: Callable[..., str]) -> None:
    found = options("preflight")
    for command in ("prepare", "register"):
        theirs = options(command)
        shared = {"--preset", "--base-model", "--data-source", "--overrides", "--gate"} & theirs.keys()
        assert {name: found[name] for name in shared} == {name: theirs[name] for name in shared}
    assert all("s3://" in found[name] for name in ("--base-model", "--data-source"))
    assert "got 'winrate'; did you mean 'win_rate'?" in refusal("preflight", "--gate={winrate: 1}")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("preflight", "overrides"),
        ("preflight", "gpu_pool"),
        ("preflight", "draw_pool"),
        ("preflight", "gate"),
        ("prepare", "overrides"),
        ("register", "gate"),
    ],
)
def test_what_is_no_mapping_is_named(refusal: Callable[..., str], command: str, option: str) -> None:
    more = ["--iterations=1"] if command == "register" else []
    flag = f"--{option.replace('_', '-')}"
    assert refusal(command, *more, f"{flag}=[a]").startswith(f"expected {option} as a mapping, got '[a]'; e.g. '{{")
    assert refusal(command, *more, f"{flag}={{").startswith(f"expected {option} as YAML, JSON or @FILE, got '{{' (")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare", "--iterations=0"], "expected at least 1 iteration, got 0; set iterations to"),
        (["register", "--iterations=0"], "expected at least 1 iteration, got 0; set iterations to"),
        (["register", "--iterations=1", "--gate={beter: {}}"], "expected a known option of the gate, got 'beter'; did"),
        (["register", "--iterations=1", "--gate={win_rate: 2}"], "expected win_rate to be less than 1, got 2 (in ga"),
        (["register", "--iterations=1", "--gate={better: {clap: 1}}"], "expected a score that the run has, got 'clap'"),
    ],
)
def test_what_needs_no_run_is_said_at_once(refusal: Callable[..., str], arguments: list[str], expected: str) -> None:
    assert refusal(*arguments).startswith(expected)


@pytest.mark.parametrize("iteration", ["-5", "-1"])
def test_no_report_of_an_iteration_below_the_base(monkeypatch: pytest.MonkeyPatch, iteration: str) -> None:
    monkeypatch.setattr(Place, "open", lambda _: pytest.fail("the store was asked"))
    ended = CliRunner().invoke(app, ["report", *PLACE, f"--iteration={iteration}"])
    assert re.fullmatch(f"expected an iteration number of at least 0, got {iteration}; .+", str(ended.exception))
