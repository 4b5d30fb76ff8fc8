"""The experiment of record: does self-play beat supervised fine-tuning on the small world?

    python -m examples.emoji.experiment --search sft   settings compared on the validation prompts, one seed
    python -m examples.emoji.experiment                the table on the test prompts, three training seeds

Both are the comparison pipeline (``pipelines/compare.py``) with a real S3 server; a rerun resumes. ``ARMS`` holds what
the searches chose; the test prompts' table is made by the second command alone. To the pipeline's table it adds what
this world's judge can also tell: whether the image shows its prompt (R@1 among the 472) and the Fréchet distance.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
import yaml
from PIL import Image

from pipelines.laptop import Laptop, laptop
from spin.comparison import arms_of, rows_of
from spin.data.dataset import Dataset
from spin.emoji import Split, concepts
from spin.report import comparison
from spin.run import Run, iteration_stage
from spin.scorers.clip import Clip
from spin.scorers.frechet import Features, frechet_distance
from spin.scoring import decode_png
from spin.stages import Place
from spin.stats import bootstrap_seeds, per_prompt

ROOT = Path(__file__).resolve().parents[2]
SFT = {"objective": "sft", "learning_rate": 1e-4}
SPIN = {"learning_rate": 6e-5, "beta": [300], "steps": [40], "loser_gradient_scale": 1.0}

MILD = {"loser_gradient_scale": 0.3, "steps": [80]}
UNGUIDED = {"opponent_guidance": 1}


def best_of(train: dict[str, Any], steps: int, every: int, patience: int) -> dict[str, Any]:
    """Return an arm of up to ``steps`` steps whose best player by the validation prompts is kept."""
    return {"train": {**train, "steps": [steps], **best_within(every, patience)}}


def best_within(every: int, patience: int = 100) -> dict[str, Any]:
    """Return what keeps the best player by the validation prompts, of as many steps as there are.

    Rivals need it, self-play goes without: their last players would be thrown away as diverged, though they score
    well, because their error on held-out real images is surely higher than the base's.
    """
    return {"validate_every": every, "patience": patience}


ARMS: dict[str, dict[str, Any]] = {
    "sft": {"train": {**SFT, **best_within(150)}},
    "sft-best": best_of({**SFT, "learning_rate": 3e-4}, 800, 40, 5),
    "sft-lora": {"train": {**SFT, "lora_rank": 16, "learning_rate": 1e-3}},
    "dpo": {"train": {"objective": "dpo", "pairs": "ranked", **best_within(50)}},
    "spin": {"train": {**SPIN, **MILD, "loser_gradient_scale": 0.5}},
}
SEARCHES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "sft": (1, {f"lr{lr:g}": best_of({**SFT, "learning_rate": lr}, 800, 40, 4) for lr in (3e-5, 1e-4, 3e-4)}),
    "spin": (
        1,
        {
            f"lr{lr:g}-b{beta}": best_of({**SPIN, "learning_rate": lr, "beta": [beta]}, 120, 20, 3)
            for lr in (2e-5, 6e-5)
            for beta in (100, 300, 1000)
        },
    ),
    "rounds": (2, {f"b{beta}": {"train": {**SPIN, "beta": [300, beta]}} for beta in (1000, 5000)}),
    "losers": (
        2,
        {
            "guided-mild": {"train": {**SPIN, **MILD}},
            "unguided": {"train": SPIN, "generate": UNGUIDED},
            "unguided-mild": {"train": {**SPIN, **MILD}, "generate": UNGUIDED},
            "unguided-roundtrip": {"train": SPIN, "generate": {**UNGUIDED, "roundtrip": True}},
        },
    ),
    "mild": (
        3,
        {
            "scale0.1": {"train": {**SPIN, **MILD, "loser_gradient_scale": 0.1}},
            "scale0.3-roundtrip": {"train": {**SPIN, **MILD}, "generate": {"roundtrip": True}},
            "scale0.5": {"train": {**SPIN, **MILD, "loser_gradient_scale": 0.5}},
        },
    ),
    "after-sft": (
        1,
        {
            f"lr{lr:g}-scale{scale}": {"train": {**SPIN, **MILD, "learning_rate": lr, "loser_gradient_scale": scale}}
            for lr in (2e-5, 6e-5)
            for scale in (0.5, 1.0)
        },
    ),
    "after-sft-mild": (
        1,
        {
            f"b{beta}-s{scale}-lr{lr:g}": {
                "train": {**SPIN, **MILD, "learning_rate": lr, "beta": [beta], "loser_gradient_scale": scale}
            }
            for lr, beta, scale in ((2e-5, 300, 0.1), (2e-5, 3000, 0.5), (5e-6, 300, 0.3), (5e-6, 3000, 1.0))
        },
    ),
    "short": (6, {"steps40": {"train": {**SPIN, "loser_gradient_scale": 0.5}}}),
}
"""Rounds of self-play and arms of every search, in the order in which they were made: each builds on the last."""
AFTER_SFT: dict[str, dict[str, Any]] = {
    "sft": {"train": {**SFT, **best_within(50)}},
    "spin": {"train": {**SPIN, **MILD, "learning_rate": 2e-5, "loser_gradient_scale": 0.1}},
}
"""Going on from the player that SFT ends with: with more of it, or with self-play."""


class Judge:
    """What the judge tells beyond the pipeline's scores."""

    def __init__(self) -> None:
        self.clip = Clip("emoji", torch.device("cpu"))
        self.features = Features("emoji", self.clip.device)
        self.known = [concept.prompt for concept in concepts()]
        self.texts = self.clip.texts(self.known)

    def shows(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Return 1 where an image's own prompt fits it best among all concepts', float [N]."""
        named = (self.clip.images(images) @ self.texts.T).argmax(1).tolist()
        return np.array([float(self.known[k] == prompt) for k, prompt in zip(named, prompts, strict=True)])

    def distance(self, images: list[Image.Image], real: list[Image.Image]) -> float:
        return frechet_distance(self.features.of(images), self.features.of(real))


def content(run: Run, values: dict[str, Any], split: Split) -> list[str]:
    """Return lines with R@1 and Fréchet distance of every row of the comparison."""
    judge = Judge()
    prepared = run.need("prepare", "the experiment")
    held_out = Dataset(run.store.get(prepared.outputs["dataset"])).held_out(split, 500)
    real = [row.image for row in held_out]
    prompts = {row.id: row.prompt for row in held_out}
    ceiling = judge.shows(real, [row.prompt for row in held_out]).mean()
    arms = arms_of(run.key, run.config(), values["arms"], values["iterations"], values["seeds"], prepared.items)
    lines = ["| model | R@1 among 472 | Fréchet distance |", "| --- | --- | --- |"]
    for row in rows_of(run, arms, values["shards"]):
        shown, distances = [], []
        for index in row.scores:
            table = pq.read_table(run.store.get(index.outputs["images"]), filters=[("split", "=", split)])
            images = [decode_png(data) for data in table["image"].to_pylist()]
            found = judge.shows(images, [prompts[id] for id in table["id"].to_pylist()])
            shown.append(per_prompt(found, index.facts["images_per_prompt"]))
            distances.append(judge.distance(images, real))
        share = bootstrap_seeds(np.stack(shown), 5000)
        lines.append(
            f"| {row.title} | {share.value:.3f} [{share.low:.3f}, {share.high:.3f}] | {np.mean(distances):.1f} |"
        )
    return [*lines, f"| real images | {ceiling:.3f} | 0 |"]


def sft_player(servers: Laptop) -> str:
    """Return the address of the player that SFT at its best ended with, of the experiment's first seed."""
    run = Place("experiment-sft-best-0", "s3://spin", servers.s3_endpoint).open()
    return run.need(iteration_stage(1, "train"), "going on after SFT (run the experiment first)").outputs["model"].uri


def main(
    search: Annotated[
        str, typer.Option(help=f"settings compared on the validation prompts: {', '.join(SEARCHES)}")
    ] = "",
    seeds: Annotated[int, typer.Option(help="training seeds of every arm of the experiment")] = 3,
    iterations: Annotated[int, typer.Option(help="rounds of self-play in the experiment")] = 3,
    after_sft: Annotated[bool, typer.Option(help="a second experiment, on from the first one's SFT player")] = False,
) -> None:
    """Run the comparison and print its tables."""
    if search and search not in SEARCHES:
        raise SystemExit(f"expected a search of {', '.join(SEARCHES)}, got {search!r}; choose one")
    after_sft = after_sft or search.startswith("after-sft")
    kind = f"search-{search}" if search else "after-sft" if after_sft else "experiment"
    split: Split = "validation" if search else "test"
    arms, measured = AFTER_SFT if after_sft else ARMS, {"images_per_prompt": 4}
    if search:
        iterations, arms = SEARCHES[search]
        seeds, measured = 1, {"images_per_prompt": 2, "max_prompts": 50}
    folder = ROOT / "build" / kind
    folder.mkdir(parents=True, exist_ok=True)
    # What goes on from a player needs the store that has it.
    with laptop(ROOT / "build" / "experiment" if after_sft else folder, with_mlflow=False) as servers:
        os.environ.update(servers.environment())
        os.environ |= {"SPIN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        values = {
            "run_key": kind,
            "arms": arms,
            "iterations": iterations,
            "seeds": seeds,
            "split": split,
            "overrides": {"score": measured, "generate": {"roundtrip": False}},
            "shards": 1,
            "gpu_count": 0,
            **({"base_model": sft_player(servers)} if after_sft else {}),
            "store_uri": "s3://spin",
            "store_endpoint": servers.s3_endpoint,
            "tracking_uri": "",
        }
        (folder / "params.yaml").write_text(yaml.safe_dump(values))
        log = folder / "pipeline.log"
        command = [sys.executable, str(ROOT / "pipelines" / "compare.py"), "--local"]
        command += ["--params", str(folder / "params.yaml"), "--output", str(folder / "spin-comparison.yaml")]
        with log.open("w") as said:
            done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"expected the comparison to finish, got exit code {done.returncode}; see {log}")
        run = Place(kind, "s3://spin", servers.s3_endpoint).open()
        compared, base = run.need("comparison", kind), run.need(iteration_stage(0, "score"), kind)
        lines = [comparison(kind, base, compared), *content(run, values, split)]
        result = {"rows": compared.facts, "content": lines[1:]}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
