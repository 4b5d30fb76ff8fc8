"""Scoring a player: what a killed attempt keeps, prompts of one's own, and what is refused."""

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import spin.scoring
from spin.data.dataset import Dataset
from spin.errors import SpinError
from spin.measures import estimates
from spin.prompts import KNOWN, load, stored
from spin.report import scalars
from spin.scorers.clip import ClipScore
from spin.scorers.frechet import Features, frechet_distance
from spin.scoring import decode_png
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.prepare import prepare
from spin.stages.register import register
from spin.stages.score import score, score_shard
from spin.stages.train import train
from spin.weights import digest_of_weights, packaged
from tests import tiny
from tests.integration.world import BUCKET, World

pytestmark = pytest.mark.integration


def refusal(action: Callable[..., object], *arguments: Any) -> str:
    with pytest.raises(SpinError) as refused:
        action(*arguments)
    return str(refused.value)


def prepared(world: World, run_key: str, judge: Path | None = None, **scoring: object) -> Place:
    """Prepare a run whose scoring has the options ``scoring``; return its place."""
    place, options = world.place(run_key), tiny.overrides(judge or world.judge)
    options["score"] |= scoring  # type: ignore[operator]
    prepare(place, "emoji-cpu", str(world.base), str(world.images), options, iterations=2)
    return place


def test_scoring_goes_on_where_it_was_killed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are stored are not drawn again, and the result is the same to the byte.

    One chunk's images are held at a time.
    """
    monkeypatch.setattr("spin.scoring.CHUNK", 4)
    whole = score(prepared(world, "unbroken", images_per_prompt=5), 0).index
    place = prepared(world, "scoring-killed", images_per_prompt=5)
    drawn: list[int] = []
    images: list[weakref.ref[Image.Image]] = []
    real = spin.scoring.draw

    def draw(model: object, config: object, jobs: list[object], shape: object) -> object:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(jobs))
        assert not [image for image in images if image()]
        found = real(model, config, jobs, shape)
        images.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr("spin.scoring.draw", draw)
    with pytest.raises(KeyboardInterrupt):
        score(place, 0)
    progress = world.run("scoring-killed").read_progress("iteration-000/score-0000-of-0001")
    assert progress is not None
    assert len(progress["parts"]) == 2
    assert world.names("parts/") >= {f"parts/folders/{ref['digest']}.json" for ref in progress["parts"]}
    assert world.run("scoring-killed").find("iteration-000/score") is None
    drawn[:] = [0] * 3
    index = score(place, 0).index
    assert sum(drawn[3:]) == index.items - 8
    assert index.outputs == whole.outputs
    assert index.facts == whole.facts
    # What the chunks held is in the outputs now.
    assert world.run("scoring-killed").read_progress("iteration-000/score-0000-of-0001") is None
    assert not world.names("parts/") & {f"parts/folders/{ref['digest']}.json" for ref in progress["parts"]}


def test_number_of_shards_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images, scores, features and estimates to the byte; a shard that was killed goes on."""
    monkeypatch.setattr("spin.scoring.CHUNK", 4)
    options = {"images_per_prompt": 3, "frechet_model": "emoji"}
    whole = score(prepared(world, "in-one-shard", **options), 0).index
    place = prepared(world, "in-three-shards", **options)
    stages = [f"iteration-000/score-{shard:04d}-of-0003" for shard in range(3)]
    found = world.run("in-three-shards")

    assert refusal(score, place, 0, 3).startswith(f"expected {stages[0]} with ")
    write, written = spin.scoring._write, []

    def dies(*arguments: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr("spin.scoring._write", dies)
        with pytest.raises(KeyboardInterrupt):
            score_shard(place, 0, 2, 3)
    counts = [score_shard(place, 0, shard, 3) for shard in (2, 0)]
    assert refusal(score, place, 0, 3).startswith(f"expected {stages[1]} with ")
    assert found.find("iteration-000/score") is None
    counts.append(score_shard(place, 0, 1, 3))
    assert sum(counts) == whole.items
    assert min(counts) > 4, "every shard has several chunks"
    monkeypatch.setattr("spin.scoring.draw", None)
    index = score(place, 0, 3).index
    assert index.outputs == whole.outputs
    assert index.facts == whole.facts
    assert (index.items, index.inputs) == (whole.items, whole.inputs)
    assert index.cost["flops"] == whole.cost["flops"]
    assert index.seconds > 0
    # What the shards held is in the outputs now, and nothing is left to draw.
    assert all(found.read_progress(stage) is None for stage in stages)
    assert score_shard(place, 0, 1, 3) == 0


def test_more_shards_than_chunks(world: World) -> None:
    place = prepared(world, "idle-shards")
    assert [score_shard(place, 0, shard, 4) > 0 for shard in range(4)] == [True, True, False, False]
    assert score(place, 0, 4).index.outputs == score(prepared(world, "no-idle-shards"), 0).index.outputs


def test_shards_with_different_weights_are_not_put_together(world: World, tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(world.judge, judge)
    place = prepared(world, "mixed-judges", judge)
    score_shard(place, 0, 0, 2)
    (judge / "notes.txt").write_text("another")
    score_shard(place, 0, 1, 2)
    line = refusal(score, place, 0, 2)
    assert line.startswith("expected iteration-000/score-0001-of-0002 scored with the weights of the first shard")
    for shard in range(2):
        score_shard(place, 0, shard, 2)
    assert score(place, 0, 2).index.facts["weights"] == {"clip_score": digest_of_weights(judge)}


@pytest.mark.parametrize(
    ("shard", "shards", "line"),
    [(2, 2, "expected a shard from 0 to 1, got 2"), (0, 0, "expected at least 1 shard, got 0")],
)
def test_a_shard_that_is_none(world: World, shard: int, shards: int, line: str) -> None:
    assert refusal(score_shard, world.place("any"), 0, shard, shards).startswith(line)


@pytest.mark.parametrize(
    ("option", "own", "named"),
    [("clip_model", "judge", "clip_score"), ("frechet_model", "features", "frechet_distance")],
)
def test_other_weights_are_not_put_beside(world: World, tmp_path: Path, option: str, own: str, named: str) -> None:
    """A model that changed between iterations would give differences that are its own."""
    model = tmp_path / own
    shutil.copytree(world.judge if own == "judge" else packaged(own, "emoji"), model)
    run_key = f"other-{own}"
    place = prepared(world, run_key, **{option: str(model)})
    assert score(place, 0).index.facts["weights"][named] == digest_of_weights(model)
    generate(place, 1)
    train(place, 1)
    (model / "notes.txt").write_text("another")
    assert f"expected the weights of {named} that iteration 0 was scored with" in refusal(score, place, 1)
    assert world.run(run_key).find("iteration-001/score") is None


def test_drawn_and_real_images_are_in_one_feature_space(world: World, tmp_path: Path) -> None:
    model = tmp_path / "features"
    shutil.copytree(packaged("features", "emoji"), model)
    place = prepared(world, "mixed-features", frechet_model=str(model))
    score_shard(place, 0, 0, 2)
    score_shard(place, 0, 1, 2)
    (model / "notes.txt").write_text("another")
    assert refusal(score, place, 0, 2).startswith("expected real images scored with the weights of the first shard")
    for shard in range(2):
        score_shard(place, 0, shard, 2)
    assert score(place, 0, 2).index.facts["weights"]["frechet_distance"] == digest_of_weights(model)


def test_no_number_of_prompts_is_too_many_for_the_sheet(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be lowered once the player is trained: the sheets show what they have room for."""
    place = prepared(world, "long-sheet", sheet_prompts=10_000)
    monkeypatch.setattr("spin.report.MOST_PICTURES", 4)
    scored = score(place, 0)
    count = scored.index.facts["prompts"]["test"]
    assert count > 2
    assert f"1 of {count} held-out prompts" in scored.html
    # The base's picture and the real one of 2 prompts.
    with Image.open(world.store().get(scored.index.outputs["sheet"])) as sheet:
        assert sheet.width == 84 + 2 * 100


def test_a_file_of_prompts_stands_for_the_test_split(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,category\n<b>cat</b>,one\ncolour 3,two\ncolour 3,two\n")
    place = prepared(world, "own-prompts", prompts=str(tmp_path / "mine.csv"), images_per_prompt=3)
    made = world.run("own-prompts").need("prepare", "")
    scored = score(place, 0)
    assert scored.index.facts["prompts"] == {"validation": made.facts["validation_rows"], "test": 3}
    assert scored.index.inputs["prompts"] == made.outputs["prompts"].digest
    table = pq.read_table(world.store().get(scored.index.outputs["scores"]), filters=[("split", "=", "test")])
    assert table["prompt"].to_pylist() == ["<b>cat</b>"] * 3 + ["colour 3"] * 6
    values = table["clip_score"].to_numpy().reshape(3, 3)
    assert len({*values.flatten()}) == 9
    found = {kind: scored.index.facts[kind]["test"] for kind in ("metrics", "best_of_n", "by_category")}
    assert found["metrics"]["clip_score"]["value"] == pytest.approx(values.mean(), abs=1e-4)
    assert found["best_of_n"]["clip_score"]["value"] == pytest.approx(values.max(1).mean(), abs=1e-4)
    assert found["by_category"]["two"]["clip_score"]["value"] == pytest.approx(values[1:].mean(), abs=1e-4)
    assert "<b>cat" not in scored.html


def test_the_first_scorer_decides(world: World) -> None:
    scorers = ["style_share", "clip_score"]
    place = prepared(world, "by-style", scorers=scorers, styles=["red", "blue"])
    score(place, 0)
    generate(place, 1)
    train(place, 1)
    scored = score(place, 1)
    facts = scored.index.facts
    for split in ("validation", "test"):
        assert facts["metrics"][split]["win_rate"] == facts["win_rates"][split]["base"]["style_share"]
        assert facts["win_rates"][split]["base"]["style_share"] != facts["win_rates"][split]["base"]["clip_score"]
    assert "| model | Style share | CLIP score | Win rate over base |" in scored.markdown
    # What was stored is in another order than what was just made; the reports are the same.
    assert score(place, 1).markdown == scored.markdown
    assert list(scalars(scored.index)) == list(scalars(score(place, 1).index)) == [*scorers, "win_rate"]
    assert estimates(facts) == estimates(score(place, 1).index.facts)
    assert register(place, "by-style", 1).facts["chosen_by"] == "validation style_share"


def test_a_score_that_is_no_number_stops_the_stage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    place = prepared(world, "no-number")
    monkeypatch.setattr(ClipScore, "score", lambda _, images, __: torch.full((len(images),), float("nan")))
    assert "expected finite scores from clip_score, got nan for 'colour" in refusal(score, place, 0)
    assert world.documents("no-number").keys() == {"run.json", "prepare.json"}


def test_the_frechet_distance_is_that_of_the_first_images(world: World) -> None:
    place = prepared(world, "distance", frechet_model="emoji", images_per_prompt=2)
    index = score(place, 0).index
    pictures = pq.read_table(world.store().get(index.outputs["images"])).to_pylist()
    data = Dataset(world.store().get(world.run("distance").need("prepare", "").outputs["dataset"]))
    features = Features("emoji", torch.device("cpu"))
    for split in ("validation", "test"):
        drawn = [decode_png(row["image"]) for row in pictures if row["split"] == split and row["sample"] == 0]
        real = [row.image for row in data.held_out(split, 500)]
        wanted = frechet_distance(features.of(drawn), features.of(real))
        assert index.facts["frechet_distance"][split] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(SpinError, match=r"expected an image model .+ '/nowhere' .+; set score.frechet_model"):
        prepared(world, "no-features", frechet_model="/nowhere")


def test_a_judge_on_the_server_scores_as_the_one_on_disk(world: World) -> None:
    for path in world.judge.iterdir():
        world.minio().fput_object(BUCKET, f"users/ann/judge/{path.name}", str(path))
    place = prepared(world, "judge-on-server", clip_model=f"s3://{BUCKET}/users/ann/judge")
    found, wanted = score(place, 0).index, score(prepared(world, "judge-on-disk"), 0).index
    assert found.outputs == wanted.outputs
    assert found.facts["weights"] == wanted.facts["weights"] == {"clip_score": digest_of_weights(world.judge)}


def test_a_known_set_is_fetched_once_per_store(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, fetched = tmp_path / "PartiPrompts.tsv", []
    home.write_text("Prompt\tCategory\na cat\tAnimals\na map\tArts\n")

    def fetch(url: str) -> Path:
        fetched.append(url)
        return home

    monkeypatch.setattr("spin.prompts.download", fetch)
    monkeypatch.setitem(KNOWN, "partiprompts", replace(KNOWN["partiprompts"], count=2))
    refs = [stored(world.store(), "partiprompts") for _ in range(2)]
    assert refs[0] == refs[1]
    assert fetched == [KNOWN["partiprompts"].url]
    rows = [(row.prompt, row.category) for row in load(world.store().get(refs[0]))]
    assert rows == [("a cat", "Animals"), ("a map", "Arts")]
