"""Estimates from scores per image, against small tables whose answers are plain."""

import numpy as np
import pyarrow as pa
import pytest
from mlflow.utils.validation import validate_param_and_metric_name

from spin.measures import average, estimates, followed, measure, representatives, with_average

FOUR = ["hpsv2_0", "aesthetic", "image_reward", "pickscore"]


def table(scores: list[float], category: list[str] | None = None, **more: list[float]) -> pa.Table:
    return pa.table({"category": category or [""] * len(scores), "clip_score": scores, **more})


def test_the_average_is_the_papers() -> None:
    """Its SFT row: (0.2749 + 5.9451 + 1.1051 + 21.4542) / 4 = 7.1948."""
    row = dict(zip(FOUR, ([0.2749], [5.9451], [1.1051], [21.4542]), strict=True))
    assert average(row) == pytest.approx([7.1948], abs=5e-5)
    assert with_average(["clip_score", *FOUR])[-1] == "average"
    assert "average" not in with_average(["clip_score", "hpsv2_1", *FOUR[1:]])


def test_the_best_of_several_is_chosen_by_the_average() -> None:
    scores = [1.0, 3.0, 2.0, 9.0, 8.0, 7.0]
    assert representatives(table(scores), "clip_score", 3).tolist() == [1, 3]
    assert representatives(table(scores, average=[0.0, 1.0, 2.0, 0.0, 0.0, 5.0]), "clip_score", 3).tolist() == [2, 5]


def test_one_image_and_the_best_of_several() -> None:
    mine = table([1.0, 3.0, 2.0, 9.0, 8.0, 7.0], other=[5.0, 6.0, 7.0, 1.0, 2.0, 3.0])
    base = table([1.0, 1.0, 1.0, 10.0, 8.0, 8.0], other=[5.0, 5.0, 8.0, 1.0, 2.0, 4.0])
    facts = measure(mine, {"base": base, "iteration 1": mine}, ["clip_score", "other"], 3, 100)
    metrics, best = facts["metrics"], facts["best_of_n"]
    assert metrics["clip_score"]["value"] == pytest.approx((2 + 8) / 2)
    assert metrics["clip_score"]["median"] == 5.0
    # Of the best images by the primary score, on either score: 3 and 9, 6 and 1.
    assert (best["clip_score"]["value"], best["other"]["value"]) == (6.0, 3.5)
    # Image by image: tie, win, win; loss, tie, loss. Best against best: 3 beats 1, 9 loses to 10.
    assert metrics["win_rate"]["value"] == pytest.approx((2.5 / 3 + 0.5 / 3) / 2)
    assert best["win_rate"]["value"] == 0.5
    assert facts["win_rates"]["base"]["clip_score"] == metrics["win_rate"]
    assert facts["win_rates"]["base"]["other"]["value"] == pytest.approx((1.5 / 3 + 1 / 3) / 2)
    assert facts["win_rates"]["iteration 1"]["clip_score"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_the_base_has_nothing_to_win_over() -> None:
    facts = measure(table([1.0, 2.0]), {}, ["clip_score"], 1, 100)
    assert facts.keys() == {"metrics", "win_rates"}
    assert facts["metrics"].keys() == {"clip_score"}


def test_categories() -> None:
    styles = ["anime", "anime", "Signs & Words", "Signs & Words"]
    facts = measure(table([1.0, 2.0, 5.0, 6.0], styles), {}, ["clip_score"], 1, 100)
    assert {name: row["clip_score"]["value"] for name, row in facts["by_category"].items()} == {
        "anime": 1.5,
        "Signs _ Words": 5.5,
    }
    many = [str(i) for i in range(30)]
    alike = ["动物", "植物", "C++", "C#", "C_ 2", "a" * 61, "a" * 62]
    found = measure(table([float(i) for i in range(7)], alike), {}, ["clip_score"], 1, 10)["by_category"]
    names = ["动物", "植物", "C_", "C_ 2", "C_ 2 2", "a" * 60, "a" * 60 + " 2"]
    assert {name: row["clip_score"]["value"] for name, row in found.items()} == {n: i for i, n in enumerate(names)}
    assert all(validate_param_and_metric_name(f"test.by_category.{name}.clip_score") for name in names)
    assert "by_category" not in measure(table([1.0] * 30, many), {}, ["clip_score"], 1, 10)


def test_intervals_are_over_prompts() -> None:
    """Five equal images of a prompt are no five times as much evidence."""
    values = np.random.default_rng(0).normal(size=40)
    one = measure(table(values.tolist()), {}, ["clip_score"], 1, 500)["metrics"]["clip_score"]
    five = measure(table(np.repeat(values, 5).tolist()), {}, ["clip_score"], 5, 500)["metrics"]["clip_score"]
    assert {k: five[k] for k in ("value", "low", "high")} == pytest.approx(
        {k: one[k] for k in ("value", "low", "high")}
    )


def test_every_estimate_is_a_row_and_is_followed() -> None:
    mine = table([1.0, 3.0, 2.0, 4.0], ["a", "a", "b", "b"])
    facts = {kind: {"test": found} for kind, found in measure(mine, {"base": mine}, ["clip_score"], 2, 100).items()}
    facts["frechet_distance"] = {"test": 7.0}
    rows = {(row["kind"], row["of"], row["score"]): row for row in estimates(facts)}
    assert rows.keys() == {
        *(("metrics", "", name) for name in ("clip_score", "win_rate", "frechet_distance")),
        *(("best_of_n", "", name) for name in ("clip_score", "win_rate")),
        ("win_rates", "base", "clip_score"),
        *(("by_category", category, "clip_score") for category in "ab"),
    }
    columns = ("split", "kind", "of", "score", "median", "value", "low", "high")
    assert {tuple(row) for row in estimates(facts)} == {columns}
    assert followed(facts) == {
        "test.clip_score": 2.5,
        "test.median.clip_score": 2.5,
        "test.win_rate": 0.5,
        "test.frechet_distance": 7.0,
        "test.best_of_n.clip_score": 3.5,
        "test.best_of_n.win_rate": 0.5,
        "test.win_rates.base.clip_score": 0.5,
        "test.by_category.a.clip_score": 2.0,
        "test.by_category.b.clip_score": 3.0,
    }
