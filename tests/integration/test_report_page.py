"""The report of a whole run whose prompts are markup: self-contained, small, and text stays text."""

import html.parser
import json
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from spin.__main__ import app
from spin.page import MOST_BYTES, build, last_scored
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.prepare import prepare
from spin.stages.score import Scored, score
from spin.stages.train import train
from tests import tiny
from tests.integration.world import EXPERIMENT, World

pytestmark = pytest.mark.integration

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> [x](javascript:alert(3)) | & {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tiny.images(tmp_path_factory.mktemp("evil") / "images")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(row | {"text": f"{EVIL} {n}"}) + "\n" for n, row in enumerate(rows))
    )
    place = world.place("evil", world.servers.mlflow_uri)
    prepare(place, "emoji-cpu", str(world.base), str(folder), tiny.overrides(world.judge), iterations=1)
    score(place, 0)
    generate(place, 1)
    train(place, 1)
    return place


@pytest.fixture(scope="module")
def scored(place: Place) -> Scored:
    return score(place, 1)


class Page(html.parser.HTMLParser):
    """Collects what a browser would make of a page: elements with attributes, and text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_prompts_are_text(scored: Scored) -> None:
    page = Page(scored.html)
    assert EVIL in page.text
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert "<script" not in scored.markdown


def test_nothing_is_asked_of_anybody(scored: Scored) -> None:
    page = Page(scored.html)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            value = attributes.get(name)
            assert value is None or (tag == "img" and value.startswith("data:image/webp;base64,"))
    assert not re.search(r"@import|url\(", scored.html)
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_picture_and_chart_has_words(scored: Scored) -> None:
    elements = Page(scored.html).elements
    alts = [attributes["alt"] for tag, attributes in elements if tag == "img"]
    # 3 prompts with base, iteration 1 and the real image; one best and one worst change of 2 pictures each, or more.
    assert len(alts) >= 3 * 3 + 4
    assert all(alt and EVIL in alt for alt in alts)
    labels = [attributes.get("aria-label") for tag, attributes in elements if tag == "svg"]
    assert len(labels) >= 4
    assert all(labels)
    assert any("Win rates: iteration 1 over base" in str(label) for label in labels)
    assert any("Loss (log 2 at the start): iteration 1 from 0.693" in str(label) for label in labels)


def test_the_page_is_small(scored: Scored) -> None:
    assert len(scored.html.encode()) < MOST_BYTES / 10


def test_the_page_is_made_again_from_the_store(world: World, place: Place, scored: Scored) -> None:
    run = world.run(place.run_key)
    assert last_scored(run) == 1
    assert build(run, 1).html == scored.html


def test_the_command_writes_the_page_of_the_last_iteration(
    world: World, place: Place, scored: Scored, tmp_path: Path
) -> None:
    where = [f"--run-key={place.run_key}", f"--store-uri={world.store_uri}"]
    where += [f"--store-endpoint={world.servers.s3_endpoint}", f"--output={tmp_path / 'page.html'}"]
    ended = CliRunner().invoke(app, ["report", *where])
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "page.html").read_text() == scored.html


def test_only_the_shown_part_of_the_data_set_is_fetched(
    world: World, place: Place, scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIN_CACHE", str(tmp_path))
    assert build(world.run(place.run_key), 1).html == scored.html
    assert not (tmp_path / "folders").exists()


def test_keys_of_pictures_are_plain(world: World, scored: Scored) -> None:
    client = MlflowClient(world.servers.mlflow_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    where = "tags.`spin.run_key` = 'evil' and tags.`spin.stage` = 'pipeline'"
    (run,) = client.search_runs([experiment], where)
    names = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    assert scored
    assert len([name for name in names if "prompts~" in name and "+step+1+" in name and name.endswith(".png")]) == 3
    assert all(re.fullmatch(r"images/[A-Za-z0-9_.~+ -]+", name) for name in names)
