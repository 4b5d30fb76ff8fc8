"""The report of a run, made of what the store holds: one self-contained HTML page and its Markdown."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from spin import charts, report
from spin.comparison import Row, costs
from spin.errors import SpinError
from spin.run import Run, iteration_stage
from spin.stages.generate import shard_stage
from spin.stages.train import verdict_of

MOST_BYTES = 2_000_000
PICTURE_BYTES = MOST_BYTES * 7 // 10
"""Of all pictures, in base64; the rest is for text and charts."""
SIZES = ((192, 82), (160, 78), (128, 72), (96, 65), (72, 50), (48, 40))
"""(longest side in pixels, WebP quality), tried one after another until the pictures fit."""
MOST_MODELS = 7
MOST_POINTS = 150
CHANGES = 4
CURVES = {
    "loss": "Loss (log 2 at the start)",
    "implicit_accuracy": "Pairs told apart",
    "winner_drift": "Drift of the error on winners",
    "loser_drift": "Drift of the error on losers",
    "margin": "Margin",
    "grad_norm": "Gradient norm",
}

Place = tuple[str, int]
"""Prompt id and sample."""


@dataclass(frozen=True)
class Pages:
    """The same report for two readers, and the last model's PNGs of the contact sheet by a name for MLflow."""

    html: str
    markdown: str
    pictures: dict[str, bytes]


@dataclass(frozen=True)
class Cell:
    """A picture with what stands below it; ``source`` is a data URI."""

    source: str
    alt: str
    name: str
    score: str


class Gathered:
    """What a run's store says up to an iteration; tables and pictures are of the test prompts."""

    def __init__(self, run: Run, iteration: int):
        self.run, self.iteration = run, iteration
        self.config, self.prepared = run.config(), run.need("prepare", "the report")
        numbers = range(iteration + 1)
        self.scored = [run.need(iteration_stage(k, "score"), "the report") for k in numbers]
        self.trained = [run.need(iteration_stage(k, "train"), "the report") for k in numbers if k]
        chosen = np.linspace(0, iteration, min(iteration + 1, MOST_MODELS)).round().astype(int)
        self.models = [int(k) for k in chosen]
        """Iterations that are drawn; all of them, where they are few."""
        self.primary = self.config.score.primary

    @cached_property
    def scores(self) -> dict[int, dict[Place, dict[str, Any]]]:
        """Rows of the drawn models, by place."""
        found = {}
        for k in self.models:
            rows = pq.read_table(self._path(k, "scores"), filters=[("split", "=", "test")]).to_pylist()
            found[k] = {(row["id"], row["sample"]): row for row in rows}
        return found

    @property
    def shown(self) -> list[Place]:
        """Places on the contact sheet: first images, the same ones whatever the number of iterations."""
        firsts = [place for place in self.scores[self.iteration] if place[1] == 0]
        return report.shown(firsts, self.config.score.sheet_prompts, MOST_MODELS + 1)

    def _path(self, iteration: int, name: str) -> Path:
        return self.run.store.get(self.scored[iteration].outputs[name])

    def images(self, iteration: int, places: Sequence[Place]) -> dict[Place, bytes]:
        """Return the PNGs that a model drew."""
        where = [("split", "=", "test"), ("id", "in", [id for id, _ in places])]
        rows = pq.read_table(self._path(iteration, "images"), filters=where).to_pylist()
        return {(row["id"], row["sample"]): row["image"] for row in rows}

    def real_images(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the held-out real images of prompts that have one."""
        path = self.run.store.part(self.prepared.outputs["dataset"], "held-out.parquet")
        rows = pq.read_table(path, columns=["id", "image"], filters=[("id", "in", list(ids))]).to_pylist()
        return {row["id"]: row["image"] for row in rows}

    def history(self, iteration: int) -> list[dict[str, float]]:
        path = self.run.store.get(self.trained[iteration - 1].outputs["history"])
        return [json.loads(line) for line in path.read_text().splitlines()]


def last_scored(run: Run) -> int:
    """Return the last iteration whose scores are complete.

    Raises:
        SpinError: there is none.
    """
    iteration = -1
    while run.find(iteration_stage(iteration + 1, "score")):
        iteration += 1
    if iteration < 0:
        raise SpinError(
            f"expected scores of run {run.key!r}, got none in {run.store.uri}; check the run key, or score the base"
        )
    return iteration


def build(run: Run, iteration: int) -> Pages:
    """Return the report of a run up to ``iteration``, from the store alone."""
    found = Gathered(run, iteration)
    verdicts = [verdict_of(index) for index in found.trained]
    drawn = found.images(iteration, found.shown)
    pictures = {}
    for place in found.shown:
        # MLflow's keys know few signs; two prompts may become one key.
        name = re.sub(r"[^A-Za-z0-9_. -]+", " ", found.scores[iteration][place]["prompt"]).strip()[:60]
        pictures[f"prompts/{name or place[0]}{' ' + place[0] if f'prompts/{name}' in pictures else ''}"] = drawn[place]
    return Pages(_html(found, verdicts), report.markdown(run.key, found.scored, verdicts, _spent(found)), pictures)


def _spent(found: Gathered) -> list[dict[str, Any]]:
    """Return what every iteration took; the losers came in as many shards as training read."""
    rows = []
    for k, trained in enumerate(found.trained, 1):
        shards = len(trained.inputs["losers"])
        drawn = [found.run.need(shard_stage(k, shard, shards), "the report") for shard in range(shards)]
        scored = found.scored[k]
        rows.append(Row(report.row_name(k), "", k, [scored], [*drawn, trained, scored]))
    return costs(rows)


def _html(found: Gathered, verdicts: Sequence[tuple[str, str]]) -> str:
    places, shown, primary = list(found.scores[found.iteration]), found.shown, found.primary
    best, worst = _changes(found, places)
    real = found.real_images([id for id, _ in shown])
    rows: list[dict[Any, bytes]] = [{id: real[id]} if id in real else {} for id, _ in shown]
    changes: dict[Any, bytes] = {}
    for k in found.models:
        changed = best + worst if k in (0, found.iteration) else []
        drawn = found.images(k, [*shown, *changed])
        for row, place in zip(rows, shown, strict=True):
            row[k, place] = drawn[place]
        changes |= {(k, place): drawn[place] for place in changed}
    sources, kept = shrunk(rows, changes)

    def cell(k: int, place: Place) -> Cell:
        row, name = found.scores[k][place], report.row_name(k)
        score = report.number(primary, row[primary])
        return Cell(sources[k, place], f"{row['prompt']}: {name}, {report.title_of(primary)} {score}", name, score)

    def strip(place: Place) -> dict[str, Any]:
        prompt = found.scores[found.iteration][place]["prompt"]
        cells = [cell(k, place) for k in found.models]
        if place[0] in real:
            cells.append(Cell(sources[place[0]], f"{prompt}: real image", "real", ""))
        return {"prompt": prompt, "cells": cells}

    def change(place: Place) -> dict[str, Any]:
        prompt = found.scores[0][place]["prompt"]
        return {"prompt": prompt, "cells": [cell(0, place), cell(found.iteration, place)]}

    return _template().render(
        key=found.run.key,
        iteration=found.iteration,
        finished=f"{datetime.fromisoformat(found.scored[-1].producer['finished']):%Y-%m-%d %H:%M %Z}",
        cards=_cards(found, verdicts),
        scores=report.table(found.scored),
        caption=report.caption(found.scored),
        verdicts=[(report.row_name(k), word, reason) for k, (word, reason) in enumerate(verdicts, 1)],
        sheet=[strip(shown[row]) for row in kept],
        prompts=found.scored[-1].facts["prompts"]["test"],
        best=[change(place) for place in best],
        worst=[change(place) for place in worst],
        primary=report.title_of(primary),
        wins=_wins(found),
        further=report.further(found.scored),
        distributions=_distributions(found),
        curves=_curves(found),
        legend=[(charts.colour(k), report.row_name(k)) for k in found.models if k],
        lineage=_lineage(found),
    )


def _template() -> Any:
    # Autoescaping makes text of whatever people wrote; only the charts are markup already.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _changes(found: Gathered, places: Sequence[Place]) -> tuple[list[Place], list[Place]]:
    """Return where the last player gained most over the base, and where it lost most."""
    if not found.iteration:
        return [], []
    base, last, primary = found.scores[0], found.scores[found.iteration], found.primary
    both = [place for place in places if place in base]
    ranked = sorted(both, key=lambda place: last[place][primary] - base[place][primary])
    count = min(CHANGES, len(ranked) // 2)
    return ranked[::-1][:count], ranked[:count]


def shrunk(
    rows: Sequence[Mapping[Any, bytes]], always: Mapping[Any, bytes], budget: int = PICTURE_BYTES
) -> tuple[dict[Any, str], list[int]]:
    """Return pictures as data URIs that take at most ``budget`` characters together, and the rows that are among them.

    They are never enlarged. Rows are left out, evenly, where they do not fit even at the smallest size; the few
    pictures in ``always`` never are.
    """
    opened = {key: _opened(data) for part in (*rows, always) for key, data in part.items()}
    for side, quality in SIZES:
        sources = {key: _source(image, side, quality) for key, image in opened.items()}
        if sum(map(len, sources.values())) <= budget:
            return sources, list(range(len(rows)))
    for count in range(len(rows), -1, -1):
        kept = report.evenly(range(len(rows)), count)
        left = {key: sources[key] for part in (*(rows[row] for row in kept), always) for key in part}
        if sum(map(len, left.values())) <= budget:
            break
    return left, kept


def _opened(data: bytes) -> Image.Image:
    """Return a picture no larger than the page shows it, so that all of them have room in memory."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    largest = SIZES[0][0]
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return image


def _source(image: Image.Image, side: int, quality: int) -> str:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _cards(found: Gathered, verdicts: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Return (title, value, note) of what to read first."""
    last, primary = found.scored[-1].facts["metrics"]["test"], found.primary
    chosen = max(found.scored, key=lambda index: index.facts["metrics"]["validation"][primary]["value"])
    before, now, best = (
        report.number(primary, index.facts["metrics"]["test"][primary]["value"])
        for index in (found.scored[0], found.scored[-1], chosen)
    )
    note = "the base model"
    if found.iteration:
        note = f"base {before}; best on validation: {report.row_name(chosen.iteration)}, {best}"
    cards = [(report.title_of(primary), now, note)]
    if rate := last.get("win_rate"):
        cards.append(("Win rate over base", f"{100 * rate['value']:.0f} %", f"surely above {_floor(rate['low'])} %"))
    if verdicts:
        cards.append((report.row_name(found.iteration), *verdicts[-1]))
    return cards


def _floor(share: float) -> int:
    """Return the whole per cent that ``share`` surely reaches: rounded, 0.496 would be a half."""
    # Of what floats make of 29 per cent, 28.999999999999996, it is 29.
    return math.floor(round(100 * share, 6))


def _wins(found: Gathered) -> Any:
    rows = []
    for before, k in zip(found.models, found.models[1:], strict=False):
        rates = found.scored[k].facts["win_rates"]["test"]
        for rival in dict.fromkeys((report.row_name(0), report.row_name(before))):
            rows.append((f"{report.row_name(k)} over {rival}", k, rates[rival][found.primary]))
    told = "; ".join(f"{name} {share['value']:.2f}" for name, _, share in rows)
    return charts.bars(rows, f"Win rates: {told}") if rows else None


def _distributions(found: Gathered) -> list[tuple[str, Any]]:
    table = pa.Table.from_pylist(list(found.scores[found.iteration].values()))
    names = {k: report.row_name(k) for k in found.models}
    drawn = []
    for field in table.schema:
        if not pa.types.is_floating(field.type):
            continue
        series = {
            k: np.array([row[field.name] for row in found.scores[k].values() if field.name in row])
            for k in found.models
        }
        # Shares of yes and no are in the table.
        if all(len(values) for values in series.values()) and len(np.unique(np.concatenate([*series.values()]))) > 2:
            title = report.title_of(field.name)
            told = "; ".join(f"{names[k]} mean {values.mean():.3g}" for k, values in series.items())
            drawn.append((title, charts.distributions(series, names, f"Distribution of {title}: {told}")))
    return drawn


def _curves(found: Gathered) -> list[tuple[str, Any]]:
    histories = {k: found.history(k) for k in found.models if k}
    drawn = []
    for name, title in CURVES.items():
        series = {}
        for k, rows in histories.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                series[k] = points[:: max(1, len(points) // MOST_POINTS)]
        if series:
            told = "; ".join(
                f"{report.row_name(k)} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for k, points in series.items()
            )
            drawn.append((title, charts.curves(series, f"{title}: {told}")))
    return drawn


def _lineage(found: Gathered) -> list[tuple[str, str]]:
    producer = found.scored[-1].producer
    rows = [
        ("preset", found.config.preset),
        ("objective", found.config.train.objective),
        ("base model", found.config.base_model),
        ("data", found.config.data.source),
        ("data set", found.prepared.outputs["dataset"].digest),
        ("base", found.prepared.outputs["base"].digest),
    ]
    rows += [(report.row_name(index.iteration), index.outputs["model"].digest) for index in found.trained]
    return rows + [(name, producer[name]) for name in ("commit", "image", "kfp_run_id", "device") if producer.get(name)]
