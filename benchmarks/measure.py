"""How ways of doing the same work are timed side by side, and how a result is kept."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spin.accounting import peak
from spin.run import producer
from spin.sampling import fast_precision

RESULTS = Path(__file__).parent / "results"
console = Console(highlight=False)


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(ways: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """Time every way once per round, so that a neighbour's load hits all of them; one round before warms them up.

    Returns:
        Per way: ``seconds`` of every round, ``median`` of them, ``wall`` seconds, on CUDA ``peak_gib``, and ``last``,
        its last result. On a CPU ``seconds`` are those that the processor spent on it, of all threads.
    """
    told: dict[str, dict[str, Any]] = {name: {"seconds": [], "wall": []} for name in ways}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(repeats + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            finish(device)
            began, started = time.perf_counter(), clock()
            told[name]["last"] = way()
            finish(device)
            seconds, wall = clock() - started, time.perf_counter() - began
            if turn:
                told[name]["seconds"].append(round(seconds, 4))
                told[name]["wall"].append(round(wall, 4))
                console.print(f"round {turn} of {repeats}: {name}, {seconds:.2f} s", markup=False)
            if device.type == "cuda":
                told[name]["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    for found in told.values():
        found["median"] = statistics.median(found["seconds"])
    return told


def rates(told: dict[str, dict[str, Any]], items: Mapping[str, int], flops: Mapping[str, float], top: float) -> None:
    """Add to every way its items/s and, of ``flops`` per item and the peak ``top``, its MFU."""
    for name, found in told.items():
        found["items_per_second"] = round(items[name] / found["median"], 3)
        found["mfu"] = round(flops[name] * items[name] / found["median"] / top, 4)


def speed_up(fast: Mapping[str, Any], slow: Mapping[str, Any], fast_items: int, slow_items: int) -> float:
    """Return how many times as many items per second ``fast`` does: the median over rounds."""
    rounds = zip(fast["seconds"], slow["seconds"], strict=True)
    return round(statistics.median((s / slow_items) / (f / fast_items) for f, s in rounds), 3)


def peaks(device: torch.device) -> dict[str, float]:
    """Return the matrix product's FLOP/s in the precision that this device computes in."""
    precision = fast_precision(device)
    return {"precision": precision, "flops_per_second": peak(device.type, precision)}  # type: ignore[dict-item]


def keep(name: str, size: str, result: Mapping[str, Any], device: torch.device) -> Path:
    """Write a result with what it was measured on; return its path."""
    made = {key: value for key, value in producer().items() if value and key not in ("host", "kfp_run_id")}
    made |= {"type": device.type, "threads": str(torch.get_num_threads())}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{size}-{device.type}.json"
    path.write_text(json.dumps({"benchmark": name, "size": size, "made_on": made, **result}, indent=2) + "\n")
    console.print(f"written: {path}", soft_wrap=True)
    return path
