"""The stages, one after another, with tiny models: what they leave behind, and what a rerun makes of it."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

import spin.sampling
from spin import models
from spin.data.dataset import Dataset, Latents
from spin.errors import SpinError
from spin.losses import Objective
from spin.presets import preset
from spin.run import Index, Run
from spin.sampling import batches, decode, fast_precision, sample_latents
from spin.scoring import primary_scorer
from spin.seeding import noise_of
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.prepare import prepare
from spin.stages.register import register
from spin.stages.score import score
from spin.stages.train import goes_on, train
from spin.store import Ref, Store
from spin.training import Batch, Trainer
from tests import tiny
from tests.integration.conftest import Played
from tests.integration.world import BUCKET, World

pytestmark = pytest.mark.integration


def refusal(action: Callable[..., object], *arguments: Any) -> str:
    with pytest.raises(SpinError) as refused:
        action(*arguments)
    return str(refused.value)


def losers(world: World, indexes: list[Index]) -> dict[str, bytes]:
    """Return the latents of every pair id, byte for byte."""
    found: dict[str, bytes] = {}
    for index in indexes:
        rows: dict[str, bytes] = {}
        for path in world.store().get(index.outputs["losers"]).iterdir():
            with safe_open(path, framework="pt") as file:
                ids = file.metadata()["ids"].split()
            latents = load_file(path)["latents"]
            assert latents.dtype == torch.float16
            rows |= {id: row.numpy().tobytes() for id, row in zip(ids, latents, strict=True)}
        assert len(rows) == index.items
        assert not rows.keys() & found.keys()
        found |= rows
    return found


def history(world: World, index: Index) -> list[dict[str, float]]:
    lines = world.store().get(index.outputs["history"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def unet_of(world: World, index: Index) -> dict[str, torch.Tensor]:
    return load_file(world.store().get(index.outputs["model"]) / "unet" / "diffusion_pytorch_model.safetensors")


def shared(world: World, run_key: str, **training: object) -> Place:
    """Prepare a run; return its place. Its data set and base are those of every other run here."""
    place = world.place(run_key)
    world.prepare(place, **training)
    return place


def learn(place: Place, shards: int = 1) -> Index:
    """Play the first iteration, without scores."""
    for shard in range(shards):
        generate(place, 1, shard, shards)
    return train(place, 1, shards)


def test_every_stage_leaves_an_index(world: World, played: Played) -> None:
    documents = world.documents("played")
    assert {name.removesuffix(".json") for name in documents} == {
        *("run", "mlflow", "shards", "prepare", "register", "iteration-000/score"),
        *(
            f"iteration-00{k}/{stage}"
            for k in (1, 2)
            for stage in ("generate-0000-of-0002", "generate-0001-of-0002", "train", "score")
        ),
    }
    for stage, index in played.indexes.items():
        assert Index.model_validate_json(documents[f"{stage}.json"]) == index
        assert index.stage == stage
        assert index.seconds > 0
        assert index.items > 0
        assert index.producer["commit"] == "c0ffee"
        assert bool(index.cost) == bool(re.search("prepare|generate|train|score", stage))
        assert all(value > 0 for value in index.cost.values())
        assert all(index.producer[name] for name in ("spin", "torch", "diffusers", "host", "device", "finished"))


def test_facts_add_up(world: World, played: Played) -> None:
    prepared = played.indexes["prepare"]
    data = Dataset(world.store().get(prepared.outputs["dataset"]))
    rows = {split: prepared.facts[f"{split}_rows"] for split in ("train", "validation", "test")}
    assert sum(rows.values()) == 24
    assert prepared.facts["rejected_rows"] == 0
    assert prepared.facts["latents_shape"] == [4, 8, 8]
    assert len(data) == prepared.items == rows["train"]
    for k in (1, 2):
        drawn = [played.indexes[f"iteration-00{k}/generate-000{shard}-of-0002"] for shard in (0, 1)]
        assert losers(world, drawn).keys() == {*data.ids, *(row.id for row in data.validation)}
        assert (
            sum(index.facts["batches"] for index in drawn)
            == drawn[0].facts["batches_in_all"]
            == math.ceil((len(data) + len(data.validation)) / 4)
        )
        trained = played.indexes[f"iteration-00{k}/train"]
        assert (trained.iteration, trained.items) == (k, 3 * 8)
        assert (trained.facts["steps"], trained.facts["beta"]) == (3, preset("emoji-cpu").train.of(k)[0])
    for k in (0, 1, 2):
        scored = played.indexes[f"iteration-00{k}/score"]
        assert scored.facts["prompts"] == {split: rows[split] for split in ("validation", "test")}
        assert scored.items == rows["validation"] + rows["test"]
        for metrics in scored.facts["metrics"].values():
            assert metrics.keys() == {"clip_score"} | ({"win_rate"} if k else set())
            assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in metrics.values())
            assert 0 <= metrics.get("win_rate", {"value": 0.5})["value"] <= 1


def test_scores_of_all_iterations_are_paired(world: World, played: Played) -> None:
    tables = [
        pq.read_table(world.store().get(played.indexes[f"iteration-00{k}/score"].outputs["scores"])) for k in (0, 1, 2)
    ]
    for one, other in pairwise(tables):
        assert one.select(["id", "prompt", "split", "sample"]) == other.select(["id", "prompt", "split", "sample"])
        assert one["clip_score"] != other["clip_score"]
    for k, table in enumerate(tables):
        metrics = played.indexes[f"iteration-00{k}/score"].facts["metrics"]
        for split in ("validation", "test"):
            mine = np.array([row["clip_score"] for row in table.to_pylist() if row["split"] == split])
            assert metrics[split]["clip_score"]["value"] == pytest.approx(mine.mean(), abs=1e-4)


def test_held_out_prompts_are_never_trained_on(world: World, played: Played) -> None:
    data = Dataset(world.store().get(played.indexes["prepare"].outputs["dataset"]))
    held_out = [{row.id for row in data.held_out(split, 100)} for split in ("validation", "test")]
    assert not held_out[0] & held_out[1]
    assert not (held_out[0] | held_out[1]) & set(data.ids)


def test_model_and_data_from_the_server(world: World, played: Played) -> None:
    """Addresses change nothing but the address; a file that changes on the server is fetched again."""
    client = world.minio()
    for folder, name in ((world.base, "base"), (world.images, "images")):
        for path in folder.rglob("*"):
            if path.is_file():
                client.fput_object(BUCKET, f"users/ann/{name}/{path.relative_to(folder).as_posix()}", str(path))
    place, options = world.place("from-server"), tiny.overrides(world.judge)
    uris = [f"s3://{BUCKET}/users/ann/{name}" for name in ("base", "images/")]
    index = prepare(place, "emoji-cpu", *uris, options, iterations=2)
    assert index.outputs == played.indexes["prepare"].outputs
    with pytest.raises(SpinError, match=rf"^expected a file or folder, got nothing at s3://{BUCKET}/users/ann/bas "):
        prepare(world.place("nowhere"), "emoji-cpu", f"s3://{BUCKET}/users/ann/bas", uris[1], options, iterations=2)
    client.remove_object(BUCKET, "users/ann/images/000.png")
    fewer = prepare(world.place("fewer"), "emoji-cpu", *uris, options, iterations=2)
    assert fewer.facts["rejected_rows"] == 1


def test_a_held_out_prompt_counts_once(world: World, tmp_path: Path) -> None:
    folder = tiny.images(tmp_path / "images", 40)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = f"colour {int(row['text'].split()[1]) % 20}"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = prepare(world.place("repeated"), "emoji-cpu", str(world.base), str(folder), tiny.overrides(world.judge))
    table = pq.read_table(world.store().get(index.outputs["dataset"]) / "held-out.parquet")
    prompts = table["prompt"].to_pylist()
    assert len(prompts) == len(set(prompts)) == index.facts["validation_rows"] + index.facts["test_rows"]
    assert index.facts["train_rows"] == 2 * (20 - len(prompts))


def test_parts_that_a_run_leaves_out_are_not_asked_for(world: World, tmp_path: Path) -> None:
    """SD-1.5 comes with a safety checker; its players load without one."""
    folder = tmp_path / "base"
    shutil.copytree(world.base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    place = world.place("checked")
    prepare(place, "emoji-cpu", str(folder), str(world.images), tiny.overrides(world.judge), iterations=1)
    generate(place, 1)
    player = world.store().get(train(place, 1).outputs["model"])
    assert not (player / "safety_checker").exists()
    assert StableDiffusionPipeline.from_pretrained(player).safety_checker is None


def test_each_iteration_starts_from_the_last(played: Played) -> None:
    opponents = [played.indexes["prepare"].outputs["base"].digest]
    for k in (1, 2):
        trained = played.indexes[f"iteration-00{k}/train"]
        drawn = [played.indexes[f"iteration-00{k}/generate-000{shard}-of-0002"] for shard in (0, 1)]
        scored = played.indexes[f"iteration-00{k}/score"]
        assert {index.inputs["opponent"] for index in (*drawn, trained)} == {opponents[-1]}
        assert trained.inputs["losers"] == [index.outputs["losers"].digest for index in drawn]
        assert scored.inputs["player"] == trained.outputs["model"].digest
        assert scored.inputs["earlier"] == [
            played.indexes[f"iteration-00{j}/score"].outputs["scores"].digest for j in range(k)
        ]
        opponents.append(trained.outputs["model"].digest)
    assert len(set(opponents)) == 3
    assert played.indexes["iteration-000/score"].inputs["player"] == opponents[0]
    dataset = played.indexes["prepare"].outputs["dataset"].digest
    assert {index.inputs["dataset"] for index in played.indexes.values() if "dataset" in index.inputs} == {dataset}


def test_player_starts_as_its_opponent(world: World, played: Played) -> None:
    for k in (1, 2):
        trained = played.indexes[f"iteration-00{k}/train"]
        rows = history(world, trained)
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert trained.facts["first_loss"] == rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[0]["winner_drift"] == rows[0]["loser_drift"] == rows[0]["margin"] == 0
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert trained.facts["final_loss"] == rows[-1]["loss"]


def test_rerun_computes_nothing(world: World, played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    before, objects = world.documents("played"), world.names()

    def load(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("spin.models.load", load)
    again = world.play(world.place("played"), iterations=2, shards=2)
    again["register"] = register(played.place, played.model_name, 2)
    assert again == played.indexes
    assert world.documents("played") == before
    assert world.names() == objects


def test_reports_of_a_rerun_are_the_same(world: World, played: Played) -> None:
    one, other = (score(world.place(played.place.run_key), 2) for _ in range(2))
    assert (one.html, one.markdown) == (other.html, other.markdown)
    scores, *_, took = one.markdown.split("\n## ")
    assert took.startswith("Time spent")
    assert scores.count("\n| iteration") == took.count("\n| iteration") == 2
    assert re.search(
        r"\| iteration 2 \| \d+ s, \d+ \| \d+ s, 24 \| \d+ s, \d+ \| \d+ % / \d+ % / \d+ % \|", one.markdown
    )
    assert "data:image/webp;base64," in one.html


def test_other_inputs_compute_again(world: World, played: Played) -> None:
    """An index that was made from something else is replaced, by the same result as before."""
    world.copy("played", "recomputed")
    run, stage = world.run("recomputed"), "iteration-001/generate-0000-of-0002"
    good = played.indexes[stage]
    run.finish(good.model_copy(update={"inputs": good.inputs | {"opponent": "0" * 64}}))
    made = generate(world.place("recomputed"), 1, 0, 2)
    assert made.producer["finished"] >= good.producer["finished"]
    assert (made.inputs, made.outputs) == (good.inputs, good.outputs)
    assert run.find(stage) == made


def test_order_does_not_depend_on_a_scheduler(world: World) -> None:
    place = world.place("order")
    assert "prepare it first" in refusal(generate, place, 1)
    assert "prepare it first" in refusal(score, place, 0)
    world.prepare(place, steps=[1])
    before = world.documents("order")
    for action, arguments, missing in (
        (train, (1,), "iteration-001/generate-0000-of-0001"),
        (score, (1,), "iteration-001/train"),
        (generate, (2,), "iteration-001/train"),
        (train, (2,), "iteration-001/train"),
        (register, ("tiny", 1), "iteration-001/train"),
    ):
        line = refusal(action, place, *arguments)
        assert line.startswith(f"expected {missing} of run 'order' to be complete before ")
        assert line.endswith("; run it first")
    assert world.documents("order") == before
    generate(place, 1, 0, 2)
    assert "generate-0001-of-0002" in refusal(train, place, 1, 2)
    assert refusal(generate, place, 1, 0, 3) == (
        "expected 2 shard(s), as run 'order' was begun with, got 3; "
        "set shards to that to resume, or choose another run key"
    )
    learn(place, 2)
    assert "iteration-000/score" in refusal(score, place, 1)
    assert "iteration-001/score" in refusal(register, place, "tiny", 1)
    assert "iteration-002/generate-0000-of-0001" in refusal(train, place, 2)


@pytest.mark.parametrize("shards", [0, -1])
def test_at_least_one_shard(world: World, shards: int) -> None:
    place = world.place("no-shards")
    for line in (refusal(generate, place, 1, 0, shards), refusal(train, place, 1, shards)):
        assert line.startswith(f"expected at least 1 shard, got {shards}; ")


@pytest.mark.parametrize("shard", [-1, 2])
def test_shard_is_one_of_the_shards(played: Played, shard: int) -> None:
    assert refusal(generate, played.place, 1, shard, 2).startswith(f"expected a shard from 0 to 1, got {shard}; ")


def test_number_of_shards_changes_nothing(world: World, played: Played) -> None:
    places = {n: shared(world, f"shards-{n}") for n in (1, 2, 6)}
    drawn = {n: [generate(place, 1, shard, n) for shard in range(n)] for n, place in places.items()}
    assert [len(drawn[n]) for n in drawn] == [1, 2, 6]
    assert 0 in [index.items for index in drawn[6]], "a shard without work is part of the test"
    one, two, six = (losers(world, indexes) for indexes in drawn.values())
    assert one == two == six
    players = [played.indexes["iteration-001/train"], *(train(place, 1, n) for n, place in places.items())]
    assert len({player.outputs["model"].digest for player in players}) == 1
    assert len({player.outputs["history"].digest for player in players}) == 1
    assert len({str(player.inputs["losers"]) for player in players}) == 3
    assert players[0].outputs == players[2].outputs


def test_losers_hear_the_guidance_of_the_opponent(world: World, played: Played) -> None:
    """Score and losers may be drawn with different guidance; named as large as the player's, it changes nothing."""
    usual = played.indexes["iteration-000/score"].inputs["generate"]["guidance_scale"]
    drawn = {}
    for guidance in (0, usual, 1):
        place = world.place(f"guided-{guidance:g}")
        options = tiny.overrides(world.judge)
        options["generate"] |= {"opponent_guidance": guidance}  # type: ignore[operator]
        prepare(place, "emoji-cpu", str(world.base), str(world.images), options, iterations=2)
        drawn[guidance] = losers(world, [generate(place, 1, 0, 1)])
    assert drawn[0] == drawn[usual] != drawn[1]


class Interrupted(Exception):
    pass


def test_only_pairs_that_are_trained_on_are_drawn(world: World) -> None:
    """One step of eight: their losers and the validation's, the same for any number of shards."""
    places = {n: shared(world, f"lazy-{n}", steps=[1]) for n in (1, 3)}
    drawn = {n: [generate(place, 1, shard, n) for shard in range(n)] for n, place in places.items()}
    data = Dataset(world.store().get(world.run("lazy-1").need("prepare", "test").outputs["dataset"]))
    one, three = (losers(world, indexes) for indexes in drawn.values())
    assert one == three
    assert len(one.keys() & set(data.ids)) == 8 < len(data)
    assert {row.id for row in data.validation} <= one.keys()
    assert drawn[1][0].facts["left_out"] == len(data) - 8
    players = [train(place, 1, n) for n, place in places.items()]
    assert players[0].outputs == players[1].outputs
    assert players[0].items == 8


def stored(world: World) -> set[str]:
    return {name for name in world.names() if not name.startswith("runs/")}


def test_a_killed_shard_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spin.data.dataset.ROWS_PER_FILE", 8)
    whole = generate(shared(world, "shard-in-one-go"), 1)
    assert len(list(world.store().get(whole.outputs["losers"]).iterdir())) > 1
    place, objects = shared(world, "shard-killed"), stored(world)
    monkeypatch.setattr("spin.stages.generate.SECONDS_BETWEEN_PARTS", -1.0)
    write, drawn, sample = Run.write_progress, [], spin.sampling.sample_latents

    def stop(self: Run, stage: str, value: dict[str, Any]) -> None:
        write(self, stage, value)
        if value["facts"]["batches"] == 2:
            raise Interrupted

    monkeypatch.setattr(Run, "write_progress", stop)
    with pytest.raises(Interrupted):
        generate(place, 1)
    monkeypatch.setattr(Run, "write_progress", write)
    monkeypatch.setattr("spin.sampling.sample_latents", lambda *given: drawn.append(given[1]) or sample(*given))
    resumed = generate(place, 1)
    assert resumed.outputs == whole.outputs
    assert resumed.items == whole.items
    assert len(drawn) == whole.facts["batches"] - 2 > 0
    assert stored(world) == objects, "no part is left"
    assert not [name for name in world.documents("shard-killed") if "progress" in name]


@pytest.mark.parametrize("training", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_interrupted_training_ends_as_if_it_had_not_been(
    world: World, played: Played, monkeypatch: pytest.MonkeyPatch, training: dict[str, object]
) -> None:
    name = f"interrupted-{'lora' if training else 'full'}"
    whole = (
        learn(shared(world, "lora-not-interrupted", **training)) if training else played.indexes["iteration-001/train"]
    )
    place = shared(world, name, **training)
    write = Run.write_progress

    def stop(self: Run, stage: str, value: dict[str, Any]) -> None:
        write(self, stage, value)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_progress", stop)
        with pytest.raises(Interrupted):
            learn(place)
    run = world.run(name)
    assert run.find("iteration-001/train") is None
    progress = run.read_progress("iteration-001/train")
    assert progress is not None
    assert progress["facts"]["step"] == 1
    took, steps = Trainer.train_step, []

    def take(self: Trainer, stop: Callable[[], bool]) -> dict[str, float]:
        measures = took(self, stop)
        steps.append(self.step)
        return measures

    monkeypatch.setattr(Trainer, "train_step", take)
    resumed = learn(place)
    assert steps == [2, 3]
    assert resumed.outputs["model"].digest == whole.outputs["model"].digest
    assert resumed.outputs["history"].digest == whole.outputs["history"].digest
    assert resumed.facts == whole.facts
    assert resumed.seconds > progress["seconds"]


def test_a_fault_in_one_of_several_processes_is_one_line(world: World) -> None:
    place = shared(world, "two-faults", micro_batch_size=8)
    generate(place, 1)
    line = refusal(train, place, 1, 1, 2)
    assert line.startswith("expected train.batch_size to be a multiple of micro_batch_size x processes (16), got 8; ")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evicted_pod_leaves_its_last_step(world: World, tmp_path: Path, processes: int) -> None:
    """SIGTERM to the command line: it ends at once, saying so, and the next start goes on from that step."""
    key = f"evicted-{processes}"
    place = shared(world, key, steps=[100_000], checkpoint_every=100_000)
    generate(place, 1)
    command = [
        *(sys.executable, "-m", "spin", "train", "--run-key", key, "--iteration", "1"),
        *("--store-uri", place.store_uri, "--store-endpoint", place.store_endpoint),
        *("--processes", str(processes)),
    ]

    def evict(log: Path) -> str:
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)
            try:
                while not re.search(r": step \d+ of ", log.read_text()):
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.05)
                asked = time.monotonic()
                process.terminate()
                while "asked to stop" not in log.read_text():
                    assert time.monotonic() - asked < 20, log.read_text()
                    time.sleep(0.05)
                print(f"{processes} process(es) have stored their step {time.monotonic() - asked:.1f} s after SIGTERM")
                assert process.wait(120) == 143
            finally:
                process.kill()
        return log.read_text()

    first = evict(tmp_path / "first.log")
    assert (said := re.search(r"asked to stop, step (\d+) is kept; run again to go on", first))
    progress = world.run(key).read_progress("iteration-001/train")
    assert progress is not None
    assert progress["facts"]["step"] == int(said[1]) > 0
    older = Ref.model_validate(progress["parts"][0])
    assert f"resuming from step {said[1]}" in evict(tmp_path / "second.log")
    progress = world.run(key).read_progress("iteration-001/train")
    assert progress is not None
    assert progress["facts"]["step"] > int(said[1])
    # The checkpoint that it replaces is gone.
    assert not [name for name in world.names("folders/") if older.digest in name]


def test_a_finished_iteration_leaves_no_checkpoint(world: World) -> None:
    before = world.names("folders/")
    learn(shared(world, "clean", learning_rate=3e-5))
    assert world.run("clean").read_progress("iteration-001/train") is None
    assert not [name for name in world.names("folders/") - before if "training.safetensors" in name]


def test_a_checkpoint_that_is_gone_costs_time_alone(
    world: World, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shared(world, "robbed")
    generate(place, 1)

    def interrupt(_: Trainer) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "player_denoiser", interrupt)
        with pytest.raises(Interrupted):
            train(place, 1)
    progress = world.run("robbed").read_progress("iteration-001/train")
    assert progress is not None
    world.store().remove(Ref.model_validate(progress["parts"][0]))
    again = train(place, 1)
    assert again.outputs["model"] == played.indexes["iteration-001/train"].outputs["model"]


def test_checkpoint_of_other_inputs_is_not_resumed(world: World) -> None:
    """Its progress says what it was made from; training on other losers starts anew."""
    place = shared(world, "stale")
    generate(place, 1)
    run = world.run("stale")
    run.write_progress("iteration-001/train", {"inputs": "0" * 64, "parts": [], "seconds": 1.0, "facts": {"step": 2}})
    assert [row["step"] for row in history(world, train(place, 1))] == [1, 2, 3]


def test_killed_generation_leaves_no_index(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    place = shared(world, "killed")

    def stop(*_: object, **__: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("spin.store.Store.put_folder", stop)
        with pytest.raises(Interrupted):
            generate(place, 1)
    assert not [name for name in world.documents("killed") if "generate" in name]
    assert generate(place, 1).items > 0


def test_sft_needs_no_losers(world: World) -> None:
    place = shared(world, "sft", objective="sft", learning_rate=1e-3)
    trained = train(place, 1)
    assert trained.inputs["losers"] == []
    assert not [name for name in world.documents("sft") if "generate" in name]
    rows = history(world, trained)
    assert "implicit_accuracy" not in rows[0]
    assert all(math.isfinite(row["loss"]) for row in rows)
    score(place, 0)
    assert score(place, 1).index.facts["metrics"]["test"]["win_rate"]
    base = load_file(world.base / "unet" / "diffusion_pytorch_model.safetensors")
    assert not all(torch.equal(value, base[name]) for name, value in unet_of(world, trained).items())


def test_losers_of_two_iterations_are_mixed_from_the_second_on(world: World) -> None:
    place = shared(world, "mixed", previous_share=0.5)
    assert learn(place).inputs["previous"] == []
    first = world.run("mixed").need("iteration-001/generate-0000-of-0001", "test")
    generate(place, 2)
    second = train(place, 2)
    assert second.inputs["previous"] == [first.outputs["losers"].digest]
    assert second.inputs["losers"] != second.inputs["previous"]


def test_dpo_learns_from_the_datas_own_pairs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.pairs(tmp_path / "pairs")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    monkeypatch.setattr("spin.data.dataset.ROWS_PER_FILE", 8)
    place = world.place("dpo")
    options = tiny.overrides(world.judge, objective="dpo", warmup_steps=0)
    prepared = prepare(place, "emoji-cpu", str(world.base), str(folder), options, iterations=1)
    data = Dataset(world.store().get(prepared.outputs["dataset"]))
    assert len(list(data.folder.glob("losers-*"))) > 1
    model = models.load(world.base)
    prompted = {row["text"]: row for row in rows}
    for id, prompt in zip(data.ids, data.prompts, strict=True):
        for found, name in ((data.winners([id]), "file_name"), (data.losers().of([id]), "loser")):
            image = ImageOps.fit(Image.open(folder / prompted[prompt][name]), (tiny.RESOLUTION,) * 2)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            torch.testing.assert_close(found, model.encode(pixels), rtol=0, atol=0.05)

    assert generate(place, 1).items == 0
    index = train(place, 1)
    assert index.inputs["losers"] == []
    assert history(world, index)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history(world, index)[1]["margin"] != 0


def test_dpo_may_learn_from_pairs_that_a_scorer_ranks(world: World) -> None:
    place, options = world.place("ranked"), {"objective": "dpo", "pairs": "ranked", "ranked_draws": 3}
    sources = (str(world.base), str(world.images), tiny.overrides(world.judge, warmup_steps=0, **options))
    assert refusal(prepare, place, "emoji-cpu", *sources, 2).startswith(
        "expected 1 iteration for train.objective dpo, "
    )
    prepare(place, "emoji-cpu", *sources)
    prepare(in_two := world.place("ranked-in-two"), "emoji-cpu", *sources)
    one, two = generate(place, 1), [generate(in_two, 1, shard, 2) for shard in (0, 1)]
    prepared = world.run("ranked").need("prepare", "")
    assert one.items == sum(index.items for index in two) == 3 * prepared.items
    sides = ("winners", "losers")
    drawn = {side: Latents.under([world.store().get(one.outputs[side])], side) for side in sides}
    again = {side: Latents.under([world.store().get(index.outputs[side]) for index in two], side) for side in sides}
    data, config = Dataset(world.store().get(prepared.outputs["dataset"])), world.run("ranked").config()
    model = models.load(world.base)
    precision, scorer = fast_precision(model.device), primary_scorer(config.score, model.device, world.store().download)
    best, worst = (drawn[side].of(data.ids) for side in ("winners", "losers"))
    for side, latents in (("winners", best), ("losers", worst)):
        assert torch.equal(again[side].of(data.ids), latents)

    def draws(sample: int) -> torch.Tensor:
        noise = torch.stack([noise_of(data.latents_shape, "generate", 0, 1, id, sample) for id in data.ids])
        rows = batches(len(data), config.generate.batch_size)
        parts = [
            sample_latents(model, [data.prompts[i] for i in part], noise[list(part)], config.generate, precision)
            for part in rows
        ]
        return torch.cat(parts).half().float()

    def scores(latents: torch.Tensor) -> torch.Tensor:
        images = decode(model, latents, precision).numpy()
        return scorer.score([Image.fromarray(image) for image in images], data.prompts)

    # Both are of the three draws; the judge sees it as it should, but for the rounding of its images.
    three = torch.stack([draws(sample) for sample in range(3)])
    for side in (best, worst):
        assert bool((three == side).flatten(2).all(-1).any(0).all())
    every = torch.stack([scores(latents) for latents in three])
    torch.testing.assert_close(scores(best), every.amax(0), rtol=0, atol=0.5)
    torch.testing.assert_close(scores(worst), every.amin(0), rtol=0, atol=0.5)
    assert float((every.amax(0) - every.amin(0)).mean()) > 1

    index = train(place, 1)
    assert index.inputs["winners"] == [one.outputs["winners"].digest]
    assert index.inputs["losers"] == [one.outputs["losers"].digest]
    rows = history(world, index)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[1]["margin"] != 0
    # It is judged by its error on real images, which no drawn loser stands beside.
    assert "implicit_accuracy" not in index.facts["held_out"]


def test_dpo_needs_pairs(world: World) -> None:
    options = tiny.overrides(world.judge, objective="dpo")
    base, images = str(world.base), str(world.images)
    line = refusal(prepare, world.place("no-pairs"), "emoji-cpu", base, images, options, 2)
    assert line.startswith("expected 1 iteration for train.objective dpo, got 2; ")
    line = refusal(prepare, world.place("no-pairs"), "emoji-cpu", base, images, options)
    assert re.fullmatch(r"expected at least one pair of images with a caption, got 0 pairs .+\(24 no loser\).+", line)


def test_lora_is_merged_into_the_player(world: World) -> None:
    place = shared(world, "lora", lora_rank=2, learning_rate=1e-2)
    first = learn(place)
    assert first.facts["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    base = load_file(world.base / "unet" / "diffusion_pytorch_model.safetensors")
    merged = unet_of(world, first)
    assert merged.keys() == base.keys()
    moved = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert moved
    assert all(any(part in name for part in ("to_q", "to_k", "to_v", "to_out.0")) for name in moved)
    generate(place, 2)
    second = train(place, 2)
    assert second.inputs["opponent"] == first.outputs["model"].digest
    assert second.facts["first_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_after_divergence_the_opponent_is_kept_and_play_ends(world: World) -> None:
    place = shared(world, "diverged", learning_rate=10.0, steps=[30], warmup_steps=0)
    index = learn(place)
    base = world.run("diverged").need("prepare", "").outputs["base"]
    assert index.facts["verdict"] == "diverged"
    assert re.fullmatch(r"expected .+; .*lower train.learning_rate, under a new run key", index.facts["reason"])
    assert index.outputs["model"] == base
    assert index.outputs.keys() == {"model", "history"}
    assert not goes_on(place, 2)
    line = score(place, 0).markdown + score(place, 1).markdown
    assert f"- iteration 1: **diverged**, {index.facts['reason']}" in line
    registered = register(world.place("diverged", world.servers.mlflow_uri), "never", 2)
    assert registered.outputs["model"] == base
    assert registered.iteration == 0
    assert registered.facts["version"] == ""


@pytest.mark.parametrize("first", [1, 3])
def test_a_loss_that_is_no_number_ends_the_iteration(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    """From the first step on, or later: the reason is one line, nothing is registered, and a rerun trains no more."""
    place = shared(world, f"no-number-{first}", steps=[5])
    generate(place, 1)
    objective, do, steps = Trainer.objective, Trainer.train_step, []

    def step(self: Trainer, *given: Any) -> dict[str, float]:
        steps.append(self.step + 1)
        return do(self, *given)

    def broken(self: Trainer, batch: Batch) -> Objective:
        made = objective(self, batch)
        share = math.nan if self.step + 1 >= first else 1.0
        return replace(
            made, loss=made.loss * share, measures={name: value * share for name, value in made.measures.items()}
        )

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(Trainer, "objective", broken)
    with caplog.at_level(logging.INFO, "spin"):
        index = train(place, 1)
    assert steps == [*range(1, first + 1)]
    assert index.facts["verdict"] == "diverged"
    assert index.facts["reason"] == (
        f"expected finite measures, got loss nan at step {first} of iteration 1; lower train.learning_rate, under a "
        "new run key"
    )
    assert f"iteration 1: diverged, {index.facts['reason']}" in [record.getMessage() for record in caplog.records]
    assert [row["step"] for row in history(world, index)] == [*range(1, first)]
    assert index.outputs["model"] == world.run(place.run_key).need("prepare", "").outputs["base"]
    assert train(place, 1) == index
    assert steps == [*range(1, first + 1)]
    assert not goes_on(place, 2)
    for iteration in (0, 1):
        score(place, iteration)
    assert register(world.place(place.run_key, world.servers.mlflow_uri), "never", 1).facts["version"] == ""


def test_a_player_that_ruins_unseen_images_is_set_aside(world: World) -> None:
    """Training goes well by its own measures; only the held-out images tell."""
    place = shared(world, "ruined", learning_rate=1e-2, steps=[25], link="correlation", max_winner_drift=1000)
    index = learn(place)
    assert index.facts["verdict"] == "diverged"
    assert index.facts["final_implicit_accuracy"] > 0.8
    assert index.facts["held_out"]["error_change"]["low"] > 0.01
    assert index.outputs["model"].digest == index.inputs["opponent"]
    rejected = models.load(world.store().get(index.outputs["rejected"]), torch.device("cpu"))
    assert not torch.equal(rejected.denoiser.conv_in.weight.cpu(), unet_of(world, index)["conv_in.weight"])


def test_training_goes_on_beside_a_checkpoints_upload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store waits for a later step than the one whose checkpoint it is given."""
    place = shared(world, "beside", steps=[4], checkpoint_every=2)
    generate(place, 1)
    went_on, put, do = threading.Event(), Store.put_folder, Trainer.train_step
    waited = []

    def slow(store: Store, folder: Path) -> Ref:
        if folder.name == "checkpoint-000002":
            waited.append(went_on.wait(60))
        return put(store, folder)

    def step(trainer: Trainer, *arguments: Any) -> dict[str, float]:
        measures = do(trainer, *arguments)
        if trainer.step == 3:
            went_on.set()
        return measures

    monkeypatch.setattr(Store, "put_folder", slow)
    monkeypatch.setattr(Trainer, "train_step", step)
    train(place, 1)
    assert waited == [True]
    assert world.run("beside").read_progress("iteration-001/train") is None


def test_steps_are_chosen_by_the_validation_prompts(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The score that chooses is that of the player which leaves: score-metrics finds it again."""
    place = shared(world, "chosen", learning_rate=1e-3, steps=[6], warmup_steps=0, validate_every=2, patience=2)
    with caplog.at_level(logging.INFO, "spin"):
        index = learn(place)
    asked = {row["step"]: row["validation_score"] for row in history(world, index) if "validation_score" in row}
    assert asked.keys() <= {2, 4, 6}
    assert caplog.text.count("validation_score") == len(asked)
    best = index.facts["best_step"]
    assert index.facts["validation_score"] == max([index.facts["validation_score"], *asked.values()])
    assert best == 0 or asked[best] == index.facts["validation_score"]
    score(place, 0)
    found = score(place, 1).index.facts["metrics"]["validation"]["clip_score"]["value"]
    assert found == pytest.approx(index.facts["validation_score"], rel=1e-4)


@pytest.mark.parametrize("stops", [True, False])
def test_play_ends_after_convergence_unless_told_otherwise(world: World, stops: bool) -> None:
    # In float32, a player that moved by a billionth is still surely better.
    place = shared(world, f"converged-{stops}", learning_rate=1e-30, warmup_steps=0, stop_when_converged=stops)
    index = learn(place)
    assert index.facts["verdict"] == "converged"
    assert index.facts["held_out"]["images"] == world.run(place.run_key).need("prepare", "").facts["validation_rows"]
    assert index.facts["held_out"]["gradient_snr"] > 0
    assert goes_on(place, 1)
    assert goes_on(place, 2) is not stops
    score(place, 0)
    score(place, 1)
    if stops:
        assert register(place, "tiny", 2).iteration == 1
    else:
        assert "iteration-002/train" in refusal(register, place, "tiny", 2)


def test_player_is_a_pipeline_that_draws(world: World, played: Played) -> None:
    folder = world.store().get(played.indexes["iteration-002/train"].outputs["model"])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    mine = {path.relative_to(world.base).as_posix() for path in world.base.rglob("*") if path.is_file()}
    assert names == mine
    for name in names - {"unet/diffusion_pytorch_model.safetensors"}:
        assert (folder / name).read_bytes() == (world.base / name).read_bytes()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("colour 1", height=32, width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert drawn.images[0].size == (32, 32)


def test_validation_picks_the_challenger_not_test(world: World, played: Played) -> None:
    """Of two players, one is better on the validation prompts, the other on the test prompts."""
    for key, best in (("picked-1", 1), ("picked-2", 2)):
        world.copy("played", key)
        world.minio().remove_object("spin", f"tests/runs/{key}/register.json")
        run = world.run(key)
        for k in (1, 2):
            index = played.indexes[f"iteration-00{k}/score"]
            metrics = json.loads(json.dumps(index.facts["metrics"]))
            metrics["validation"]["clip_score"]["value"] = 30.0 if k == best else 20.0
            metrics["test"]["clip_score"]["value"] = 20.0 if k == best else 30.0
            run.finish(index.model_copy(update={"facts": index.facts | {"metrics": metrics}}), instead_of=index)
        index = register(world.place(key, world.servers.mlflow_uri), f"model-{key}", 2)
        assert index.iteration == best
        assert index.facts["version"] == index.facts["versions"][str(best)]
        assert index.facts["alias"] == "challenger"
        assert index.outputs["model"] == played.indexes[f"iteration-00{best}/train"].outputs["model"]
