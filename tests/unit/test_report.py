"""The contact sheet and the tables; what people wrote cannot become markup in them."""

from typing import Any

import pytest
from PIL import Image

from spin.data.dataset import HeldOut
from spin.report import (
    caption,
    cell,
    contact_sheet,
    decision,
    evenly,
    further,
    markdown,
    plain,
    row_name,
    scalars,
    shown,
    spending,
    table,
)  # fmt: skip
from spin.run import Index

EVIL = "<script>alert(1)</script>"


def row(iteration: int, metrics: dict[str, Any]) -> Index:
    return Index(
        stage=f"iteration-{iteration:03d}/score",
        iteration=iteration,
        inputs={"config": {"scorers": [name for name in metrics if name != "win_rate"]}},
        outputs={},
        facts={"metrics": {"test": metrics, "validation": {}}, "prompts": {"test": 7}, "images_per_prompt": 2},
        seconds=1.0,
        items=14,
        producer={},
    )


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.25, "high": value + 0.25}


@pytest.fixture
def rows() -> list[Index]:
    return [
        row(0, {"clip_score": estimate(20.0)}),
        row(1, {"clip_score": estimate(21.123), "win_rate": estimate(0.5)}),
    ]


def held_out(count: int, side: int = 64, prompt: str = "cat") -> list[HeldOut]:
    return [HeldOut(f"i{n}", prompt, Image.new("RGB", (side, side), (0, 0, 255))) for n in range(count)]


def test_the_table_by_hand(rows: list[Index]) -> None:
    found = table(rows)
    assert found.header == ["model", "CLIP score", "Win rate over base"]
    assert found.body == [
        ["base", "20.00 [19.75, 20.25]", "-"],
        ["iteration 1", "21.12 [20.87, 21.37]", "0.500 [0.250, 0.750]"],
    ]
    assert further(rows) == []


def with_all(iteration: int, category: str = "anime", **rates: Any) -> Index:
    """Return the scores of a player with everything that can be estimated."""
    value = float(iteration)
    index = row(iteration, {"hpsv2_0": estimate(0.27) | {"median": 0.28 + value / 100}})
    facts = {
        "best_of_n": {"test": {"hpsv2_0": estimate(0.3 + value / 100)}},
        "win_rates": {"test": {title: {"hpsv2_0": estimate(rate)} for title, rate in rates.items()}},
        "by_category": {"test": {category: {"hpsv2_0": estimate(0.29 + value / 100)}}},
        "frechet_distance": {"test": 12.3456 - value},
    }
    return index.model_copy(update={"facts": index.facts | facts})


def test_all_that_is_estimated_is_shown() -> None:
    rows = [with_all(0), with_all(1, base=0.75)]
    assert table(rows).header == ["model", "HPSv2.0", "Fréchet distance"]
    assert [line[-1] for line in table(rows).body] == ["12.346", "11.346"]
    medians, best, rates, categories = further(rows)
    assert (medians.title, medians.body) == ("Medians", [["base", "0.2800"], ["iteration 1", "0.2900"]])
    assert (best.title, best.body[1]) == ("Best of 2", ["iteration 1", "0.3100 [0.0600, 0.5600]"])
    assert (rates.title, rates.header) == ("Win rates of iteration 1", ["iteration 1", "HPSv2.0"])
    assert rates.body == [["over base", "0.750 [0.500, 1.000]"]]
    assert (categories.title, categories.header) == ("HPSv2.0 by category", ["category", "base", "iteration 1"])
    assert categories.body == [["anime", "0.2900 [0.0400, 0.5400]", "0.3000 [0.0500, 0.5500]"]]
    lines = markdown("r", rows, [("improved", "well")]).splitlines()
    for title in ("Medians", "Best of 2", "Win rates of iteration 1", "HPSv2.0 by category"):
        assert f"## {title}" in lines
    assert scalars(rows[1]) == {"hpsv2_0": 0.27, "frechet_distance": pytest.approx(11.3456)}


def test_a_category_is_text() -> None:
    assert EVIL not in markdown("r", [with_all(0, EVIL)], [])


def test_markdown(rows: list[Index]) -> None:
    lines = markdown("run-1", rows, [("improved", "error -2.0 % [-3.0, -1.0]")]).splitlines()
    assert lines[0] == "# Run run-1"
    assert lines[2:6] == [
        "| model | CLIP score | Win rate over base |",
        "| --- | --- | --- |",
        "| base | 20.00 [19.75, 20.25] | - |",
        "| iteration 1 | 21.12 [20.87, 21.37] | 0.500 [0.250, 0.750] |",
    ]
    assert lines[-1] == "- iteration 1: **improved**, error -2.0 % [-3.0, -1.0]"
    assert caption(rows).startswith("7 held-out test prompts, 2 image(s) each")


def test_markdown_says_what_it_took(rows: list[Index]) -> None:
    phase = {"seconds": 61.4, "items": 512, "mfu": 0.487, "accelerator_hours": 0.25}
    line = {"title": "iteration 1", "generate": phase, "train": phase, "score": {**phase, "mfu": None}}
    lines = markdown("run-1", rows, [("improved", "error -2.0 %")], [line]).splitlines()
    assert "| iteration 1 | 61 s, 512 | 61 s, 512 | 61 s, 512 | 49 % / 49 % / - | 0.500 |" in lines
    assert "- iteration 1: **improved**, error -2.0 %" in lines


def test_times_are_the_seed_papers() -> None:
    """Per 2,048 images and pairs over all iterations, per iteration, and in all; what was not drawn has no time."""

    def line(arm: str, title: str, drawn: tuple[float, int], trained: tuple[float, int]) -> dict[str, Any]:
        spent = {"generate": drawn, "train": trained, "score": (9.0, 9)}
        phases = {
            phase: {"seconds": seconds, "items": items, "accelerator_hours": seconds / 3600, "mfu": None}
            for phase, (seconds, items) in spent.items()
        }
        return {"arm": arm, "title": title, **phases}

    lines = spending([
        line("spin", "spin 1", (30.0, 1024), (60.0, 512)),
        line("spin", "spin 2", (90.0, 1024), (120.0, 2560)),
        line("sft", "sft", (1.0, 0), (72.0, 4096)),
    ])  # fmt: skip
    assert lines[-4:] == [
        "|  | sampling per 2,048 images | training per 2,048 pairs | sampling, iteration 1 | training, iteration 1 | "
        "sampling, iteration 2 | training, iteration 2 | total | accelerator-hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        # 2048 * (30 + 90) / (1024 + 1024), 2048 * (60 + 120) / (512 + 2560); (30 + 90 + 60 + 120) / 3600 hours
        "| spin | 120.0 s | 120.0 s | 30 s | 60 s | 90 s | 120 s | 300 s | 0.083 |",
        "| sft | - | 36.0 s | - | 72 s | - | - | 73 s | 0.020 |",
    ]


def test_cells_and_names() -> None:
    assert cell("clip_score", None) == "-"
    assert cell("other", estimate(0.5)) == "0.500 [0.250, 0.750]"
    assert (row_name(0), row_name(12)) == ("base", "iteration 12")


def test_markup_is_text_in_markdown() -> None:
    lines = markdown("r", [row(0, {EVIL: estimate(1.0)})], [("diverged", f"{EVIL} [x](javascript:1) | `a`")])
    assert "<script" not in lines
    assert "| model | &lt;script&gt;alert(1)&lt;/script&gt; |" in lines
    assert r"[x]\(javascript:1) \| \`a\`" in lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("error -2.0 % [-3.0, -1.0]", "error -2.0 % [-3.0, -1.0]"),
        ("a\n# b", "a # b"),
        ("![x](http://a/b.png)", r"![x]\(http://a/b.png)"),
        ("[x][y]", r"[x]\[y]"),
        ("<img src=x onerror=y>", "&lt;img src=x onerror=y&gt;"),
    ],
)
def test_any_text_is_shown_as_it_is(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_kfp_lists_ten_numbers_at_most() -> None:
    many = row(0, {f"m{n}": estimate(float(n)) for n in range(14)})
    assert scalars(many) == {f"m{n}": float(n) for n in range(10)}


def registered(**facts: Any) -> Index:
    index = row(1, {})
    return index.model_copy(update={"facts": {"model_name": "emoji", "version": "3", **facts}})


def test_the_gates_decision_by_hand() -> None:
    finding = {"name": "clip_score", "value": 2.0, "low": 1.0, "high": 3.0, "above": 0.5}
    gate = {"outcome": "passed", "against": "the base", "reason": "against the base: all well", "findings": [finding]}
    assert decision(registered(gate=gate)).splitlines() == [
        "# Gate: passed",
        "",
        "Challenger: iteration 1, emoji version 3",
        "",
        "against the base: all well",
        "",
        "|  | against the base | asked for | surely so |",
        "| --- | --- | --- | --- |",
        "| clip_score | 2.00 [1.00, 3.00] | above 0.5 | yes |",
    ]
    assert "Nothing registered" in decision(registered())


def test_prompts_of_a_sheet_are_evenly_apart() -> None:
    assert evenly("abcdefgh", 3) == ["a", "c", "f"]
    assert evenly("abc", 9) == ["a", "b", "c"]
    assert evenly("abc", 0) == evenly("", 4) == []


def test_a_sheet_has_room_for_so_many_pictures() -> None:
    split = range(20_000)
    assert shown(split, 12, 8) == evenly(split, 12)
    # The most that can be asked for, with 7 models and the real image: 1000 pictures.
    assert shown(split, 10_000, 8) == evenly(split, 125)
    assert shown(split, 10_000, 3000) == [0]


def test_contact_sheet_layout() -> None:
    prompts = held_out(3)
    first = {p.id: Image.new("RGB", (64, 64), (255, 0, 0)) for p in prompts}
    second = {p.id: Image.new("RGB", (64, 64), (0, 255, 0)) for p in prompts}
    sheet = contact_sheet([first, second], prompts)
    # 64 px are shown at 96: label 84 + 3 * (96 + 4), head 16 + (2 + 1) * (96 + 4)
    assert sheet.size == (384, 316)
    # centre of column 2 is 84 + 2 * 100 + 48 = 332; centres of the rows 16 + 48 = 64, + 100, + 100
    assert [sheet.getpixel((332, y)) for y in (64, 164, 264)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.mark.parametrize(("width", "side"), [(32, 96), (100, 100), (512, 160)])
def test_pictures_are_shown_at_96_to_160_pixels(width: int, side: int) -> None:
    prompts = held_out(1, width)
    sheet = contact_sheet([{"i0": Image.new("RGB", (width, width))}], prompts)
    assert sheet.size == (84 + side + 4, 16 + 2 * (side + 4))


@pytest.mark.parametrize("prompt", ["", "火の鳥 🔥", "line\nbreak", EVIL, "word " * 200])
def test_any_prompt_can_head_a_column(prompt: str) -> None:
    prompts = held_out(2, prompt=prompt)
    sheet = contact_sheet([{p.id: p.image for p in prompts}], prompts)
    assert sheet.getpixel((84 + 48, 16 + 48)) == (0, 0, 255)
