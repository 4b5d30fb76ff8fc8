"""What the demo makes of the pipeline's output, with a stand-in for the pipeline's command."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import demo
from spin.errors import SpinError

TALK = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1]).parent
(folder / "local").mkdir()
print("08:33:36.564 - INFO - Executing task 'prepare-data'")
print("08:33:42 prepare: 24 images encoded")
print("Traceback (most recent call last):", file=sys.stderr, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    return tmp_path / "demo"


def command(folder: Path, end: str) -> None:
    (folder.parent / "pipelines" / "spin.py").write_text(TALK + end)


def test_only_the_stages_own_lines_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(folder, "")

    demo._run({"iterations": 2, "overrides": {"train": {"beta": [3000]}}}, folder)

    assert capsys.readouterr().out == "08:33:42 prepare: 24 images encoded\n"
    assert "Executing task" in (folder / "pipeline.log").read_text()
    assert yaml.safe_load((folder / "params.yaml").read_text())["overrides"] == {"train": {"beta": [3000]}}
    assert not (folder / "local").exists()


def test_a_stages_own_fault_is_the_demos(folder: Path) -> None:
    command(folder, "print('spin.errors.SpinError: expected a, got b; do c')\nsys.exit(2)")

    with pytest.raises(SpinError, match=r"^expected a, got b; do c$"):
        demo._run({}, folder)

    assert "Traceback" in (folder / "pipeline.log").read_text()


def test_a_fault_without_words_leads_to_the_log(folder: Path) -> None:
    command(folder, "sys.exit(1)")

    with pytest.raises(SpinError, match=f"see {folder / 'pipeline.log'}$"):
        demo._run({}, folder)


def test_there_is_nothing_to_look_at_before_a_demo(tmp_path: Path) -> None:
    with pytest.raises(SpinError, match=r"^expected the data of a demo, got none in .*; run `make demo` first$"):
        demo._serve(tmp_path, 5000)


def summary(version: str, verdict: str) -> dict[str, Any]:
    """Return of a summary what the closing lines read."""
    estimate = {"value": 20.0, "low": 19.0, "high": 21.0}
    training = {"verdict": verdict, "reason": "error on real images +40.0 %"}
    return {
        "iterations": [
            {"iteration": 0, "metrics": {"test": {"clip_score": estimate}}},
            {"iteration": 1, "metrics": {"test": {"clip_score": estimate}}, "training": training},
        ],
        "registry": {"model_name": "spin-emoji", "version": version, "alias": "challenger" if version else ""},
        "phases": {"prepare": {"seconds": 1.0, "items": 2}},
        "contact_sheet": "sheet.png",
        "seconds": {"total": 3.0},
    }


@pytest.mark.parametrize(
    ("version", "verdict", "line"),
    [
        ("3", "improved", "spin-emoji version 3, alias challenger"),
        ("", "diverged", "nothing, as iteration 1 diverged (error on real images +40.0 %)"),
    ],
)
def test_the_demo_says_what_was_registered_or_why_nothing_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str, verdict: str, line: str
) -> None:
    demo._show(tmp_path, summary(version, verdict))
    assert f"registered      {line}\n" in capsys.readouterr().out
