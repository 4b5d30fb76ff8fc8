"""How ways of doing the same work are timed side by side, and how a result is kept."""

import json
import resource
import statistics
import subprocess
import sys
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
        Per way: ``seconds`` of every round, ``median`` of them, ``wall`` seconds, and ``last``, its last result. On a
        CPU ``seconds`` are those that the processor spent on it, of all threads.
    """
    told: dict[str, dict[str, Any]] = {name: {"seconds": [], "wall": []} for name in ways}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(repeats + 1):
        for name, way in ways.items():
            finish(device)
            began, started = time.perf_counter(), clock()
            told[name]["last"] = way()
            finish(device)
            seconds, wall = clock() - started, time.perf_counter() - began
            if turn:
                told[name]["seconds"].append(round(seconds, 4))
                told[name]["wall"].append(round(wall, 4))
                console.print(f"round {turn} of {repeats}: {name}, {seconds:.2f} s", markup=False)
    for found in told.values():
        found["median"] = statistics.median(found["seconds"])
    return told


def memory(device: torch.device) -> dict[str, float]:
    """Return this process's largest resident memory so far and, on CUDA, the largest that its tensors took, in MiB."""
    found = {"resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}
    if device.type == "cuda":
        found["device_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return found


def point(benchmark: str, work: str, **arguments: Any) -> Any:
    """Return what ``work(**arguments)`` of a benchmark finds in a process of its own, so that its memory is its own."""
    asked = json.dumps({"work": work, **arguments})
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--point", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"expected {work} {arguments} to finish, got {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    console.print(f"{work} {arguments}: {found}", markup=False)
    return found


def answer(asked: str, works: Mapping[str, Any]) -> None:
    """Do what ``point`` asked this process for, one of ``works``, and print what it found."""
    given = json.loads(asked)
    print(json.dumps(works[given.pop("work")](**given)))


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
