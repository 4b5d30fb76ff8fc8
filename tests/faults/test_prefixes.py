"""A run that was stopped after any of its writes goes on to the results of one that was not stopped."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.laptop import Laptop
from spin.errors import SpinError
from spin.presets import preset
from spin.progress import Progress, forget
from spin.run import Index, Run
from spin.store import Store
from tests.faults.promises import Bucket, broken
from tests.faults.proxy import Answer, Fault, Proxy, Request, s3_error

pytestmark = pytest.mark.integration
STAGES = ("iteration-001/train", "iteration-001/score")
PARTS = 2


@pytest.fixture
def proxy(laptop_servers: Laptop) -> Iterator[Proxy]:
    proxy = Proxy(laptop_servers.s3_endpoint)
    yield proxy
    proxy.refuse()


def stopping(writes: int, refused: list[str]) -> Fault:
    """Let so many writes pass and none after them: the store is left as by a process that was killed there."""
    seen, lock = [0], threading.Lock()

    def decide(request: Request, forward: Callable[[], Answer]) -> Answer:
        if request.method in ("GET", "HEAD"):
            return forward()
        with lock:
            seen[0] += 1
            if seen[0] > writes:
                refused.append(request.path)
                return s3_error(403, "AccessDenied")
        return forward()

    return decide


def play(store: Store, work: Path) -> None:
    """Begin a run and take two stages as the real ones do: with parts that replace those before, and that add up.

    What a stage makes hangs on the parts that it went on from, and the next one on what it made.
    """
    run = Run(store, "played")
    run.begin(preset("emoji-cpu"))
    before = ""
    for stage in STAGES:
        inputs = {"before": before}
        index = run.find(stage, inputs) or made(run, stage, inputs, work)
        forget(run, stage)
        before = index.outputs["result"].digest


def made(run: Run, stage: str, inputs: dict[str, str], work: Path) -> Index:
    progress = Progress(run, stage, inputs)
    while (count := progress.facts.get("count", 0)) < PARTS:
        words = progress.facts.get("words", inputs["before"])
        folder = work / stage / f"{count}-{progress.seconds}"
        folder.mkdir(parents=True)
        words = hashlib.sha256(f"{words} {count}".encode()).hexdigest()
        (folder / "words.txt").write_text(words)
        store = progress.replace if stage.endswith("train") else progress.add
        store(folder, count + 1.0, count=count + 1, words=words)
    # What parts replace is gone; the last one holds all of it.
    parts = [] if stage.endswith("train") else progress.folders
    texts = [(folder / "words.txt").read_text() for folder in parts]
    result = work / stage / "result"
    result.mkdir(parents=True, exist_ok=True)
    (result / "words.txt").write_text(" ".join([*texts, progress.facts["words"]]))
    (work / stage / "picture").write_text(progress.facts["words"])
    outputs = {"result": run.store.put_folder(result), "picture": run.store.put_file(work / stage / "picture")}
    return run.finish(
        Index(stage=stage, iteration=1, inputs=inputs, outputs=outputs, facts={}, seconds=1, items=1, producer={})
    )


def results(store: Store) -> dict[str, dict[str, str]]:
    found = {stage: Run(store, "played").need(stage, "the test") for stage in STAGES}
    return {stage: {name: ref.digest for name, ref in index.outputs.items()} for stage, index in found.items()}


def test_every_prefix_of_writes_is_gone_on_from(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(name: str, number: int) -> Store:
        """Play in the store ``name``, on a machine that holds nothing of earlier attempts."""
        monkeypatch.setenv("SPIN_CACHE", str(tmp_path / name / f"cache-{number}"))
        store = Store(f"s3://spin/prefixes-{name}", proxy.endpoint)
        store.check()
        play(store, tmp_path / name / str(number))
        return store

    def lines(store: Store) -> list[str]:
        return broken(Bucket(store._client, store.bucket, store.prefix.rstrip("/")))

    whole = attempt("whole", 0)
    wanted, documents = results(whole), names(whole)
    writes = sum(request.method not in ("GET", "HEAD") for request in proxy.seen)
    assert writes > 30
    for stop in range(writes):
        name = f"stop-{stop}"
        refused: list[str] = []
        proxy.fault = stopping(stop, refused)
        # Refused removals are left, with a warning, at the end of a stage; what came of the next one is refused too.
        with contextlib.suppress(SpinError):
            attempt(name, 0)
        assert refused, stop
        proxy.fault = lambda _, forward: forward()
        left = Store(f"s3://spin/prefixes-{name}", proxy.endpoint)
        assert lines(left) == [], stop
        again = attempt(name, 1)
        assert results(again) == wanted, stop
        assert lines(again) == [], stop
        assert names(again) == documents, stop


def names(store: Store) -> set[str]:
    bucket = Bucket(store._client, store.bucket, store.prefix.rstrip("/"))
    return {name for name in bucket.sizes() if name.startswith("runs/")}
