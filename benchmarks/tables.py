"""The tables of NOTES.md, from what the JSON files in results/ say: python -m benchmarks.tables"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

NOTES = Path(__file__).parent / "NOTES.md"
MARKED = re.compile(r"(<!-- results/(\S+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def grid(header: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (header, *body)]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def made(found: dict[str, Any]) -> str:
    """Return what a result was measured on."""
    on = found["made_on"]
    said = f"{on['device']} ({on['type']}), {on['threads']} thread(s), torch {on['torch']}, commit {on['commit'][:12]}"
    sizes = {"batch": "batch", "micro_batch": "micro-batch", "lora_rank": "LoRA rank", "compiled": "compiled"}
    said += "".join(f", {title} {found[name]}" for name, title in sizes.items() if name in found)
    return said + (f", peak of {found['peak']['precision']}" if "peak" in found else "")


def ways(found: dict[str, Any]) -> str:
    """Return the table of the ways that were timed side by side."""
    sampling = found["benchmark"] == "sampling"
    apart = found.get("difference_to_stock_batch", {})
    extra = "mean difference of images (of 255)" if sampling else "losses"

    def last(name: str) -> str:
        if sampling:
            return f"{apart[name]['mean']:.2f}"
        return " ".join(f"{loss:.4f}" for loss in found["losses"][name][:4])

    memory = found.get("memory", {})
    body = [
        [
            name,
            f"{way['items_per_second']:.2f}",
            f"{100 * way['mfu']:.0f} %",
            " / ".join(f"{value:,.0f}" for value in memory.get(name, {}).values()) or "-",
            last(name),
        ]
        for name, way in found["ways"].items()
    ]
    rate = "images/s" if sampling else "pairs/s"
    table = grid(["way", rate, "MFU", "MiB, resident / of the device", extra], body)
    factors = found.get("ours_is_times_as_fast_as", found.get("speed_up_over", {}))
    return table + "\n\n" + grid(["ours is faster than", "times"], [[k, f"{v:.2f}"] for k, v in factors.items()])


def points(found: dict[str, Any]) -> str:
    """Return every point of a benchmark that varies one size at a time."""
    body = [
        [name.replace("_", " "), size, ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in told.items())]
        for name, sizes in found.items()
        if isinstance(sizes, dict) and name != "made_on"
        for size, told in sizes.items()
        if isinstance(told, dict)
    ]
    return grid(["what", "at", "figures"], body)


def overhead(found: dict[str, Any]) -> str:
    """Return what orchestration costs."""
    compiled = [[f"compiled for {k} iteration(s)", told] for k, told in found["compiled_by_iterations"].items()]
    body = [[name, ", ".join(f"{what} {value}" for what, value in told.items())] for name, told in compiled]
    body += [[name.replace("_", " "), value] for name, value in found.get("demo", {}).items() if name != "phases"]
    return grid(["what", "figures"], body)


def section(found: dict[str, Any]) -> str:
    """Return a result's table and what it was measured on."""
    tables = {"scaling": points, "overhead": overhead}
    return f"{made(found)}\n\n{tables.get(found['benchmark'], ways)(found)}\n"


def filled(text: str, results: Path = RESULTS) -> str:
    """Return ``text`` with the tables between its marks as the JSON files say."""

    def told(match: re.Match[str]) -> str:
        found = json.loads((results / f"{match[2]}.json").read_text())
        return f"{match[1]}{section(found)}{match[3]}"

    return MARKED.sub(told, text)


if __name__ == "__main__":
    NOTES.write_text(filled(NOTES.read_text()))
