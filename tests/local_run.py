"""The compiled pipeline, started by its own command on real servers, and what it left in the store."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.laptop import Laptop
from spin.run import Index, Run, iteration_stage
from spin.store import Store
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
ITERATIONS, SHARDS = 2, 2
LONG = 1200.0
"""Seconds after which a run that nothing kills counts as hanging, on a machine with much else to do."""
STAGES = [
    "prepare",
    iteration_stage(0, "score"),
    *(
        iteration_stage(k, stage)
        for k in range(1, ITERATIONS + 1)
        for stage in (*(f"generate-{shard:04d}-of-{SHARDS:04d}" for shard in range(SHARDS)), "train", "score")
    ),
    "register",
]


@dataclass
class Pipeline:
    """A folder, a bucket prefix and a run key of its own; the models, images and options are those of all runs."""

    servers: Laptop
    folder: Path
    options: dict[str, Any]
    key: str
    log: Path = field(init=False)
    seconds: float = 0.0
    """How long it took."""
    python_path: str = ""
    """What its processes import before the project."""

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir(parents=True)
        self.log = self.folder / "log"
        params = {
            "run_key": self.key,
            "iterations": ITERATIONS,
            "shards": SHARDS,
            "gpu_count": 0,
            "store_uri": f"s3://spin/{self.key}",
            "store_endpoint": self.servers.s3_endpoint,
            "tracking_uri": self.servers.mlflow_uri,
            "experiment": f"e2e-{self.key}",
            "model_name": f"e2e-{self.key}",
            **self.options,
        }
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own; both of its streams go to the log."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, ROOT / "pipelines" / "spin.py", "--local"),
                    *("--params", "params.yaml", "--output", "spin.yaml"),
                ],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(os.environ)
                | self.servers.environment()
                | {
                    "SPIN_CACHE": str(self.folder / "cache"),
                    "TMPDIR": str(self.folder / "tmp"),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONPATH": self.python_path,
                },
            )

    def finish(self, process: subprocess.Popen[bytes], seconds: float = LONG) -> tuple[int, str]:
        """Wait for the command's end; return its exit code and all that it said."""
        try:
            process.wait(seconds)
        finally:
            kill(process)
        return process.returncode, self.log.read_text()

    def succeed(self, seconds: float = LONG) -> str:
        code, said = self.finish(self.start(), seconds)
        assert code == 0, said[-5000:]
        assert said.splitlines()[-1] == "the pipeline has finished"
        return said

    def run(self) -> Run:
        return Run(Store(f"s3://spin/{self.key}", self.servers.s3_endpoint), self.key)

    def indexes(self) -> dict[str, Index | None]:
        run = self.run()
        return {stage: run.find(stage) for stage in STAGES}

    def digests(self) -> dict[str, dict[str, str]]:
        """Return what every stage made; all of it is determined by the config."""
        return {
            stage: {name: ref.digest for name, ref in index.outputs.items()} if index else {}
            for stage, index in self.indexes().items()
        }


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, whatever is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tiny_options(folder: Path) -> dict[str, Any]:
    """Write tiny models and images below ``folder``; return the parameters that name them."""
    return {
        "base_model": str(tiny.base(folder / "base")),
        "data_source": str(tiny.images(folder / "images")),
        "overrides": tiny.overrides(tiny.judge(folder / "judge"), steps=[8], checkpoint_every=2),
    }
