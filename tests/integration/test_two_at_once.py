"""Two processes at one run, or at one stage: one result counts, the other process says so, and nothing is torn."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from spin import models, scorers, tracking
from spin.config import override
from spin.errors import SpinError
from spin.presets import preset
from spin.progress import Progress
from spin.run import Index, Run, producer
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.train import train
from spin.store import Store
from tests.faults.promises import Bucket, broken
from tests.integration.conftest import Played
from tests.integration.world import BUCKET, PREFIX, World

pytestmark = pytest.mark.integration
CONFIG = preset("emoji-cpu")
TRAINING = "iteration-001/train"


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Call all at once; return what each returned, or the error that it was refused with."""

    def outcome(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except SpinError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(outcome, actions))


@contextmanager
def meeting(where: type, method: str, name: str = "") -> Iterator[None]:
    """Let the first two calls of a method, about what ends with ``name``, go on at the same moment."""
    barrier, calls, do = threading.Barrier(2, timeout=60), itertools.count(), getattr(where, method)

    def wait(self: Any, about: Any, *arguments: Any, **options: Any) -> Any:
        if str(about).endswith(name) and next(calls) < 2:
            barrier.wait()
        return do(self, about, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, method, wait)
        yield


@pytest.fixture(autouse=True)
def one_loads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes here, and transformers loads models in one thread alone."""
    lock = threading.Lock()

    def locked(load: Callable[..., Any], *given: Any) -> Any:
        with lock:
            return load(*given)

    for module in (models, scorers):
        monkeypatch.setattr(module, "load", partial(locked, module.load))


@pytest.fixture(scope="module")
def bucket(world: World) -> Bucket:
    return Bucket(world.minio(), BUCKET, PREFIX)


def torn(bucket: Bucket, run_key: str) -> list[str]:
    """Return the promises that are broken to a run; other tests here break theirs on purpose."""
    return [line for line in broken(bucket) if line.startswith(f"runs/{run_key}")]


def left(world: World, run_key: str) -> list[str]:
    """Return what an unfinished stage would have left of itself."""
    return [name for name in world.documents(run_key) if "progress" in name]


def parts(world: World) -> set[str]:
    return {name for name in world.names("folders/") if name.endswith("whose.txt")}


def prepared(world: World, run_key: str, tracking_uri: str = "", **training: object) -> Place:
    place = world.place(run_key, tracking_uri)
    world.prepare(place, **training)
    return place


def test_of_many_documents_one_is_made(world: World) -> None:
    gate = threading.Barrier(8)

    def create(number: int) -> bool:
        store = world.store()
        gate.wait()
        return store.create_json("runs/raced/run.json", {"number": number})

    made = together(*(lambda n=n: create(n) for n in range(8)))  # type: ignore[misc]
    assert sorted(made) == [False] * 7 + [True]
    assert world.store().read_json("runs/raced/run.json") == {"number": made.index(True)}
    world.store().remove_json("runs/raced/run.json")


def test_of_two_configs_one_begins_the_run(world: World) -> None:
    configs = [CONFIG, override(CONFIG, {"train": {"learning_rate": 0.5}})]
    with meeting(Store, "create_json", "run.json"):
        found = together(*(lambda c=c: world.run("two-configs").begin(c) for c in configs))  # type: ignore[misc]
    (loser,) = (n for n, said in enumerate(found) if isinstance(said, SpinError))
    assert "train.learning_rate" in str(found[loser])
    assert str(found[loser]).endswith("choose another run key, or the old options to resume")
    assert found[1 - loser] is None
    assert world.run("two-configs").config() == configs[1 - loser]


def test_of_one_config_both_begin(world: World) -> None:
    with meeting(Store, "create_json", "run.json"):
        assert together(*[lambda: world.run("one-config").begin(CONFIG)] * 2) == [None, None]


def test_two_prepare_one_run(
    world: World, bucket: Bucket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options twice: both go on with what came first. Others: refused, and none of theirs is in the run."""
    # Two that end within one second are alike, and then there is nothing to say.
    monkeypatch.setattr("spin.stages.prepare.producer", lambda: producer() | {"process": uuid.uuid4().hex})
    with meeting(Store, "create_json", "prepare.json"):
        one, other = together(*[lambda: world.prepare(world.place("prepared-twice"))] * 2)
    assert one == other == world.run("prepared-twice").find("prepare")
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("prepare of run prepared-twice was finished meanwhile by another process (on ")

    with meeting(Store, "create_json", "run.json"):
        found = together(*(lambda n=n: world.prepare(world.place("two-seeds"), seed=n) for n in (1, 2)))  # type: ignore[misc]
    (winner,) = (n for n, said in enumerate(found) if isinstance(said, Index))
    assert "train.seed" in str(found[1 - winner])
    assert world.run("two-seeds").config().train.seed == (1, 2)[winner]
    assert world.run("two-seeds").find("prepare") == found[winner]
    assert torn(bucket, "prepared-twice") + torn(bucket, "two-seeds") == []


OLD_POD = """
import os, signal
from spin.__main__ import main
from spin.run import Run

write = Run.write_progress

def stop(*given):
    Run.write_progress = write
    write(*given)
    os.kill(os.getpid(), signal.SIGSTOP)

Run.write_progress = stop
main()
"""


def test_an_old_pod_that_lives_on_does_no_harm(world: World, bucket: Bucket, tmp_path: Path) -> None:
    """It stores a checkpoint and is cut off; a new pod goes on from there to the end; then the old one wakes up."""
    place = prepared(world, "lives-on")
    generate(place, 1)
    before, run = parts(world), world.run("lives-on")
    command = [sys.executable, "-c", OLD_POD, *world.command("train", "lives-on", "--iteration=1")]
    with (tmp_path / "old.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as old:
        try:
            assert os.WIFSTOPPED(os.waitpid(old.pid, os.WUNTRACED)[1]), (tmp_path / "old.log").read_text()
            progress = run.read_progress(TRAINING)
            assert progress is not None
            assert progress["facts"]["step"] == 1
            new = train(place, 1)
            old.send_signal(signal.SIGCONT)
            assert old.wait(120) == 0
        finally:
            old.kill()
    said = (tmp_path / "old.log").read_text()
    assert f"{TRAINING} of run lives-on was finished meanwhile by another process (on " in said
    assert run.find(TRAINING) == new
    assert left(world, "lives-on") == []
    assert parts(world) == before, "no part is left"
    assert torn(bucket, "lives-on") == []


@pytest.mark.parametrize("act", [generate, train])
def test_two_pods_of_one_stage_end_alike(
    world: World,
    played: Played,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Place, int], Index],
) -> None:
    """Both store parts and remove those that they have replaced, at the same time, from start to end."""
    monkeypatch.setattr("spin.stages.generate.SECONDS_BETWEEN_PARTS", -1.0)
    place = prepared(world, f"two-pods-{act.__name__}")
    if act is train:
        generate(place, 1)
    with meeting(Progress, "__init__"):
        one, other = together(*[lambda: act(place, 1)] * 2)
    assert one == other
    if act is train:
        assert one.outputs == played.indexes[TRAINING].outputs
    assert left(world, place.run_key) == []
    assert torn(bucket, place.run_key) == []


def test_two_runs_side_by_side_do_not_meet(world: World, played: Played, bucket: Bucket) -> None:
    """They come to the same content at the same time, and each removes its own."""
    places = [prepared(world, key) for key in ("side-a", "side-b")]
    for place in places:
        generate(place, 1)
    with meeting(Run, "write_progress", TRAINING):
        indexes = together(*(lambda p=p: train(p, 1) for p in places))  # type: ignore[misc]
    for found in indexes:
        assert found.outputs == played.indexes[TRAINING].outputs
    assert left(world, "side-a") + left(world, "side-b") == []
    assert torn(bucket, "side-") == []


def test_shards_that_begin_at_once_make_one_run_in_mlflow(world: World) -> None:
    """The parent is missing where MLflow was away when the data was prepared."""
    place = world.place("found-at-once", world.servers.mlflow_uri)
    client = tracking._client(place.tracking_uri)
    experiment = tracking._experiment(client, place.experiment)
    with meeting(MlflowClient, "create_run"):
        made = together(*[lambda: tracking._parent(client, place, experiment)] * 2)
    parent = tracking._parent(client, place, experiment).info.run_id
    assert parent in {run.info.run_id for run in made}
    assert len(client.search_runs([experiment], "tags.`spin.run_key` = 'found-at-once'")) == 1
