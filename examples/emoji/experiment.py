"""The experiment of record: does self-play beat supervised fine-tuning on the small world?

    python -m examples.emoji.experiment sweep     settings compared on the validation prompts, one seed
    python -m examples.emoji.experiment           the table on the test prompts, three training seeds

Every arm is a run of the pipeline's own stages on a real S3 server; a rerun resumes. ``ARMS`` holds what the sweep
chose; the test prompts are drawn by the second command alone.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipelines.laptop import laptop
from spin import models
from spin.config import RunConfig
from spin.data.dataset import Dataset
from spin.emoji import concepts
from spin.errors import SpinError
from spin.run import Run, iteration_stage
from spin.scorers import Scorer
from spin.scorers.clip import Clip, ClipScore, StyleShare
from spin.scorers.frechet import Features, frechet_distance
from spin.scoring import decode_png, draw
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.prepare import prepare
from spin.stages.score import score
from spin.stages.train import train
from spin.stats import bootstrap_seeds, wins

FOLDER = Path(__file__).resolve().parents[2] / "build" / "experiment"
IMAGES_PER_PROMPT = 4
app = typer.Typer(add_completion=False, invoke_without_command=True)
console = Console(width=150)


@dataclass(frozen=True)
class Arm:
    """One way to train: overrides of ``train``, how many iterations, and the arm whose player it starts from."""

    train: dict[str, Any] = field(default_factory=dict)
    iterations: int = 1
    start: str = ""
    generate: dict[str, Any] = field(default_factory=dict)


def sft_steps(spin_steps: int, iterations: int, batch: int = 32, pairs: int = 322, sampling_steps: int = 20) -> int:
    """SFT steps that cost what SPIN does, in forward passes of one image (a training step is 3, a reference's 1).

    SPIN's step trains on and refers to both sides of each pair (8 x batch); drawing a loser takes two passes per
    sampling step (guidance); SFT's step is 3 x batch.
    """
    spin = iterations * (spin_steps * 8 * batch + pairs * sampling_steps * 2)
    return round(spin / (3 * batch))


SPIN = {"learning_rate": 2e-5, "beta": [3000], "steps": [60]}
SFT = {"objective": "sft", "learning_rate": 1e-4, "steps": [120]}
ARMS = {
    "sft": Arm(SFT),
    "sft-same-compute": Arm(SFT | {"steps": [sft_steps(60, 3)]}),
    "spin": Arm(SPIN, iterations=3),
    "sft-then-spin": Arm(SPIN, start="sft", iterations=1),
}
SWEEP = {
    **{
        f"sft lr {lr:g} x {steps}": Arm({"objective": "sft", "learning_rate": lr, "steps": [steps]})
        for lr in (3e-5, 1e-4, 3e-4)
        for steps in (60, 240, 720)
    },
    **{
        f"spin lr {lr:g} beta {beta}": Arm({"learning_rate": lr, "beta": [beta], "steps": [60]})
        for lr in (1e-5, 3e-5)
        for beta in (500, 1000, 3000, 10000)
    },
}


class Lab:
    """Runs arms in one store; equal arms are computed once."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint

    def place(self, key: str) -> Place:
        return Place(key, "s3://spin", self.endpoint)

    def trained(self, name: str, arm: Arm, seed: int, arms: dict[str, Arm]) -> Run:
        """Train all iterations of an arm and return its run."""
        key = f"{name}-seed-{seed}".replace(" ", "-")
        place, base = self.place(key), "emoji"
        if arm.start:
            first = self.trained(arm.start, arms[arm.start], seed, arms)
            base = str(first.store.get(first.need(iteration_stage(1, "train"), key).outputs["model"]))
        overrides = {
            "train": {"seed": seed, **arm.train},
            "generate": {"seed": seed, **arm.generate},
            "score": {"images_per_prompt": IMAGES_PER_PROMPT},
        }
        prepare(place, "emoji-cpu", base_model=base, overrides=overrides)
        for iteration in range(1, arm.iterations + 1):
            if arm.train.get("objective") != "sft":
                generate(place, iteration)
            train(place, iteration)
        return place.open()


@contextmanager
def lab() -> Iterator[Lab]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with laptop(FOLDER, with_mlflow=False) as servers:
        os.environ.update(servers.environment())
        os.environ["SPIN_CACHE"] = str(FOLDER / "cache")
        yield Lab(servers.s3_endpoint)


class Recall:
    """1 where the judge finds the image's own prompt among all concepts', else 0."""

    name = "recall_at_1"

    def __init__(self, clip: Clip):
        self.clip = clip
        self.known = [concept.prompt for concept in concepts()]
        self.texts = clip.texts(self.known)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        named = (self.clip.images(images) @ self.texts.T).argmax(1).tolist()
        return torch.tensor([float(self.known[k] == prompt) for k, prompt in zip(named, prompts, strict=True)])


class Judge:
    """The pipeline's own scores per image, the content beside them; and the distance to real drawings."""

    def __init__(self, config: RunConfig):
        clip = Clip("emoji", torch.device("cpu"))
        self.features = Features(str(Path(Clip.find("emoji")).with_name("features")), clip.device)
        self.scorers: list[Scorer] = [
            ClipScore(clip, config.score.template),
            StyleShare(clip, config.score.styles),
            Recall(clip),
        ]

    def scores(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """Return float [N] arrays by name."""
        return {scorer.name: scorer.score(images, prompts).numpy() for scorer in self.scorers}

    def distance(self, images: list[Image.Image], real: list[Image.Image]) -> float:
        return frechet_distance(self.features.of(images), self.features.of(real))


@app.command()
def sweep(only: Annotated[str, typer.Option(help="part of the names to run")] = "") -> None:
    """Compare settings on the validation prompts; nothing here sees a test prompt."""
    path = FOLDER / "sweep.json"
    with lab() as here:
        rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for name, arm in {"base": None, **SWEEP}.items():
            if name in rows or only not in name:
                continue
            started = time.monotonic()
            try:
                run = here.trained(name, arm or Arm({"objective": "sft", "steps": [1]}), 0, SWEEP)
            except SpinError as error:
                rows[name] = {"failed": str(error)}
                console.print(f"{name}: {error}", markup=False)
                continue
            config = run.config()
            judge = Judge(config)
            data = Dataset(run.store.get(run.need("prepare", "sweep").outputs["dataset"]))
            held_out = data.held_out("validation", 500)
            for iteration in range(1, arm.iterations + 1) if arm else [0]:
                index = run.need(iteration_stage(iteration, "train") if iteration else "prepare", "sweep")
                model = models.load(run.store.get(index.outputs["model" if iteration else "base"]))
                images = draw(model, config, held_out, data.latents_shape, iteration)
                prompts = [row.prompt for row in held_out for _ in range(IMAGES_PER_PROMPT)]
                label = f"{name} #{iteration}" if arm and arm.iterations > 1 else name
                rows[label] = {key: float(value.mean()) for key, value in judge.scores(images, prompts).items()}
                rows[label]["frechet"] = judge.distance(images, [row.image for row in held_out])
                facts = {key: value for key, value in index.facts.items() if key.startswith("final_")}
                if reference := facts.get("final_reference_error_winner"):
                    rows[label]["winner_drift_share"] = facts["final_winner_drift"] / reference
                    rows[label]["implicit_accuracy"] = facts["final_implicit_accuracy"]
                rows[label]["seconds"] = time.monotonic() - started
                shown = {key: round(value, 3) for key, value in rows[label].items()}
                console.print(f"{label}: {shown}", markup=False)
            path.write_text(json.dumps(rows, indent=2) + "\n")


def _columns(here: Lab, seeds: int) -> tuple[dict[str, list[dict[str, np.ndarray]]], dict[str, list[float]]]:
    """Run and score every arm; return per model and seed the test scores [prompts], and the distances."""
    judge: Judge | None = None
    scores: dict[str, list[dict[str, np.ndarray]]] = {}
    distances: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, arm in ARMS.items():
            run = here.trained(name, arm, seed, ARMS)
            judge = judge or Judge(run.config())
            data = Dataset(run.store.get(run.need("prepare", name).outputs["dataset"]))
            real = [row.image for row in data.held_out("test", 500)]
            for iteration in range(arm.iterations + 1):
                index = score(here.place(run.key), iteration).index
                if iteration == 0 and (name != "sft"):
                    continue
                label = "base" if iteration == 0 else f"{name} {iteration}" if arm.iterations > 1 else name
                table = pq.read_table(run.store.get(index.outputs["images"]), filters=[("split", "=", "test")])
                prompts = pq.read_table(run.store.get(index.outputs["scores"]), filters=[("split", "=", "test")])
                images = [decode_png(image) for image in table["image"].to_pylist()]
                found = judge.scores(images, prompts["prompt"].to_pylist())
                means = {key: value.reshape(-1, IMAGES_PER_PROMPT) for key, value in found.items()}
                scores.setdefault(label, []).append(means)
                distances.setdefault(label, []).append(judge.distance(images, real))
    return scores, distances


@app.callback()
def main(context: typer.Context, seeds: Annotated[int, typer.Option(help="training seeds per arm")] = 3) -> None:
    """The table on the test prompts: every arm, three training seeds, intervals over prompts and seeds."""
    if context.invoked_subcommand:
        return
    with lab() as here:
        scores, distances = _columns(here, seeds)
    metrics = ("clip_score", "style_share", "recall_at_1")

    def of(label: str, metric: str) -> np.ndarray:
        """[seeds, prompts], means over images"""
        return np.stack([seed[metric].mean(1) for seed in scores[label]])

    def won(label: str, other: str) -> np.ndarray:
        pairs = zip(scores[label], scores[other], strict=True)
        return np.stack([wins(a["clip_score"], b["clip_score"]).mean(1) for a, b in pairs])

    result: dict[str, Any] = {}
    table = Table(title=f"Test prompts, {seeds} seeds, 95 % bootstrap over prompts and seeds", title_justify="left")
    for title in ("model", *metrics, "frechet", "win rate over base", "win rate over sft", "clip_score minus sft"):
        table.add_column(title)
    for label in scores:
        row = {metric: bootstrap_seeds(of(label, metric), 5000).as_dict() for metric in metrics}
        row |= {
            f"win_rate_over_{other}": bootstrap_seeds(won(label, other), 5000).as_dict() for other in ("base", "sft")
        }
        row["clip_score_minus_sft"] = bootstrap_seeds(of(label, "clip_score") - of("sft", "clip_score"), 5000).as_dict()
        by_seed = {metric: [float(seed[metric].mean()) for seed in scores[label]] for metric in metrics}
        result[label] = row | {"frechet": distances[label], "by_seed": by_seed}
        cells = [f"{row[key]['value']:.2f} [{row[key]['low']:.2f}, {row[key]['high']:.2f}]" for key in row]
        table.add_row(label, *cells[:3], f"{np.mean(distances[label]):.1f}", *cells[3:])
    (FOLDER / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(table)


if __name__ == "__main__":
    app()
