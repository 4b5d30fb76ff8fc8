"""What people look at: the contact sheet, and tables in Markdown; the HTML page is in ``spin/page.py``."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from spin.run import Index
from spin.scorers import PRIMARY

if TYPE_CHECKING:
    from spin.data.dataset import HeldOut, Prompt

TITLES = {"clip_score": "CLIP score", "style_share": "Style share", "win_rate": "Win rate over base"}
MARGIN = 4
MOST_SCALARS = 10


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


def cell(name: str, metric: Mapping[str, float] | None) -> str:
    """Return ``value [low, high]`` with the digits that the metric's scale deserves."""
    if metric is None:
        return "-"
    digits = 2 if name.startswith(PRIMARY) else 3
    return f"{metric['value']:.{digits}f} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"


def table(rows: Sequence[Index], split: str = "test") -> tuple[list[str], list[list[str]]]:
    """Return header and body of the result table; ``rows`` are the score indexes of iterations 0..k."""
    names = list(rows[-1].facts["metrics"][split])
    header = ["model", *(TITLES.get(name, name) for name in names)]
    body = [
        [row_name(row.iteration), *(cell(name, row.facts["metrics"][split].get(name)) for name in names)]
        for row in rows
    ]
    return header, body


def caption(rows: Sequence[Index], split: str = "test") -> str:
    facts = rows[-1].facts
    return (
        f"{facts['prompts'][split]} held-out {split} prompts, {facts['images_per_prompt']} image(s) each, the same "
        "seeds in every row; 95 % bootstrap intervals over prompts; ties count half"
    )


def scalars(index: Index, split: str = "test") -> dict[str, float]:
    """Return the means that KFP lists beside a task, the first ten: its view has no room for more."""
    metrics = index.facts["metrics"][split]
    return {name: metrics[name]["value"] for name in list(metrics)[:MOST_SCALARS]}


def spending(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of what rows of ``spin.comparison.costs`` took, in Markdown."""
    phases = ("generate", "train", "score")
    head = ["model", "generating: time, images", "training: time, pairs", "scoring: time, images", "MFU of the three",
            "accelerator-hours"]  # fmt: skip
    body = [
        [
            line["title"],
            *(f"{line[p]['seconds']:.0f} s, {line[p]['items']}" for p in phases),
            " / ".join(f"{100 * line[p]['mfu']:.0f} %" if line[p].get("mfu") else "-" for p in phases),
            f"{sum(line[p]['accelerator_hours'] for p in ('generate', 'train')):.3f}",
        ]
        for line in costs
    ]
    return _grid(head, body)


def markdown(
    run_key: str,
    rows: Sequence[Index],
    verdicts: Sequence[tuple[str, str]],
    costs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the result table, what it took, and each iteration's verdict (from the first) for KFP's Markdown view."""
    header, body = table(rows)
    lines = [f"# Run {run_key}", "", *_grid(header, body), "", caption(rows), ""]
    if costs:
        lines += [*spending(costs), ""]
    lines += [f"- {row_name(k)}: **{word}**, {plain(reason)}" for k, (word, reason) in enumerate(verdicts, 1)]
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
    lines, split = list(facts["rows"].values()), facts["split"]
    names = list(base.facts["metrics"][split])
    names += [f"{kind}_{against}" for against in ("base", "sft") for kind in ("win_rate_over", f"{PRIMARY}_minus")]
    names = [name for name in names if any(name in line for line in lines)]
    head = ["model", *(TITLES.get(name, name.replace("_", " ")) for name in names), "share of SFT's gain"]
    body = [
        [
            line["title"] + (" (best on validation)" if line["title"] == facts["best_on_validation"] else ""),
            *(cell(name, line.get(name)) for name in names),
            f"{100 * line['gain_share']:+.0f} %" if "gain_share" in line else "-",
        ]
        for line in lines
    ]
    note = (
        f"{base.facts['prompts'][split]} {split} prompts, {base.facts['images_per_prompt']} image(s) each, "
        f"{facts['seeds']} training seed(s); 95 % bootstrap intervals over seeds and prompts; ties count half"
    )
    for line in lines:
        if line["ended"]:
            note += f"; {line['title']}: play had ended before with {line['ended']} seed(s), whose last scores count"
        if line["diverged"]:
            note += f"; {line['title']}: {line['diverged']} seed(s) diverged, and count with the player before"
    return "\n".join(
        [f"# Comparison {run_key}", "", *_grid(head, body), "", note, "", *spending(list(facts["costs"].values())), ""]
    )


def plain(text: str) -> str:
    """Return ``text`` such that Markdown shows it as it is: no markup, no link, no new cell."""
    flat = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([`*|]|(?<=\])[(\[:])", r"\\\1", flat)


def _grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [[plain(text) for text in line] for line in (header, *body)]
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return [rows[0], "|" + " --- |" * len(header), *rows[1:]]
