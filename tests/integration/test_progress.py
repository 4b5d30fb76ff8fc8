"""What an unfinished stage has stored: kept through faults that pass, undone by nobody who is behind."""

import re
from pathlib import Path

import pytest

from spin.errors import SpinError
from spin.progress import Progress, forget
from spin.run import Run
from spin.store import Ref, Store
from tests.faults.promises import Bucket, broken
from tests.integration.world import BUCKET, PREFIX, World

pytestmark = pytest.mark.integration
STAGE = "iteration-001/score-0000-of-0002"
WHOLE = "iteration-001/score"
TRAINING = "iteration-001/train"


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


def replace(progress: Progress, folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text(folder.name)
    progress.replace(folder, 1.0, step=step)


def resumed(run: Run) -> int:
    """Return the step that a training would go on from."""
    return int(Progress(run, TRAINING, {"player": "a"}).facts.get("step", 0))


def test_a_checkpoint_that_is_behind_undoes_nothing(world: World, tmp_path: Path) -> None:
    """A checkpoint stands for all before it: what counts is its step, not how many there are."""
    run = world.run("behind-in-training")
    replace(Progress(run, TRAINING, {"player": "a"}), tmp_path / "begun", 50)
    old, new = (Progress(run, TRAINING, {"player": "a"}) for _ in range(2))
    replace(new, tmp_path / "new", 500)
    for step in (100, 150):
        replace(old, tmp_path / f"old-{step}", step)
    assert resumed(run) == 500
    assert sound(world)
    # Of all that the old one has stored, its last checkpoint alone is left, in case that it overtakes.
    assert {part.digest for part in (*old.parts, *new.parts)} == {
        name.split("/")[1].removesuffix(".json") for name in world.names("folders/") if whose(world, name, run.key)
    }
    replace(old, tmp_path / "old-600", 600)
    assert resumed(run) == 600
    assert sound(world)
    forget(run, TRAINING)


def whose(world: World, name: str, run_key: str) -> bool:
    """Return whether an object of a folder says that it is a part of the run."""
    if not name.endswith("/whose.txt"):
        return False
    with world.minio().get_object(BUCKET, f"{PREFIX}/{name}") as answer:
        return answer.read().startswith(f"{run_key} ".encode())


def test_a_checkpoint_that_is_replaced_while_it_is_fetched_costs_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.run("replaced-while-fetched")
    old = Progress(run, TRAINING, {"player": "a"})
    replace(old, tmp_path / "500", 500)
    get, asked = Store.get, []

    def racing(self: Store, ref: Ref) -> Path:
        asked.append(ref)
        if len(asked) == 1:
            replace(old, tmp_path / "550", 550)
        return get(self, ref)

    with monkeypatch.context() as patch:
        patch.setenv("SPIN_CACHE", str(tmp_path / "the-successor's"))
        patch.setattr(Store, "get", racing)
        new = Progress(run, TRAINING, {"player": "a"})
    assert new.facts == {"step": 550}
    assert new.parts == old.parts
    forget(run, TRAINING)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"novel": 1}, "novel"),
        ({"parts": [{"kind": "folder", "digest": "a" * 64, "size": 1, "uri": "", "more": 1}]}, "parts.0.more"),
        ({"parts": [{"kind": "folder", "digest": "../x", "size": 1, "uri": ""}]}, "parts.0.digest"),
        ({"seconds": None}, "seconds"),
    ],
)
def test_progress_of_another_version_is_one_line(world: World, change: dict[str, object], word: str) -> None:
    run = world.run("other-version")
    run.write_progress(TRAINING, {"inputs": "x", "parts": [], "seconds": 1.0, "facts": {}} | change)
    for read in (lambda: Progress(run, TRAINING, {"player": "a"}), lambda: forget(run, TRAINING)):
        with pytest.raises(SpinError) as refused:
            read()
        assert re.fullmatch(
            f"expected .+train.progress.json as spin .+ writes it, got another {word} .+; .+", str(refused.value)
        )
    run.drop_progress(TRAINING)
