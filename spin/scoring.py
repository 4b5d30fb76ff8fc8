"""Scoring one player: draw the held-out prompts, score each image, estimate the metrics beside earlier iterations."""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image

from spin import models, report
from spin.config import RunConfig, ScoreConfig
from spin.data.dataset import Dataset, HeldOut
from spin.emoji import Split
from spin.errors import SpinError
from spin.run import Clock, Index, Run, producer
from spin.sampling import batches, decode, fast_precision, sample_latents
from spin.scorers import PRIMARY, Scorer
from spin.scorers.clip import Clip, ClipScore, StyleShare
from spin.seeding import noise_of
from spin.stages import logger
from spin.stats import Estimate, bootstrap, per_prompt, wins
from spin.store import Ref

SPLITS: tuple[Split, ...] = ("validation", "test")


def score_player(
    run: Run,
    config: RunConfig,
    iteration: int,
    stage: str,
    player: Ref,
    dataset: Ref,
    earlier: list[Index],
    inputs: dict[str, Any],
    clock: Clock,
) -> Index:
    """Draw the held-out prompts with ``player``, score every image and store scores, images and contact sheet."""
    data = Dataset(run.store.get(dataset))
    held_out = {split: data.held_out(split, config.score.max_prompts) for split in SPLITS}
    if not held_out["test"] or not held_out["validation"]:
        raise SpinError(
            "expected held-out prompts for validation and test, got none; raise data.held_out_share or add images"
        )
    model = models.load(run.store.get(player))
    clip = Clip(config.score.clip_model, model.device)
    scorers: list[Scorer] = [ClipScore(clip, config.score.template)]
    if config.score.styles:
        scorers.append(StyleShare(clip, config.score.styles))
    table, pictures = [], []
    for split, rows in held_out.items():
        images = draw(model, config, rows, data.latents_shape, iteration)
        n = config.score.images_per_prompt
        prompts = [row.prompt for row in rows for _ in range(n)]
        scores = {scorer.name: scorer.score(images, prompts).tolist() for scorer in scorers}
        for i, image in enumerate(images):
            row, place = rows[i // n], {"split": split, "sample": i % n}
            table.append({"id": row.id, "prompt": row.prompt, **place, **{name: s[i] for name, s in scores.items()}})
            pictures.append({"id": row.id, **place, "image": _png(image)})
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        work = Path(scratch)
        pq.write_table(pa.Table.from_pylist(table), work / "scores.parquet")
        pq.write_table(pa.Table.from_pylist(pictures), work / "images.parquet")
        sheets = [run.store.get(index.outputs["images"]) for index in earlier] + [work / "images.parquet"]
        # Evenly over the split: neighbours in a data set are often alike.
        shown = held_out["test"][:: max(1, len(held_out["test"]) // config.score.sheet_prompts)]
        shown = shown[: config.score.sheet_prompts]
        report.contact_sheet([_first_images(path) for path in sheets], shown).save(work / "sheet.png")
        outputs = {
            name: run.store.put_file(work / file)
            for name, file in (("scores", "scores.parquet"), ("images", "images.parquet"), ("sheet", "sheet.png"))
        }
    base = run.store.get(earlier[0].outputs["scores"]) if earlier else None
    names = [scorer.name for scorer in scorers]
    metrics = {split: _metrics(config, table, base, split, names) for split in SPLITS}
    return run.finish(
        Index(
            stage=stage,
            iteration=iteration,
            inputs=inputs,
            outputs=outputs,
            facts={
                "metrics": metrics,
                "prompts": {split: len(rows) for split, rows in held_out.items()},
                "images_per_prompt": config.score.images_per_prompt,
            },
            seconds=clock.seconds,
            items=len(table),
            producer=producer(),
        )
    )


def draw(
    model: models.Model, config: RunConfig, rows: list[HeldOut], shape: tuple[int, ...], iteration: int
) -> list[Image.Image]:
    """Draw ``images_per_prompt`` images per row; noise depends on the prompt's id and the sample, not on the player."""
    jobs = [(row, sample) for row in rows for sample in range(config.score.images_per_prompt)]
    precision, images = fast_precision(model.device), []
    for part in batches(len(jobs), config.generate.batch_size):
        chunk = [jobs[i] for i in part]
        noise = torch.stack([noise_of(shape, "score", config.score.seed, row.id, sample) for row, sample in chunk])
        latents = sample_latents(model, [row.prompt for row, _ in chunk], noise, config.generate, precision)
        images += [Image.fromarray(image) for image in decode(model, latents, precision).numpy()]
        logger.info("iteration %d: scoring, %d of %d images drawn", iteration, len(images), len(jobs))
    return images


def primary_scorer(config: ScoreConfig, device: torch.device) -> Scorer:
    """Return the scorer that decides who has won."""
    return ClipScore(Clip(config.clip_model, device), config.template)


def best_and_worst(
    draws_NBCHW: torch.Tensor, model: models.Model, scorer: Scorer, prompts: Sequence[str], precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best and the worst of N draws for each of B prompts, latents [B, C, H, W].

    Raises:
        SpinError: a score is no finite number.
    """
    scores = torch.stack(
        [
            scorer.score([Image.fromarray(image) for image in decode(model, latents, precision).numpy()], prompts)
            for latents in draws_NBCHW
        ]
    )
    if not scores.isfinite().all():
        raise SpinError("expected finite scores, got NaN or infinity; check the player's images and the judge")
    rows = torch.arange(len(prompts))
    return draws_NBCHW[scores.argmax(0), rows], draws_NBCHW[scores.argmin(0), rows]


def validation_score(
    model: models.Model, config: RunConfig, data: Dataset, iteration: int, accelerator: Accelerator
) -> Callable[[], float]:
    """Return a function that draws the validation prompts with ``model`` as it is then and gives the mean score.

    Several processes share the prompts and get the same answer. The judge is the one that scores the players later.
    """
    rows = data.held_out("validation", config.score.max_prompts)
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    scorer = primary_scorer(config.score, model.device)

    def score() -> float:
        images = draw(model, config, mine, data.latents_shape, iteration)
        prompts = [row.prompt for row in mine for _ in range(config.score.images_per_prompt)]
        total = scorer.score(images, prompts).sum() if mine else torch.zeros(())
        whole = accelerator.reduce(total.to(model.device), "sum")
        return float(whole) / (len(rows) * config.score.images_per_prompt)

    return score


def decode_png(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _first_images(path: Path) -> dict[str, Image.Image]:
    """Return the first test image of each prompt id."""
    rows = pq.read_table(path, filters=[("sample", "=", 0), ("split", "=", "test")]).to_pylist()
    return {row["id"]: decode_png(row["image"]) for row in rows}


def _metrics(
    config: RunConfig, table: list[dict[str, Any]], base: Path | None, split: Split, names: list[str]
) -> dict[str, dict[str, float]]:
    """Return each metric of a split with its interval; the win rate is over the base, ties count half."""
    n, resamples = config.score.images_per_prompt, config.score.bootstrap
    rows = [row for row in table if row["split"] == split]

    def estimate(values: np.ndarray) -> Estimate:
        if not np.isfinite(values).all():
            raise SpinError("expected finite scores, got NaN or infinity; check the player's images and the judge")
        return bootstrap(per_prompt(values, n), resamples)

    metrics = {name: estimate(np.array([row[name] for row in rows])).as_dict() for name in names}
    if base is not None:
        theirs = pq.read_table(base, filters=[("split", "=", split)])[PRIMARY].to_numpy()
        ours = np.array([row[PRIMARY] for row in rows])
        metrics["win_rate"] = estimate(wins(ours, theirs)).as_dict()
    return metrics
