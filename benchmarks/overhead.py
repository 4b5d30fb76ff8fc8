"""What orchestration costs: the local pipeline's wall time outside stage work; the compiled file's size and time.

    python -m benchmarks.overhead                          run the demo anew (minutes) and account for its time
    python -m benchmarks.overhead --folder build/demo      account for a demo that has run, from nothing, in one go

A stage's clock starts in its own process when its function begins; the heavy libraries are imported after that, so
they count as the stage's work. What importing them takes is told apart.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.measure import console, keep
from spin.models import best_device

ROOT = Path(__file__).resolve().parents[1]


def compiled(iterations: int, folder: Path) -> dict[str, float]:
    """Return seconds and bytes of compiling the pipeline with another default of ``iterations``."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from pipelines.spin import CHOICES, spin_diffusion; from pipelines.compiled import compile_pipeline\n"
        "spin_diffusion.component_spec.inputs['iterations'].default = int(sys.argv[2])\n"
        "started = time.perf_counter(); compile_pipeline(spin_diffusion, CHOICES, Path(sys.argv[3]))\n"
        "print(time.perf_counter() - started)\n"
    )
    path = folder / f"{iterations}.yaml"
    done = subprocess.run([sys.executable, "-c", code, ROOT, str(iterations), path], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"expected the pipeline to compile, got:\n{done.stderr[-2000:]}")
    spec = next(yaml.safe_load_all(path.read_text()))
    graphs = [part["dag"] for part in (spec["root"], *spec["components"].values()) if "dag" in part]
    return {
        "seconds": round(float(done.stdout.splitlines()[-1]), 3),
        "bytes": path.stat().st_size,
        "tasks": sum(len(graph["tasks"]) for graph in graphs),
    }


IMPORTS = "from spin import models, sampling, scoring, training"
"""What a stage that computes imports once its clock runs."""


def importing(repeats: int = 3) -> float:
    """Return the seconds that a new process takes for the libraries of one stage: the fastest of several."""
    code = f"import time; from spin import tracking; started = time.perf_counter(); {IMPORTS}"
    command = [sys.executable, "-c", f"{code}; print(time.perf_counter() - started)"]
    return min(float(subprocess.check_output(command, text=True, cwd=ROOT)) for _ in range(repeats))


def accounted(folder: Path, import_seconds: float) -> dict[str, Any]:
    """Return where the time of a demo went, from its summary: one shard, so that no two stages ran at once.

    ``share_outside_stages`` counts imports as the stages' work, ``share_outside_stages_and_imports`` does not.
    """
    summary = json.loads((folder / "summary.json").read_text())
    stages = sum(phase["seconds"] for phase in summary["phases"].values())
    wall = summary["seconds"]["pipeline"]
    # Preparing, scoring the base, and per iteration drawing, training and scoring.
    imports = import_seconds * (2 + 3 * (len(summary["iterations"]) - 1))
    return {
        "pipeline_seconds": wall,
        "total_seconds": summary["seconds"]["total"],
        "stage_seconds": round(stages, 1),
        "import_seconds": round(imports, 1),
        "phases": summary["phases"],
        "share_outside_stages": round(1 - stages / wall, 4),
        "share_outside_stages_and_imports": round(1 - (stages - imports) / wall, 4),
    }


def run_demo(folder: Path) -> None:
    """Run the demo into ``folder``, its shards one after another: side by side they would count twice."""
    params = folder.with_suffix(".yaml")
    params.write_text(yaml.safe_dump({"shards": 1}))
    command = [str(ROOT / "pipelines" / "demo.py"), "--folder", str(folder), "--params", str(params)]
    subprocess.run([sys.executable, *command], check=True)


def main(
    folder: Annotated[Path | None, typer.Option(help="a demo that has run; default: run one (minutes)")] = None,
) -> None:
    """Measure and write results/overhead-emoji-<device>.json."""
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        result: dict[str, Any] = {
            "compiled_by_iterations": {iterations: compiled(iterations, Path(scratch)) for iterations in (1, 10, 100)}
        }
        if folder is None:
            folder = Path(scratch) / "demo"
            run_demo(folder)
        result["demo"] = accounted(folder, importing())
    console.print(f"outside stages: {100 * result['demo']['share_outside_stages']:.1f} %", markup=False)
    keep("overhead", "emoji", result, best_device())


if __name__ == "__main__":
    typer.run(main)
