"""Comparisons: equal budgets, one run per arm and seed, and tables that say what the scores say."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.budget import passes, passes_in, steps_for
from spin.comparison import ARMS, Row, arms_of, best, compare, costs, default_arms
from spin.config import override
from spin.errors import SpinError
from spin.presets import preset
from spin.report import comparison
from spin.run import Index, Run
from spin.store import Ref

PROMPTS, IMAGES, SCORES = 30, 2, ["clip_score", "hpsv2_0"]
SHARED = preset("emoji-cpu")


def scored(folder: Path, name: str, mean: float, seed: int) -> Index:
    """Write scores of 30 prompts around ``mean``; the prompts differ more than the models."""
    prompts = np.random.default_rng(0).normal(0, 2, PROMPTS).repeat(IMAGES)
    noise = np.random.default_rng(seed).normal(0, 0.2, PROMPTS * IMAGES)
    # A second score, on which SFT gains a tenth of a point and whoever scores 25 on the first loses.
    other = (0.1 if mean == 22 else 0.0 if mean == 20 else -0.2) + prompts + noise / 10
    table = pa.table({"split": ["test"] * PROMPTS * IMAGES, "clip_score": mean + prompts + noise, "hpsv2_0": other})
    pq.write_table(table, folder / f"{name}-{seed}.parquet")
    ref = Ref.model_construct(uri=str(folder / f"{name}-{seed}.parquet"))
    facts = {
        "metrics": {"test": {"clip_score": {}, "hpsv2_0": {}}},
        "prompts": {"test": PROMPTS},
        "images_per_prompt": IMAGES,
    }
    return stage(
        "score", inputs={"config": {"scorers": ["clip_score", "hpsv2_0"]}}, outputs={"scores": ref}, facts=facts
    )


def stage(name: str, **values: Any) -> Index:
    known = {"inputs": {}, "outputs": {}, "facts": {}, "seconds": 36.0, "items": 8, "producer": {},
             "cost": {"flops": 36e12, "mfu": 0.5 if name == "train" else 0.25, "accelerator_hours": 0.16}}  # fmt: skip
    return Index.model_construct(stage=f"iteration-001/{name}", iteration=1, **(known | values))


@pytest.fixture
def run() -> Run:
    return cast(Run, SimpleNamespace(store=SimpleNamespace(get=lambda ref: Path(ref.uri))))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    def row(title: str, mean: float, seeds: int, arm: str) -> Row:
        stages = [stage("generate-0000-of-0001"), stage("train", seconds=72.0)] * seeds
        scores = [scored(tmp_path, title, mean, seed) for seed in range(seeds)]
        return Row(title, arm, 1, scores, [*stages, *scores])

    return [row("base", 20, 1, "base"), row("sft", 22, 2, "sft"), row("spin 1", 25, 2, "spin")]


# --- arms


def test_rivals_get_the_budget_of_self_play() -> None:
    arms = {arm.name: arm for arm in arms_of("run", SHARED, ARMS, iterations=3, seeds=1, pairs=322)}
    budget = passes(arms["spin"].config, 322, 3)
    for name in ("sft", "sft-lora", "dpo"):
        spent = passes(arms[name].config, 322, 1)
        assert 0 <= budget - spent < (8 if name == "dpo" else 3) * arms[name].config.train.batch_size
        assert arms[name].iterations == 1
    assert arms["spin"].iterations == 3
    assert arms["spin"].config.train.steps == SHARED.train.steps


def test_dpo_learns_from_the_datas_own_pairs_where_they_are() -> None:
    paired = override(SHARED, {"train": {"objective": "dpo"}})
    arms = {arm.name: arm for arm in arms_of("run", paired, default_arms(paired), 3, 1, 322)}
    assert arms.keys() == ARMS.keys()
    assert arms["dpo"].config.train.needs_pairs
    assert arms["spin"].config.train == SHARED.train
    assert default_arms(SHARED)["dpo"]["train"]["pairs"] == "ranked"


def test_given_steps_stay() -> None:
    (arm,) = arms_of("run", SHARED, {"sft": {"train": {"objective": "sft", "steps": [7]}}}, 3, 1, 322)
    assert arm.config.train.steps == (7,)


@pytest.mark.parametrize(
    ("names", "payer"), [(["a", "b", "spin"], "spin"), (["a", "b"], "a"), (["exact", "b"], "b"), (["exact"], "exact")]
)
def test_one_self_play_arm_is_the_budget_whatever_the_order(names: list[str], payer: str) -> None:
    """The one named spin, else the first by name, approximate ones before exact ones; KFP hands over in any order."""
    options: dict[str, Any] = {
        "a": {"steps": [90]},
        "b": {"steps": [10]},
        "spin": {"steps": [20]},
        "exact": {"objective": "exact-spin", "steps": [7]},
    }
    arms = {"sft": {"train": {"objective": "sft"}}, **{name: {"train": options[name]} for name in names}}
    found = [arms_of("run", SHARED, dict(order), 2, 1, 322) for order in (arms.items(), reversed(arms.items()))]
    assert found[0] == found[1]
    by_name = {arm.name: arm.config for arm in found[0]}
    assert by_name["sft"].train.steps[0] == steps_for(by_name["sft"], 322, passes(by_name[payer], 322, 2))


def test_an_exact_arm_gets_every_iterations_budget_and_lifts_nobodys() -> None:
    exact = {"exact": {"train": {"objective": "exact-spin", "trajectory_steps": 10}}}
    paper = override(preset("sd15-paper"), {"train": {"decay_steps": 600}})
    with_it, without = (
        {arm.name: arm for arm in arms_of("run", paper, arms, 3, 1, 10**5)} for arms in ({**ARMS, **exact}, ARMS)
    )
    assert {name: with_it[name].config for name in ARMS} == {name: arm.config for name, arm in without.items()}
    dear = with_it["exact"].config
    assert with_it["exact"].iterations == 3
    assert dear.train.decay_steps == max(dear.train.steps)
    for k in (1, 2, 3):
        budget = passes_in(with_it["spin"].config, 10**5, k)
        assert 0 <= budget - passes_in(dear, 10**5, k) < 100 * dear.train.batch_size
    given = arms_of("run", paper, {"spin": {}, "e": {"train": {"objective": "exact-spin", "steps": [9]}}}, 3, 1, 10**5)
    assert given[0].config.train.steps == (9,)


def test_a_rate_that_decays_does_so_over_the_given_steps() -> None:
    paper = preset("sd15-paper")
    arms = {arm.name: arm for arm in arms_of("run", paper, ARMS, 3, 1, pairs=10**6)}
    for name in ("sft", "sft-lora"):
        assert arms[name].config.train.decay_steps == arms[name].config.train.steps[0] > 500
    assert arms["spin"].config.train.decay_steps == 500


def test_a_run_per_arm_and_seed() -> None:
    arms = arms_of("run", SHARED, {"a": {}, "b": {"train": {"beta": [10]}}}, 2, seeds=2, pairs=322)
    assert [arm.run_key for arm in arms] == ["run-a-0", "run-b-0", "run-a-1", "run-b-1"]
    assert [(arm.config.train.seed, arm.config.generate.seed) for arm in arms] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert {arm.config.score.seed for arm in arms} == {SHARED.score.seed}, "the same images are compared"


@pytest.mark.parametrize(
    ("arms", "seeds", "line"),
    [
        ({}, 1, "expected at least one arm and one seed, got 0 and 1"),
        ({"a": {}}, 0, "expected at least one arm and one seed, got 1 and 0"),
        (
            {"A b": {}},
            1,
            "expected arms named by small letters, digits, '-' and '.' (at most 19, not 'base'), got 'A b'",
        ),
        (
            {"base": {}},
            1,
            "expected arms named by small letters, digits, '-' and '.' (at most 19, not 'base'), got 'base'",
        ),
        ({"a": {"train": {"bta": [1]}}}, 1, "expected a known option, got 'train.bta'; did you mean 'beta'?"),
        (
            {"a": {"generate": {"num_inference_steps": 5}}},
            1,
            "expected arm 'a' to change train, generate.opponent_guidance or generate.roundtrip, got {'generate': "
            "{'num_inference_steps': 5}}; give what all arms share in overrides",
        ),
    ],
)
def test_bad_arms_are_refused(arms: dict[str, Any], seeds: int, line: str) -> None:
    with pytest.raises(SpinError) as refused:
        arms_of("run", SHARED, arms, 1, seeds, 322)
    assert str(refused.value).startswith(line)


# --- tables


def test_every_row_stands_against_base_and_sft(run: Run, rows: list[Row]) -> None:
    base, sft, spin = compare(run, rows, "test")
    assert base["clip_score"]["value"] == pytest.approx(20, abs=1)
    assert spin["clip_score_minus_base"]["value"] == pytest.approx(5, abs=0.1)
    # Paired: the prompts' own differences, ten times the effect's interval, drop out.
    assert spin["clip_score_minus_sft"]["high"] - spin["clip_score_minus_sft"]["low"] < 0.3
    assert spin["win_rate_over_sft"]["value"] == 1
    assert spin["gain_shares"] == pytest.approx({"clip_score": 5 / 2, "hpsv2_0": -2}, abs=0.1)
    assert sft["gain_shares"] == pytest.approx({"clip_score": 1, "hpsv2_0": 1})
    assert spin["win_rates"]["sft"]["clip_score"] == spin["win_rate_over_sft"]
    assert spin["win_rates"]["sft"]["hpsv2_0"]["value"] == 0
    assert sft["win_rates"].keys() == {"base"}
    assert "win_rate_over_sft" not in sft
    assert base["gain_shares"] == {}


def test_no_share_of_a_gain_that_is_not_there(run: Run, rows: list[Row]) -> None:
    base, _, spin = rows
    same = Row("sft", "sft", 1, base.scores * 2, [])
    assert compare(run, [base, same, spin], "test")[2]["gain_shares"] == {}


def test_a_seed_whose_play_has_ended_counts_with_its_last_scores(run: Run, rows: list[Row]) -> None:
    base, _, spin = rows
    ended = Row("spin 2", "spin", 2, spin.scores, spin.stages[:2], ended=1)
    line = compare(run, [base, spin, ended], "test")[2]
    assert line["ended"] == 1
    assert line["clip_score"] == compare(run, rows, "test")[2]["clip_score"]
    assert costs([ended])[0]["generate"]["seconds"] == 36.0


def test_costs_are_means_over_seeds(rows: list[Row]) -> None:
    sft, _ = costs(rows[1:])
    assert sft["train"] == {"seconds": 72.0, "items": 8, "accelerator_hours": 0.16, "mfu": 0.5}
    assert sft["generate"]["seconds"] == 36.0
    assert (sft["hours"], sft["hours_share"]) == (0.32, 1)
    first, second = costs([rows[1], rows[2], replace(rows[2], title="spin 2", iteration=2)])[1:]
    assert [(line["hours"], line["hours_share"]) for line in (first, second)] == [(0.32, 1), (0.64, 2)]
    uncounted = replace(rows[1], stages=[stage("train", seconds=72.0, cost={})] * 2)
    assert costs([uncounted])[0]["train"]["accelerator_hours"] == 0.02, "a CPU counts as one"


def test_the_report_shows_every_row_and_the_choice(run: Run, rows: list[Row]) -> None:
    rows[1] = replace(rows[1], diverged=1)
    lines = compare(run, rows, "test")
    facts = {
        "split": "test",
        "primary": "clip_score",
        "seeds": 2,
        "rows": {line["title"]: line for line in lines},
        "costs": {line["title"]: line for line in costs(rows[1:])},
        "best_on_validation": best(lines, "clip_score")["title"],
    }
    text = comparison("run", rows[0].scores[0], stage("comparison", facts=facts))
    assert "| spin 1 (best on validation) | 2" in text
    assert f"| {100 * lines[2]['gain_shares']['clip_score']:+.0f} % | 0.320 (1.00) |" in text
    shares = " | ".join(f"{100 * share:+.0f} %" for share in lines[2]["gain_shares"].values())
    assert (
        f"| model | CLIP score | HPSv2.0 |\n| --- | --- | --- |\n| sft | +100 % | +100 % |\n| spin 1 | {shares} |"
        in text
    )
    assert "## Win rates over sft\n\n| model | CLIP score | HPSv2.0 |\n| --- | --- | --- |\n| base | 0.0" in text
    assert "| sft | 36 s, 8 | 72 s, 8 | 36 s, 8 | 25 % / 50 % / 25 % | 0.320 |" in text
    assert "30 test prompts, 2 image(s) each, 2 training seed(s)" in text
    assert "; sft: 1 seed(s) diverged, and count with the player before" in text
    assert "spin 1: " not in text
