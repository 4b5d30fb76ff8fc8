"""Scoring one player: draw the held-out prompts, score each image, estimate the metrics beside earlier iterations.

Images are drawn, scored and stored in chunks: memory does not grow with their number, and an attempt that was killed
loses the chunk it was at. Shards share the chunks, and whoever gathers them puts these in order again.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image

from spin import models, prompts, report
from spin.accounting import cost, flops_per_image, peak
from spin.config import RunConfig, ScoreConfig
from spin.data.dataset import Dataset, HeldOut, Prompt
from spin.disk import scratch
from spin.emoji import Split
from spin.errors import SpinError
from spin.measures import AVERAGE, average, measure, with_average
from spin.memory import room_for
from spin.progress import Progress, forget
from spin.run import Clock, Index, producer
from spin.sampling import batches, decode, fast_precision, sample_latents
from spin.scorers import Scorer, Setting, load, load_all, scored
from spin.scorers.frechet import Features, frechet_distance
from spin.seeding import noise_of
from spin.stages import logger
from spin.stages.score import Scoring
from spin.weights import Weights

CHUNK = 256
"""Images that are in memory at a time, about: a multiple of the batch size."""
SPLITS: tuple[Split, ...] = ("validation", "test")
Row = Prompt | HeldOut
Job = tuple[Row, int]
"""A prompt and which of its images."""
Chunk = tuple[Split, list[Job]]


def draw_shard(scoring: Scoring, shard: int, shards: int, clock: Clock) -> int:
    """Draw and score the chunks of one shard that are not stored yet; return the shard's images."""
    data = Dataset(scoring.run.store.get(scoring.dataset))
    mine = _chunks(scoring, _rows(scoring, data))[shard::shards]
    with scratch() as work:
        _draw(scoring, data, mine, scoring.shard_stage(shard, shards), clock, work)
    return sum(len(jobs) for _, jobs in mine)


def score_player(scoring: Scoring, shards: int, clock: Clock) -> Index:
    """Gather the shards (a single one is drawn here) and store scores, images and contact sheet.

    Raises:
        SpinError: a shard is incomplete, or shards were scored with different weights.
    """
    run, config, earlier = scoring.run, scoring.config, scoring.earlier
    n = config.score.images_per_prompt
    data = Dataset(run.store.get(scoring.dataset))
    rows = _rows(scoring, data)
    chunks = _chunks(scoring, rows)
    with scratch() as work:
        if shards == 1:
            parts = [_draw(scoring, data, chunks, scoring.shard_stage(0, 1), clock, work)]
        else:
            parts = [
                Progress(run, scoring.shard_stage(shard, shards), scoring.inputs)
                for shard in range(min(shards, len(chunks)))
            ]
        folders = _whole(chunks, parts)
        here = Weights(config.score.weights, run.store.download)
        features = _features(config.score, here)
        weights = _common_weights(parts, here.digests)
        names = with_average(config.score.scorers)
        outputs = {}
        for name in ("scores", "images"):
            _join([folder / f"{name}.parquet" for folder in folders], work / f"{name}.parquet")
            outputs[name] = run.store.put_file(work / f"{name}.parquet")
        sheets = [run.store.get(index.outputs["images"]) for index in earlier] + [work / "images.parquet"]
        shown = report.shown(rows["test"], config.score.sheet_prompts, len(sheets) + 1)
        images = [_first_images(path, [row.id for row in shown]) for path in sheets]
        report.contact_sheet(images, shown).save(work / "sheet.png")
        outputs["sheet"] = run.store.put_file(work / "sheet.png")
        table = pq.read_table(work / "scores.parquet")
        facts: dict[str, Any] = {
            "prompts": {split: len(mine) for split, mine in rows.items()},
            "images_per_prompt": n,
            "weights": weights,
        }
        if features:
            _join([folder / "features.parquet" for folder in folders], work / "features.parquet")
            outputs["features"] = run.store.put_file(work / "features.parquet")
            facts["frechet_distance"] = _distances(features, rows, pq.read_table(work / "features.parquet"))
    rivals = {
        report.row_name(index.iteration): pq.read_table(run.store.get(index.outputs["scores"])) for index in earlier
    }
    for split in SPLITS:
        known = {title: _of(split, theirs) for title, theirs in rivals.items()}
        for kind, found in measure(_of(split, table), known, names, n, config.score.bootstrap).items():
            facts.setdefault(kind, {})[split] = found
    seconds = round(sum(part.seconds for part in parts) + clock.seconds, 2)
    measured = parts[0].facts
    return run.finish(
        Index(
            stage=scoring.stage,
            iteration=scoring.iteration,
            inputs=scoring.inputs,
            outputs=outputs,
            facts=facts,
            seconds=seconds,
            items=len(table),
            cost=cost(measured["peak_flops"], measured["flops"], len(table), seconds, scoring.accelerators),
            producer=producer(),
        )
    )


def _rows(scoring: Scoring, data: Dataset) -> dict[Split, Sequence[Row]]:
    """Return the prompts of each split."""
    rows: dict[Split, Sequence[Row]] = {
        split: data.held_out(split, scoring.config.score.max_prompts) for split in SPLITS
    }
    if not rows["test"] or not rows["validation"]:
        raise SpinError(
            "expected held-out prompts for validation and test, got none; raise data.held_out_share or add images"
        )
    if scoring.asked:
        rows["test"] = prompts.load(scoring.run.store.get(scoring.asked))
    return rows


def _chunks(scoring: Scoring, rows: dict[Split, Sequence[Row]]) -> list[Chunk]:
    """Return all images to draw, in chunks of whole batches.

    So an image's neighbours in its batch, and its last bit, depend neither on the chunks nor on the shards.
    """
    size = scoring.config.generate.batch_size
    chunks: list[Chunk] = []
    for split, mine in rows.items():
        jobs: list[Job] = [(row, sample) for row in mine for sample in range(scoring.config.score.images_per_prompt)]
        chunks += [(split, [jobs[i] for i in part]) for part in batches(len(jobs), max(1, CHUNK // size) * size)]
    return chunks


def _draw(scoring: Scoring, data: Dataset, chunks: list[Chunk], stage: str, clock: Clock, work: Path) -> Progress:
    """Draw and score the ``chunks`` that ``stage`` has not stored yet, in folders of ``work``."""
    config, player = scoring.config, scoring.player
    progress = Progress(scoring.run, stage, scoring.inputs, whole=scoring.stage)
    before = progress.seconds
    if progress.parts:
        logger.info("%s: going on after %d chunks", stage, len(progress.parts))
    if len(progress.parts) == len(chunks):
        return progress
    model = models.load(scoring.run.store.get(player))
    setting = Setting(config.score, model.device, Weights(config.score.weights, scoring.run.store.download))
    scorers = load_all(setting)
    features = _features(config.score, setting.weights)
    flops = flops_per_image(model, data.latents_shape, config.generate, decoded=True)
    whole = sum(len(jobs) for _, jobs in chunks)
    model.compile_for(config.compile, whole)
    weights = dict(setting.weights.digests)
    if progress.parts and progress.facts["weights"] != weights:
        logger.warning("%s: starting anew, the scorers' weights are others than before", stage)
        progress.restart()
        before = 0.0
    _same_weights(scoring.earlier, weights)
    top = peak(model.device.type, fast_precision(model.device))
    drawn = sum(len(jobs) for _, jobs in chunks[: len(progress.parts)])
    for number in range(len(progress.parts), len(chunks)):
        split, jobs = chunks[number]
        folder = work / f"chunk-{number:05d}"
        _write(folder, split, jobs, draw(model, config, jobs, data.latents_shape), scorers, features)
        progress.add(folder, before + clock.seconds, weights=weights, flops=flops, peak_flops=top)
        drawn += len(jobs)
        logger.info("%s: %d of %d images drawn", stage, drawn, whole)
    return progress


def _whole(chunks: Sequence[Chunk], parts: Sequence[Progress]) -> list[Path]:
    """Return the folders of all chunks in order; ``parts`` are the shards, to which the chunks were dealt in turn."""
    for shard, part in enumerate(parts):
        if len(part.folders) != (wanted := len(chunks[shard :: len(parts)])):
            raise SpinError(
                f"expected {part.stage} with {wanted} chunks, got {len(part.folders)}; run that shard, or use the "
                "number of shards that was drawn"
            )
    return [parts[i % len(parts)].folders[i // len(parts)] for i in range(len(chunks))]


def _features(config: ScoreConfig, weights: Weights) -> Features | None:
    """Return the image model of the Fréchet distance, where one is asked for."""
    name = config.frechet_model
    return Features(weights.features(name), models.best_device()) if name else None


def _common_weights(parts: Sequence[Progress], here: Mapping[str, str]) -> dict[str, str]:
    """Return the weights that all shards were scored with, and the real images too: those that were loaded ``here``.

    Raises:
        SpinError: they differ; then nothing of the shards is kept.
    """
    weights: dict[str, str] = parts[0].facts["weights"]
    used = {part.stage: part.facts["weights"] for part in parts} | {"real images": {**weights, **here}}
    for what, found in used.items():
        if found != weights:
            for part in parts:
                forget(part.run, part.stage)
            raise SpinError(
                f"expected {what} scored with the weights of the first shard, got others; run all shards again"
            )
    return weights


def _same_weights(earlier: Sequence[Index], weights: dict[str, str]) -> None:
    """Refuse to put scores beside those that other weights gave.

    Raises:
        SpinError: a scorer's weights are not those of an earlier iteration.
    """
    for index in earlier:
        for name, digest in index.facts.get("weights", {}).items():
            if (got := weights.get(name)) != digest:
                raise SpinError(
                    f"expected the weights of {name} that iteration {index.iteration} was scored with "
                    f"({digest[:12]}), got {got[:12] if got else 'none'}; bring those back, or use another run key"
                )


def _distances(features: Features, rows: dict[Split, Sequence[Row]], drawn: pa.Table) -> dict[str, float]:
    """Return the Fréchet distance to the real images of each split that has some."""
    found: dict[str, float] = {}
    for split, mine in rows.items():
        real = [row.image for row in mine if isinstance(row, HeldOut)]
        if len(real) > 1:
            found[split] = frechet_distance(np.array(_of(split, drawn)["features"].to_pylist()), features.of(real))
    return found


def _write(
    folder: Path,
    split: Split,
    jobs: Sequence[Job],
    images: Sequence[Image.Image],
    scorers: Sequence[Scorer],
    features: Features | None,
) -> None:
    """Write scores and images of one chunk, and the features of each prompt's first image."""
    texts = [row.prompt for row, _ in jobs]
    with room_for("the scorers beside the player", "set score.precision, or ask for fewer in score.scorers,"):
        scores = {scorer.name: scored(scorer, images, texts).tolist() for scorer in scorers}
    if AVERAGE in with_average(list(scores)):
        scores[AVERAGE] = average(scores)
    place: dict[str, list[Any]] = {
        "id": [row.id for row, _ in jobs],
        "prompt": texts,
        "category": [row.category for row, _ in jobs],
        "split": [split] * len(jobs),
        "sample": [sample for _, sample in jobs],
    }
    folder.mkdir()
    pq.write_table(pa.table(place | scores), folder / "scores.parquet")
    kept = {name: place[name] for name in ("id", "split", "sample")}
    pq.write_table(pa.table(kept | {"image": [_png(image) for image in images]}), folder / "images.parquet")
    if features:
        first = [i for i, (_, sample) in enumerate(jobs) if sample == 0]
        values = features.of([images[i] for i in first]).tolist() if first else []
        columns = {
            "id": pa.array([place["id"][i] for i in first], pa.string()),
            "split": pa.array([split] * len(first), pa.string()),
            "features": pa.array(values, pa.list_(pa.float64())),
        }
        pq.write_table(pa.table(columns), folder / "features.parquet")


def _join(parts: Sequence[Path], target: Path) -> None:
    """Write the tables ``parts`` as one, holding one of them in memory at a time."""
    with pq.ParquetWriter(target, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


def _of(split: Split, table: pa.Table) -> pa.Table:
    return table.filter(pa.compute.equal(table["split"], split))


def draw(model: models.Model, config: RunConfig, jobs: Sequence[Job], shape: tuple[int, ...]) -> list[Image.Image]:
    """Draw one image per job; noise depends on the prompt's id and the sample, not on the player."""
    precision, images = fast_precision(model.device), []
    for part in batches(len(jobs), config.generate.batch_size):
        chunk = [jobs[i] for i in part]
        noise = torch.stack([noise_of(shape, "score", config.score.seed, row.id, sample) for row, sample in chunk])
        with room_for(f"generate.batch_size {config.generate.batch_size}"):
            latents = sample_latents(model, [row.prompt for row, _ in chunk], noise, config.generate, precision)
            images += [Image.fromarray(image) for image in decode(model, latents, precision).numpy()]
    return images


def primary_scorer(config: ScoreConfig, device: torch.device, download: Callable[[str], Path]) -> Scorer:
    """Return the scorer that decides who has won; ``download`` fetches what is on the run's S3 server."""
    return load(config.primary, Setting(config, device, Weights(config.weights, download)))


def best_and_worst(
    draws_NBCHW: torch.Tensor, model: models.Model, scorer: Scorer, prompts: Sequence[str], precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best and the worst of N draws for each of B prompts, latents [B, C, H, W].

    Raises:
        SpinError: the scores are not one finite number per image.
    """
    scores = torch.stack(
        [
            scored(scorer, [Image.fromarray(image) for image in decode(model, latents, precision).numpy()], prompts)
            for latents in draws_NBCHW
        ]
    )
    rows = torch.arange(len(prompts))
    return draws_NBCHW[scores.argmax(0), rows], draws_NBCHW[scores.argmin(0), rows]


def validation_score(
    model: models.Model,
    config: RunConfig,
    data: Dataset,
    accelerator: Accelerator,
    download: Callable[[str], Path],
    between: Callable[[], None] = lambda: None,
) -> Callable[[], float]:
    """Return a function that draws the validation prompts with ``model`` as it is then and gives the mean score.

    Several processes share the prompts and get the same answer. The judge is the one that scores the players later.
    ``between`` is called before each batch of images, by all processes equally often, and may end it by raising.
    """
    rows = data.held_out("validation", config.score.max_prompts)
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    # Of a player that is shared out, no process draws alone: those with a prompt less draw one that does not count.
    most = -(-len(rows) // accelerator.num_processes)
    padded = [*mine, *rows[: most - len(mine)]]
    jobs: list[Job] = [(row, sample) for row in padded for sample in range(config.score.images_per_prompt)]
    count = len(mine) * config.score.images_per_prompt
    scorer = primary_scorer(config.score, model.device, download)

    def score() -> float:
        total = torch.zeros(())
        for part in batches(len(jobs), config.generate.batch_size):
            between()
            chunk = [jobs[i] for i in part]
            images = draw(model, config, chunk, data.latents_shape)
            found = scored(scorer, images, [row.prompt for row, _ in chunk])
            total += found[: max(0, count - part.start)].sum()
        whole = accelerator.reduce(total.to(model.device), "sum")
        return float(whole) / (len(rows) * config.score.images_per_prompt)

    return score


def decode_png(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _first_images(path: Path, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Return the first test image of each of the prompts ``ids``."""
    wanted = [("id", "in", ids), ("sample", "=", 0), ("split", "=", "test")]
    return {row["id"]: decode_png(row["image"]) for row in pq.read_table(path, filters=wanted).to_pylist()}
