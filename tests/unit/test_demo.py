"""What the demo makes of the pipeline's output, with a stand-in for the pipeline's command."""

from pathlib import Path

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


def test_the_verdicts_whole_reason_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "error on 50 held-out real images -0.9 % [-2.0, +0.2], told from the opponent's 90.0 % [85.0, 95.0]: why"
    test = {"test": {"clip_score": {"value": 1.0, "low": 0.5, "high": 1.5}}}
    summary = {
        "iterations": [
            {"iteration": 0, "metrics": test},
            {"iteration": 1, "metrics": test, "training": {"verdict": "improved", "reason": reason}},
        ],
        "phases": {"train": {"seconds": 1.0, "items": 1}},
        "registry": {"model_name": "spin-emoji", "version": "1", "alias": "challenger"},
        "contact_sheet": "sheet.png",
        "seconds": {"total": 1.0},
    }

    demo._show(tmp_path, summary)

    assert f"iteration 1: improved, {reason}" in capsys.readouterr().out.splitlines()


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
