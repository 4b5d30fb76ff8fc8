"""Much at once: memory does not grow with the data, the report stays small, fifty stages write to MLflow together.

The usual test run takes ``--pairs`` 1,000; ``make faults`` takes 100,000.
"""

import io
import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from PIL import Image

import spin.scoring
from pipelines.laptop import Laptop
from spin import tracking
from spin.page import MOST_BYTES
from spin.run import Index
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.prepare import prepare
from spin.stages.score import score
from spin.stages.train import train
from tests import tiny

pytestmark = [pytest.mark.integration, pytest.mark.timeout(14400)]

HELD_OUT, MOST_PROMPTS, BATCH = 0.3, 5000, 32
MOST_GROWTH, MOST_PER_PAIR = 64 * 2**20, 1024
"""Bytes by which a stage may need more for four times the pairs: what libraries and allocators keep, whatever the
number, and for each pair its id, its prompt and where its latents lie. An image of it would take three times that."""
WRITERS, POINTS = 50, 40


def table(path: Path, count: int) -> Path:
    """Write ``count`` images of one colour each, no two alike, with captions."""
    schema = pa.schema({"image": pa.binary(), "text": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 1000):
            images = []
            for i in range(start, min(start + 1000, count)):
                png = io.BytesIO()
                Image.new("RGB", (tiny.RESOLUTION, tiny.RESOLUTION), (i % 256, i // 256 % 256, i // 65536)).save(
                    png, "PNG"
                )
                images.append(png.getvalue())
            texts = [f"colour {start + i}" for i in range(len(images))]
            writer.write_table(pa.table({"image": images, "text": texts}, schema))
    return path


def own_memory() -> int:
    """Return the bytes of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def peak(work: Callable[[], object]) -> int:
    """Return the most memory that the process has while ``work`` is done, looked at every 20 ms."""
    most, done = [own_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most[0]


def play(place: Place, base: Path, source: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run every stage; return the peaks, counts of items and seconds of each, and the size of the report."""
    # Few pairs must fill a chunk too: else they would need less for that alone.
    spin.scoring.CHUNK = BATCH
    made: dict[str, Index] = {}
    pages: list[str] = []

    def scored(iteration: int) -> Index:
        found = score(place, iteration)
        pages.append(found.html)
        return found.index

    stages: dict[str, Callable[[], Index]] = {
        "prepare": lambda: prepare(place, "emoji-cpu", str(base), str(source), options),
        "score the base": lambda: scored(0),
        "generate": lambda: generate(place, 1),
        "train": lambda: train(place, 1),
        "score": lambda: scored(1),
    }
    peaks = {name: peak(lambda name=name: made.update({name: stages[name]()})) for name in stages}
    return {
        "peaks": peaks,
        "items": {name: index.items for name, index in made.items()},
        "seconds": {name: index.seconds for name, index in made.items()},
        "report": max(len(page.encode()) for page in pages),
        "prompts": made["score"].facts["prompts"],
    }


def test_memory_does_not_grow_with_the_pairs(
    laptop_servers: Laptop,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    pairs = int(pytestconfig.getoption("--pairs"))
    judge, base, found = tiny.judge(tmp_path / "judge"), tiny.base(tmp_path / "base"), []
    # A process of its own: what other tests have left to be reused would hide growth.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for count in (pairs // 4, pairs):
            batch = 50 * max(1, count // 500)
            options: dict[str, Any] = tiny.overrides(
                judge, steps=[int(count * (1 - HELD_OUT)) // batch], batch_size=batch, micro_batch_size=50,
                checkpoint_every=10_000, max_winner_drift=1000,
            )  # fmt: skip
            options["data"] |= {"held_out_share": HELD_OUT, "encode_batch": BATCH}
            options["generate"]["batch_size"] = BATCH
            options["score"] |= {"max_prompts": MOST_PROMPTS, "images_per_prompt": 1}
            place = Place(f"load-{count}", "s3://spin/load", laptop_servers.s3_endpoint, "", "load")
            source = table(tmp_path / f"{count}.parquet", count)
            found.append(process.submit(play, place, base, source, options).result())
    few, many = found
    record_property(f"{pairs} pairs", many)
    record_property(f"{pairs // 4} pairs", few)
    assert many["items"]["prepare"] == pytest.approx((1 - HELD_OUT) * pairs, rel=0.1)
    assert many["items"]["generate"] > 0.98 * many["items"]["prepare"]
    growth = {name: most - max(few["peaks"].values()) for name, most in many["peaks"].items()}
    assert max(growth.values()) < MOST_GROWTH + MOST_PER_PAIR * (pairs - pairs // 4), growth
    assert many["report"] < MOST_BYTES


def test_fifty_stages_write_to_mlflow_together(laptop_servers: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is the first: all find or make the run's parent at the same moment."""
    # How fast one server answers fifty on a busy machine is not the question.
    monkeypatch.setenv(tracking.TIMEOUT, "120")
    place = Place("crowd", "s3://spin/load", laptop_servers.s3_endpoint, laptop_servers.mlflow_uri, "crowd")
    together = threading.Barrier(WRITERS)

    def write(number: int) -> bool:
        together.wait()
        with tracking.stage(place, f"iteration-001/generate-{number:04d}-of-{WRITERS:04d}", 1) as log:
            for step in range(1, POINTS + 1):
                log.step(step, {"loss": number + step / 100})
                time.sleep(0.05)
        return log.warned

    with ThreadPoolExecutor(WRITERS) as crowd:
        assert not any(crowd.map(write, range(WRITERS)))
    client = MlflowClient(laptop_servers.mlflow_uri)
    experiment = client.get_experiment_by_name("crowd")
    assert experiment
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run.info.run_id for run in runs if run.data.tags[tracking.STAGE] == tracking.PARENT]
    children = [run for run in runs if run.data.tags[tracking.STAGE] != tracking.PARENT]
    assert len(parents) == 1
    assert len(children) == len({run.data.tags[tracking.STAGE] for run in children}) == WRITERS
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == parents[0]
        number = int(run.data.tags[tracking.STAGE].split("generate-")[1][:4])
        points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
        assert points == [(step, number + step / 100) for step in range(1, POINTS + 1)]
