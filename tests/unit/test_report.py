"""The report is one page that asks nobody for anything, and what people wrote cannot become markup in it."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spin.data.dataset import HeldOut
from spin.report import caption, cell, contact_sheet, html, markdown, row_name, table
from spin.run import Index

EVIL = "<script>alert(1)</script>"


def row(iteration: int, metrics: dict[str, Any]) -> Index:
    return Index(
        stage=f"iteration-{iteration:03d}/score",
        iteration=iteration,
        inputs={},
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


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "sheet.png"
    Image.new("RGB", (300, 200), "red").save(path)
    return path


def held_out(count: int, side: int = 64, prompt: str = "cat") -> list[HeldOut]:
    return [HeldOut(f"i{n}", prompt, Image.new("RGB", (side, side), (0, 0, 255))) for n in range(count)]


def test_the_table_by_hand(rows: list[Index]) -> None:
    assert table(rows) == (
        ["model", "CLIP score", "Win rate over base"],
        [
            ["base", "20.00 [19.75, 20.25]", "-"],
            ["iteration 1", "21.12 [20.87, 21.37]", "0.500 [0.250, 0.750]"],
        ],
    )


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
    assert lines[-1] == "- iteration 1: **improved**, error -2.0 %"


def test_cells_and_names() -> None:
    assert cell("clip_score", None) == "-"
    assert cell("other", estimate(0.5)) == "0.500 [0.250, 0.750]"
    assert (row_name(0), row_name(12)) == ("base", "iteration 12")


def test_markup_in_the_run_key_is_text(rows: list[Index], sheet: Path) -> None:
    page = html(EVIL, rows, [("diverged", EVIL)], sheet)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3


def test_markup_in_a_metric_name_is_text(sheet: Path) -> None:
    page = html("r", [row(0, {EVIL: estimate(1.0)})], [], sheet)
    assert "<script" not in page
    assert "<th>&lt;script&gt;" in page


def test_the_page_is_self_contained(rows: list[Index], sheet: Path) -> None:
    page = html("run-1", rows, [("improved", "error -2.0 %")], sheet)
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<script|<iframe|srcset|\son\w+=", page, re.IGNORECASE)
    sources = re.findall(r"""(?:src|href|action|poster|data)\s*=\s*["']?([^"'>\s]*)""", page)
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert base64.b64decode(sources[0].split(",")[1], validate=True) == sheet.read_bytes()


def test_the_page_is_as_large_as_its_picture(rows: list[Index], sheet: Path) -> None:
    # base64 makes 4 characters of 3 bytes
    assert len(html("run-1", rows, [("improved", "error -2.0 %")], sheet)) < 4 * (sheet.stat().st_size // 3 + 1) + 4000


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
