"""Pictures fit their budget, and charts are well-formed markup whatever the numbers and words are."""

import base64
import io
import math
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from spin import charts
from spin.page import PICTURE_BYTES, _cards, _wins, shrunk

EVIL = "<script>alert(1)</script>\"'&"


def noise(side: int, seed: int = 0) -> bytes:
    """Return the picture that compresses worst."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def size_of(source: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"), validate=True))).size


def test_pictures_of_a_large_run_fit() -> None:
    large = noise(512)
    # A sheet of 12 prompts with 7 models and the real image, and 8 changes.
    rows = [dict.fromkeys(((row, model) for model in range(8)), large) for row in range(12)]
    sources, kept = shrunk(rows, dict.fromkeys(range(16), large))
    assert kept == list(range(12))
    assert len(sources) == 12 * 8 + 16
    assert sum(map(len, sources.values())) <= PICTURE_BYTES
    width, height = size_of(sources[0])
    assert 96 <= width == height < 192


def test_small_pictures_are_not_enlarged() -> None:
    sources, _ = shrunk([{"a": noise(64)}], {})
    assert size_of(sources["a"]) == (64, 64)


def test_rows_beyond_the_budget_are_left_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spin.page.SIZES", ((48, 40),))
    rows = [{row: noise(48, row), (row, "real"): noise(48, row)} for row in range(9)]
    # One of the two stands in the first row too, and counts once.
    always = {"change": noise(48), 0: noise(48)}
    sources, kept = shrunk(rows, always)
    assert kept == list(range(9))
    size = max(map(len, sources.values()))
    # There is room for ten: a change, and four rows of two.
    sources, kept = shrunk(rows, always, budget=int(10.5 * size))
    assert kept == [0, 2, 4, 6]
    assert {size_of(source) for source in sources.values()} == {(48, 48)}
    assert sources.keys() == {*always, *(key for row in kept for key in rows[row])}
    assert sum(map(len, sources.values())) <= 10.5 * size


def test_the_changes_are_shown_whatever_the_budget() -> None:
    sources, kept = shrunk([{"a": noise(64)}], {"b": noise(64)}, budget=0)
    assert (kept, sources.keys()) == ([], {"b"})


def drawn(chart: str) -> ElementTree.Element:
    assert "nan" not in chart
    assert "inf" not in chart
    return ElementTree.fromstring(chart)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.5), (2, 0.25), (3, math.nan)],
        [(1, 0.0)],
        [(1, 2.0), (2, 2.0)],
        [(1, math.nan)],
        [(1, -1e-9), (1000, 1e9)],
    ],
)
def test_curves_of_any_numbers(points: list[tuple[float, float]]) -> None:
    chart = drawn(charts.curves({1: points, 2: [(1, 1.0)]}, EVIL))
    assert chart.get("aria-label") == EVIL
    first, second = chart.findall("polyline")
    assert len(str(first.get("points")).split()) == sum(math.isfinite(y) for _, y in points)
    assert (first.get("class"), second.get("class")) == ("line c1", "line c2")


def test_a_distribution_by_hand() -> None:
    chart = drawn(charts.distributions({0: np.array([0.0, 0.0, 1.0]), 1: np.ones(3)}, {0: "base", 1: EVIL}, "two"))
    heights = {name: [] for name in ("bar c0", "bar c1")}
    for bar in chart.findall("rect"):
        heights[str(bar.get("class"))].append(float(str(bar.get("height"))))
    # Shares of the images: 2/3 and 1/3; all of them. The tallest bar is 38 high.
    assert heights == {"bar c0": [pytest.approx(25.3), pytest.approx(12.7)], "bar c1": [38.0]}
    assert f"{EVIL}, mean 1" in [text.text for text in chart.findall("text")]


def test_bars_by_hand() -> None:
    share = {"value": 0.5, "low": 0.25, "high": 1.0}
    chart = drawn(charts.bars([("one", 1, share), (EVIL, 2, share)], "wins"))
    assert [bar.get("width") for bar in chart.findall("rect")] == ["162.0", "162.0"]
    assert "one: 0.50 [0.25, 1.00]" in [text.text for text in chart.findall("text")]


def test_colours_repeat_but_never_as_the_bases() -> None:
    assert [charts.colour(k) for k in (0, 1, 6, 7, 12, 13)] == ["c0", "c1", "c6", "c1", "c6", "c1"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.05, 2.3), (1e-6, 3e-6), (-700, 90000)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:.3g}") <= 6 for tick in found)


def share(value: float, low: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": 1.0}


def gathered(models: list[int], *rates: dict[str, dict[str, float]]) -> Any:
    """Return of a run what cards and win rates read; ``rates`` are those of iterations 0, 1, ... by earlier player."""
    scored = []
    for k, mine in enumerate(rates):
        metrics = {"clip_score": share(20.0, 0)} | ({"win_rate": mine["base"]} if mine else {})
        won = {title: {"clip_score": found} for title, found in mine.items()}
        facts = {"metrics": {"test": metrics, "validation": metrics}, "win_rates": {"test": won}}
        scored.append(SimpleNamespace(iteration=k, facts=facts))
    return SimpleNamespace(iteration=models[-1], models=models, primary="clip_score", scored=scored)


@pytest.mark.parametrize(("low", "told"), [(0.496, 49), (0.5, 50), (0.29, 29), (0.999, 99), (1.0, 100), (0.0, 0)])
def test_surely_above_never_says_more_than_the_interval(low: float, told: int) -> None:
    cards = _cards(gathered([0, 1], {}, {"base": share(1.0, low)}), [("improved", "well")])
    assert cards[1] == ("Win rate over base", "100 %", f"surely above {told} %")


def test_win_rates_are_those_of_the_table() -> None:
    rates = [
        {},
        {"base": share(0.75, 0.5)},
        {"base": share(0.8, 0.6), "iteration 1": share(0.7, 0.4)},
        {"base": share(0.9, 0.8), "iteration 1": share(0.65, 0.3), "iteration 2": share(0.6, 0.2)},
    ]
    # Iteration 2 is not drawn: 3 stands beside the one drawn before it.
    chart = drawn(str(_wins(gathered([0, 1, 3], *rates))))
    assert [text.text for text in chart.findall("text")][:3] == [
        "iteration 1 over base: 0.75 [0.50, 1.00]",
        "iteration 3 over base: 0.90 [0.80, 1.00]",
        "iteration 3 over iteration 1: 0.65 [0.30, 1.00]",
    ]
    assert _wins(gathered([0], {})) is None
