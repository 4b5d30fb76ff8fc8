"""What an unfinished stage has stored: kept through faults that pass, undone by nobody who is behind."""

from pathlib import Path

import pytest

from spin.errors import SpinError
from spin.progress import Progress
from spin.run import Run
from spin.store import Store
from tests.faults.promises import Bucket, broken
from tests.integration.world import BUCKET, PREFIX, World

pytestmark = pytest.mark.integration
STAGE = "iteration-001/score-0000-of-0002"
WHOLE = "iteration-001/score"


def add(progress: Progress, folder: Path, words: str) -> None:
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text(words)
    progress.add(folder, 1.0)


def noted(run: Run) -> int:
    """Return how many parts the stage has, as a rerun would find it."""
    return len(Progress(run, STAGE, {"player": "a"}, WHOLE).parts)


def sound(world: World) -> bool:
    return not broken(Bucket(world.minio(), BUCKET, PREFIX))


def test_a_fault_that_passes_costs_no_part(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, an outage, an expired key: the stage fails, and the next attempt goes on from all that there was."""
    run = world.run("passing-fault")
    progress = Progress(run, STAGE, {"player": "a"}, WHOLE)
    for number in range(2):
        add(progress, tmp_path / str(number), f"passing {number}")

    def full(*_: object) -> Path:
        raise SpinError("expected room on the disk of /cache, got 'No space left on device'")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "get", full)
        with pytest.raises(SpinError, match="expected room on the disk"):
            Progress(run, STAGE, {"player": "a"}, WHOLE)
    assert noted(run) == 2


def test_what_is_damaged_is_made_anew(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run("damaged-part")
    monkeypatch.setattr("spin.store.ARRIVALS", ())
    add(Progress(run, STAGE, {"player": "a"}, WHOLE), tmp_path / "0", "damaged")
    (part,) = Progress(run, STAGE, {"player": "a"}, WHOLE).parts
    world.minio().remove_object(BUCKET, f"{PREFIX}/parts/folders/{part.digest}/words.txt")
    monkeypatch.setenv("SPIN_CACHE", str(tmp_path / "another"))
    assert noted(run) == 0
    again = Progress(run, STAGE, {"player": "a"}, WHOLE)
    add(again, tmp_path / "1", "whole")
    assert noted(run) == 1
    assert sound(world)


def test_who_is_behind_undoes_nothing(world: World, tmp_path: Path) -> None:
    """A pod that was given up goes on adding parts: those of its successor count, until it has more."""
    run = world.run("behind")
    old, new = (Progress(run, STAGE, {"player": "a"}, WHOLE) for _ in range(2))
    add(old, tmp_path / "old-0", "0")
    for number in range(3):
        add(new, tmp_path / f"new-{number}", str(number))
    theirs = Progress(run, STAGE, {"player": "a"}, WHOLE).parts
    add(old, tmp_path / "old-1", "1")
    assert Progress(run, STAGE, {"player": "a"}, WHOLE).parts == theirs == new.parts
    for number in range(2, 4):
        add(old, tmp_path / f"old-{number}", str(number))
    assert Progress(run, STAGE, {"player": "a"}, WHOLE).parts == old.parts
    assert noted(run) == 4
    assert sound(world)
