"""``make demo``: the compiled pipeline, a real S3 server and a real MLflow server, on this computer.

    python pipelines/demo.py          run, or resume, and print the result
    python pipelines/demo.py --ui     reopen the MLflow UI on what the demo has written

``build/demo/summary.json`` (documented in the README) holds what the closing table shows.
"""

import sys
from pathlib import Path

# As a script, Python puts this folder first on the path, where ``spin`` would be the pipeline.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from typing import Annotated, Any  # noqa: E402

import typer  # noqa: E402
import yaml  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from pipelines.compiled import check_parameters, compile_pipeline, read_parameters  # noqa: E402
from pipelines.laptop import Laptop, laptop  # noqa: E402
from spin.errors import SpinError  # noqa: E402

RUN_KEY = "demo"
STAGE_LINE = re.compile(r"\d\d:\d\d:\d\d \S")
FAULT = "spin.errors.SpinError: "
# Logs and pipes are as wide as the table needs.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main(
    folder: Annotated[Path, typer.Option(help="Where servers keep their data and the summary is written.")] = (
        ROOT / "build" / "demo"
    ),
    params: Annotated[Path | None, typer.Option(help="YAML file with pipeline parameters.")] = None,
    iterations: Annotated[int, typer.Option(help="Self-play iterations.")] = 2,
    ui: Annotated[bool, typer.Option("--ui", help="Only serve the MLflow UI on the demo's data.")] = False,
    port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000,
) -> None:
    """Self-play on OpenMoji with the embedded base: two iterations in a few minutes on two CPU cores."""
    folder = folder.resolve()
    # A terminated demo stops what it has started, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if ui:
            _serve(folder, port)
        else:
            _demo(folder, {"iterations": iterations} | (read_parameters(params) if params else {}))
    except SpinError as error:
        console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        raise SystemExit(2) from None


def _serve(folder: Path, port: int) -> None:
    if not (folder / "mlflow.db").exists():
        raise SpinError(f"expected the data of a demo, got none in {folder}; run `make demo` first")
    with laptop(folder, mlflow_port=port) as servers:
        console.print(f"MLflow UI: {servers.mlflow_uri}   (Ctrl-C stops it)")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            console.print("stopped")


def _demo(folder: Path, params: dict[str, Any]) -> None:
    from pipelines.spin import CHOICES, spin_diffusion

    started = time.monotonic()
    package = compile_pipeline(spin_diffusion, CHOICES, ROOT / "build" / "spin-diffusion.yaml")
    check_parameters(package, params)
    console.print(f"compiled {package.relative_to(ROOT)}; starting SeaweedFS (S3) and MLflow ...")
    with laptop(folder) as servers:
        console.print(f"S3 {servers.s3_endpoint}   MLflow {servers.mlflow_uri}   ({time.monotonic() - started:.0f} s)")
        os.environ.update(servers.environment())
        os.environ["SPIN_CACHE"] = str(folder / "cache")
        values = {
            "run_key": RUN_KEY, "store_uri": "s3://spin", "store_endpoint": servers.s3_endpoint,
            "tracking_uri": servers.mlflow_uri, "model_name": "spin-emoji", "gpu_count": 0, **params,
        }  # fmt: skip
        running = time.monotonic()
        _run(values, folder)
        summary = _summary(folder, servers, values, time.monotonic() - running)
    summary["seconds"]["total"] = round(time.monotonic() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _show(folder, summary)


def _run(values: dict[str, Any], folder: Path) -> None:
    """Run ``pipelines/spin.py --local`` on the compiled file; show the stages' own lines, keep everything in a log.

    Raises:
        SpinError: a task failed; the stage's own message, where it has one.
    """
    params, log = folder / "params.yaml", folder / "pipeline.log"
    params.write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "pipelines" / "spin.py"), "--local", "--params", str(params)]
    command += ["--output", str(folder / "spin-diffusion.yaml")]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    reason = ""
    with (
        log.open("w") as kept,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                if STAGE_LINE.match(line):
                    console.print(line.rstrip(), markup=False, soft_wrap=True)
                elif line.startswith(FAULT):
                    reason = line.removeprefix(FAULT).strip()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SpinError(reason or f"expected the pipeline to finish, got a failed task; see {log}")
    # KFP's copies of the indexes; the store has the originals.
    shutil.rmtree(folder / "local", ignore_errors=True)


def _summary(folder: Path, servers: Laptop, values: dict[str, Any], pipeline_seconds: float) -> dict[str, Any]:
    """Read the finished run back from the store: nothing here was kept in memory by the demo."""
    from spin.run import iteration_stage
    from spin.stages import Place
    from spin.stages.train import played

    run = Place(values["run_key"], values["store_uri"], servers.s3_endpoint, servers.mlflow_uri).open()
    prepared, registered = run.need("prepare", "the summary"), run.need("register", "the summary")
    phases = {"prepare": {"seconds": prepared.seconds, "items": prepared.items}}
    phases["generate"] = {"seconds": 0.0, "items": 0}
    phases["train"] = {"seconds": 0.0, "items": 0}
    phases["score"] = {"seconds": 0.0, "items": 0}

    def count(phase: str, index: Any) -> None:
        phases[phase]["seconds"] = round(phases[phase]["seconds"] + index.seconds, 2)
        phases[phase]["items"] += index.items

    iterations = []
    digests = {"dataset": prepared.outputs["dataset"].digest, "base": prepared.outputs["base"].digest}
    for k, trained in enumerate([None, *played(run, values["iterations"], "the summary")]):
        scored = run.need(iteration_stage(k, "score"), "the summary")
        count("score", scored)
        row: dict[str, Any] = {"iteration": k, "metrics": scored.facts["metrics"]}
        if trained:
            count("train", trained)
            for shard in range(int(values.get("shards", 1))):
                shards = int(values.get("shards", 1))
                count("generate", run.need(iteration_stage(k, f"generate-{shard:04d}-of-{shards:04d}"), "the summary"))
            row["training"] = {key: value for key, value in trained.facts.items() if key != "version"}
            digests[f"player_{k}"] = trained.outputs["model"].digest
        iterations.append(row)
    sheet = folder / "contact-sheet.png"
    shutil.copyfile(run.store.get(scored.outputs["sheet"]), sheet)
    return {
        "run_key": run.key,
        "iterations": iterations,
        "registry": {key: registered.facts[key] for key in ("model_name", "version", "alias", "chosen_by")},
        "mlflow_run_id": registered.facts["mlflow_run_id"],
        "digests": digests,
        "phases": phases,
        "seconds": {"pipeline": round(pipeline_seconds, 1)},
        "contact_sheet": str(sheet),
        "device": scored.producer["device"],
        "commit": scored.producer["commit"],
    }


def _show(folder: Path, summary: dict[str, Any]) -> None:
    from spin.report import TITLES, cell, row_name

    last = summary["iterations"][-1]["metrics"]["test"]
    table = Table(title="Held-out test prompts (95 % bootstrap intervals)", title_justify="left")
    for title in ("model", *(TITLES.get(name, name) for name in last)):
        table.add_column(title, no_wrap=True)
    for row in summary["iterations"]:
        metrics = row["metrics"]["test"]
        table.add_row(row_name(row["iteration"]), *(cell(name, metrics.get(name)) for name in last))
    console.print()
    console.print(table)
    for row in summary["iterations"][1:]:
        training = row["training"]
        told = f"{row_name(row['iteration'])}: {training['verdict']}, {training['reason']}"
        console.print(told, markup=False, soft_wrap=True)
    phases = Table(title="Work", title_justify="left")
    for title in ("phase", "seconds", "images or pairs"):
        phases.add_column(title)
    for name, phase in summary["phases"].items():
        phases.add_row(name, f"{phase['seconds']:.1f}", str(phase["items"]))
    console.print(phases)
    registry = summary["registry"]
    console.print(f"contact sheet   {summary['contact_sheet']}", soft_wrap=True)
    console.print(f"registered      {registry['model_name']} version {registry['version']}, alias {registry['alias']}")
    console.print(f"summary         {folder / 'summary.json'}", soft_wrap=True)
    console.print(f"total           {summary['seconds']['total']:.0f} s (servers are stopped, data is kept)")
    console.print("look at it      make ui")


if __name__ == "__main__":
    typer.run(main)
