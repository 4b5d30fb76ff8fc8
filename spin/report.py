"""What people look at: the contact sheet, and tables in Markdown; the HTML page is in ``spin/page.py``."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, ImageDraw

from spin.measures import scores_of
from spin.run import Index

if TYPE_CHECKING:
    from spin.data.dataset import HeldOut, Prompt

Item = TypeVar("Item")

TITLES = {
    "clip_score": "CLIP score",
    "style_share": "Style share",
    "hpsv2_0": "HPSv2.0",
    "hpsv2_1": "HPSv2.1",
    "pickscore": "PickScore",
    "image_reward": "ImageReward",
    "aesthetic": "Aesthetic",
    "average": "Average",
    "win_rate": "Win rate over base",
    "frechet_distance": "Fréchet distance",
}
DIGITS = {"clip_score": 2, "hpsv2_0": 4, "hpsv2_1": 4}
"""Decimals that a scale deserves, where they are not three."""
MARGIN = 4
MOST_PICTURES = 1000
"""On a sheet: far more than anyone looks at, and no more than memory, MLflow and a page of 2 MB have room for."""
MOST_SCALARS = 10


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, for any reader; the first column names the row.

    Attributes:
        note: what to know of it; empty: nothing.
    """

    title: str
    header: list[str]
    body: list[list[str]]
    note: str = ""


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return ``count`` of ``items``, at most all, evenly apart: neighbours in a data set are often alike."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def shown(items: Sequence[Item], asked: int, pictures: int) -> list[Item]:
    """Return the ``items`` of a split that a sheet shows, with ``pictures`` of each: as many as asked for, at most as
    many as it has room for."""
    return evenly(items, min(asked, max(1, MOST_PICTURES // pictures)))


def row_name(iteration: int) -> str:
    return "base" if iteration == 0 else f"iteration {iteration}"


def contact_sheet(
    iterations: Sequence[Mapping[str, Image.Image]], prompts: "Sequence[HeldOut | Prompt]"
) -> Image.Image:
    """Return one row per iteration (same prompts, same seeds), and real images, where there are some, as the last."""
    side = max(96, min(160, iterations[0][prompts[0].id].width))
    label = 84
    rows = [(row_name(k), [images[p.id] for p in prompts]) for k, images in enumerate(iterations)]
    if real := [p.image for p in prompts if hasattr(p, "image")]:
        rows.append(("real", real))
    head = 16
    sheet = Image.new("RGB", (label + len(prompts) * (side + MARGIN), head + len(rows) * (side + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        x = label + column * (side + MARGIN)
        text = prompt.prompt if len(prompt.prompt) * 6 <= side else prompt.prompt[: side // 6 - 1] + "."
        draw.text((x, 2), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    for line, (name, images) in enumerate(rows):
        y = head + line * (side + MARGIN)
        draw.text((4, y + side // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            resized = image if image.width == side else image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(resized, (label + column * (side + MARGIN), y))
    return sheet


def title_of(name: str) -> str:
    return TITLES.get(name, name)


def number(name: str, value: float) -> str:
    """Return ``value`` with the digits that the metric's scale deserves; ``name`` may go on behind the metric's."""
    digits = next((digits for metric, digits in DIGITS.items() if name.startswith(metric)), 3)
    return f"{value:.{digits}f}"


def cell(name: str, metric: Mapping[str, float] | None) -> str:
    """Return ``value [low, high]``."""
    if metric is None:
        return "-"
    value, low, high = (number(name, metric[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def table(rows: Sequence[Index], split: str = "test") -> Table:
    """Return the result table: what to expect of one image; ``rows`` are the score indexes of iterations 0..k."""
    found = _of_models("Scores", rows, "metrics", split)
    distances = [row.facts.get("frechet_distance", {}).get(split) for row in rows]
    if any(distance is not None for distance in distances):
        found.header.append(TITLES["frechet_distance"])
        for line, distance in zip(found.body, distances, strict=True):
            line.append("-" if distance is None else number("frechet_distance", distance))
    return found


def further(rows: Sequence[Index], split: str = "test") -> list[Table]:
    """Return what else was estimated: medians, the best of several images, win rates, means by category."""
    last, n = rows[-1], rows[-1].facts["images_per_prompt"]
    metrics = last.facts["metrics"][split]
    tables = []
    names = scores_of(last)
    if all("median" in metrics[name] for name in names):
        body = [
            [row_name(row.iteration), *(number(name, row.facts["metrics"][split][name]["median"]) for name in names)]
            for row in rows
        ]
        tables.append(Table("Medians", ["model", *map(title_of, names)], body, "The score of the middle image."))
    if "best_of_n" in last.facts:
        found = _of_models(f"Best of {n}", rows, "best_of_n", split)
        note = "Each prompt's best image alone: it flatters a player whose images vary."
        tables.append(Table(found.title, found.header, found.body, note))
    if rates := last.facts.get("win_rates", {}).get(split):
        titles = [row_name(row.iteration) for row in rows[:-1]]
        body = [[f"over {title}", *(cell("win_rate", rates[title][name]) for name in names)] for title in titles]
        note = "Share of images that score higher than the earlier player's from the same noise; ties count half."
        header = [row_name(last.iteration), *map(title_of, names)]
        tables.append(Table(f"Win rates of {row_name(last.iteration)}", header, body, note))
    categories = last.facts.get("by_category", {}).get(split, {})
    for name in names if categories else []:
        body = [
            [category, *(cell(name, row.facts["by_category"][split][category][name]) for row in rows)]
            for category in categories
        ]
        header = ["category", *(row_name(row.iteration) for row in rows)]
        tables.append(Table(f"{title_of(name)} by category", header, body))
    return tables


def _of_models(title: str, rows: Sequence[Index], kind: str, split: str) -> Table:
    """Return a row per model and a column per estimate of one kind of facts."""
    names = _columns(rows[-1], rows[-1].facts[kind][split])
    body = [
        [row_name(row.iteration), *(cell(name, row.facts[kind][split].get(name)) for name in names)] for row in rows
    ]
    return Table(title, ["model", *map(title_of, names)], body)


def _columns(scored: Index, known: Mapping[str, Any]) -> list[str]:
    """Return the names in ``known`` in their order, the primary score first: what was stored has lost it."""
    return [name for name in (*scores_of(scored), "win_rate") if name in known]


def caption(rows: Sequence[Index], split: str = "test") -> str:
    facts = rows[-1].facts
    return (
        f"{facts['prompts'][split]} held-out {split} prompts, {facts['images_per_prompt']} image(s) each, the same "
        "seeds in every row; 95 % bootstrap intervals over prompts; ties count half"
    )


def scalars(index: Index, split: str = "test") -> dict[str, float]:
    """Return the means that KFP lists beside a task, the first ten: its view has no room for more."""
    metrics = index.facts["metrics"][split]
    means = {name: metrics[name]["value"] for name in _columns(index, metrics)}
    if (distance := index.facts.get("frechet_distance", {}).get(split)) is not None:
        means["frechet_distance"] = distance
    return dict(list(means.items())[:MOST_SCALARS])


PER = 2048
"""Images or pairs that the seed paper's tables give times for: its batch."""


def spending(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tables of what rows of ``spin.comparison.costs`` took, in Markdown: each row, and each arm in all."""
    phases = ("generate", "train", "score")
    head = ["model", "generating: time, images", "training: time, pairs", "scoring: time, images", "MFU of the three",
            "accelerator-hours"]  # fmt: skip
    body = [
        [
            line["title"],
            *(f"{line[p]['seconds']:.0f} s, {line[p]['items']}" for p in phases),
            " / ".join(f"{100 * line[p]['mfu']:.0f} %" if line[p].get("mfu") else "-" for p in phases),
            f"{_hours([line]):.3f}",
        ]
        for line in costs
    ]
    return [*_grid(head, body), "", *_by_iteration(costs)]


def _hours(lines: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(line[p]["accelerator_hours"] for line in lines for p in ("generate", "train")))


def _by_iteration(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the seed paper's table: times per 2,048 images and pairs, per iteration, and in all."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for line in costs:
        arms.setdefault(line.get("arm") or "this run", []).append(line)
    longest = max((len(lines) for lines in arms.values()), default=0)
    both = (("generate", "sampling"), ("train", "training"))

    def seconds(lines: Sequence[Mapping[str, Any]], phase: str) -> float:
        return float(sum(line[phase]["seconds"] for line in lines))

    def rate(lines: Sequence[Mapping[str, Any]], phase: str) -> str:
        items = sum(line[phase]["items"] for line in lines)
        return f"{PER * seconds(lines, phase) / items:.1f} s" if items else "-"

    head = ["", "sampling per 2,048 images", "training per 2,048 pairs"]
    head += [f"{name}, iteration {k}" for k in range(1, longest + 1) for _, name in both]
    body = [
        [
            name,
            *(rate(lines, phase) for phase, _ in both),
            *(
                f"{lines[k][phase]['seconds']:.0f} s" if k < len(lines) and lines[k][phase]["items"] else "-"
                for k in range(longest)
                for phase, _ in both
            ),
            f"{sum(seconds(lines, phase) for phase, _ in both):.0f} s",
            f"{_hours(lines):.3f}",
        ]
        for name, lines in arms.items()
    ]
    return _grid([*head, "total", "accelerator-hours"], body)


def markdown(
    run_key: str,
    rows: Sequence[Index],
    verdicts: Sequence[tuple[str, str]],
    costs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return all tables, what the run took, and each iteration's verdict (from the first) for KFP's Markdown view."""
    scores = table(rows)
    lines = [f"# Run {run_key}", "", *_grid(scores.header, scores.body), "", caption(rows), ""]
    lines += [f"- {row_name(k)}: **{word}**, {plain(reason)}" for k, (word, reason) in enumerate(verdicts, 1)]
    for found in further(rows):
        lines += ["", f"## {plain(found.title)}", "", *_grid(found.header, found.body)]
        lines += ["", found.note] if found.note else []
    if costs:
        lines += ["", "## Time spent", "", *spending(costs)]
    return "\n".join([*lines, ""])


def decision(registered: Index) -> str:
    """Return what register-model decided, as Markdown: the challenger, the gate's outcome, each condition."""
    facts, gate = registered.facts, registered.facts.get("gate")
    if gate is None:
        return "# Nothing registered\n\nThe first iteration diverged; the base model is the best.\n"
    name = f"{facts['model_name']} version {facts['version']}" if facts["version"] else "not registered"
    lines = [
        f"# Gate: {gate['outcome']}",
        "",
        f"Challenger: iteration {registered.iteration}, {name}",
        "",
        gate["reason"],
    ]
    conditions = [
        [f["name"], cell(f["name"], f), f"above {f['above']:g}", "yes" if f["low"] > f["above"] else "no"]
        for f in gate["findings"]
    ]
    if conditions:
        lines += ["", *_grid(["", f"against {gate['against']}", "asked for", "surely so"], conditions)]
    return "\n".join([*lines, ""])


def comparison(run_key: str, base: Index, compared: Index) -> str:
    """Return the tables of a comparison as Markdown: scores, standing against base and rival, and costs."""
    facts = compared.facts
    lines, split, spent = list(facts["rows"].values()), facts["split"], facts["costs"]
    scores = scores_of(base)
    names = list(scores)
    kinds = ("win_rate_over", f"{facts['primary']}_minus")
    names += [f"{kind}_{against}" for against in ("base", "sft") for kind in kinds]
    names = [name for name in names if any(name in line for line in lines)]
    head = ["model", *(TITLES.get(name, name.replace("_", " ")) for name in names), "share of SFT's gain"]
    head.append("accelerator-hours (SFT: 1)")
    body = [
        [
            line["title"] + (" (best on validation)" if line["title"] == facts["best_on_validation"] else ""),
            *(cell(name, line.get(name)) for name in names),
            _share(line, facts["primary"]),
            _hours_beside_sft(spent.get(line["title"], {})),
        ]
        for line in lines
    ]
    note = (
        f"{base.facts['prompts'][split]} {split} prompts, {base.facts['images_per_prompt']} image(s) each, "
        f"{facts['seeds']} training seed(s); 95 % bootstrap intervals over seeds and prompts; ties count half; "
        "budgets are equal in passes through the denoiser, not in seconds"
    )
    for line in lines:
        if line["ended"]:
            note += f"; {line['title']}: play had ended before with {line['ended']} seed(s), whose last scores count"
        if line["diverged"]:
            note += f"; {line['title']}: {line['diverged']} seed(s) diverged, and count with the player before"
    text = [f"# Comparison {run_key}", "", *_grid(head, body), "", note, ""]
    if len(scores) > 1:
        heads = ["model", *map(title_of, scores)]
        for against in ("base", "sft"):
            rates = [(line["title"], line["win_rates"].get(against, {})) for line in lines]
            won = [[title, *(cell("win_rate", found.get(name)) for name in scores)] for title, found in rates if found]
            text += [f"## Win rates over {against}", "", *_grid(heads, won), ""] if won else []
        shares = [[line["title"], *(_share(line, name) for name in scores)] for line in lines if line["gain_shares"]]
        text += ["## Share of SFT's gain", "", *_grid(heads, shares), ""] if shares else []
    return "\n".join([*text, *spending(list(spent.values())), ""])


def _share(line: Mapping[str, Any], score: str) -> str:
    return f"{100 * line['gain_shares'][score]:+.0f} %" if score in line["gain_shares"] else "-"


def _hours_beside_sft(spent: Mapping[str, Any]) -> str:
    if "hours" not in spent:
        return "-"
    return f"{spent['hours']:.3f}" + (f" ({spent['hours_share']:.2f})" if "hours_share" in spent else "")


def plain(text: str) -> str:
    """Return ``text`` such that Markdown shows it as it is: no markup, no link, no new cell."""
    flat = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([`*|]|(?<=\])[(\[:])", r"\\\1", flat)


def _grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [[plain(text) for text in line] for line in (header, *body)]
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return [rows[0], "|" + " --- |" * len(header), *rows[1:]]
