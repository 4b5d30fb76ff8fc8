"""prepare-data: check everything, bring the base model into the store, turn real images into latents."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin import tracking
from spin.config import RunConfig
from spin.disk import scratch
from spin.errors import SpinError
from spin.presets import resolve
from spin.run import Clock, Index, Run, producer, whole_iterations
from spin.stages import Place, logger

if TYPE_CHECKING:
    from spin.models import Model

MOST_REJECTIONS_LISTED = 10_000


def prepare(
    place: Place,
    preset: str,
    base_model: str = "",
    data_source: str = "",
    overrides: dict[str, Any] | None = None,
    iterations: int = 1,
) -> Index:
    """Begin the run and store its base model and data set.

    ``iterations`` is only checked: a run may go on with a higher number later.

    Returns:
        The index: outputs ``dataset`` and ``base``, facts with counts of rows and rejections.

    Raises:
        SpinError: anything about the options, the store, the base model or the images that would stop the run later.
    """
    config = resolve(preset, base_model, data_source, overrides or {})
    if whole_iterations(iterations) > 1 and config.train.objective == "dpo":
        raise SpinError(
            f"expected 1 iteration for train.objective dpo, got {iterations}; its reference stays the base model"
        )
    run = place.open()
    run.began(config)
    clock = Clock()
    inputs: dict[str, Any] = {"config": config.model_dump(mode="json", include={"preset", "base_model", "data"})}
    if config.train.needs_pairs:
        inputs["pairs"] = True
    if config.score.prompts:
        inputs["prompts"] = config.score.prompts
    if index := run.find("prepare", inputs):
        logger.info("prepare: complete, %d pairs", index.items)
    else:
        index = _prepare(run, config, inputs, clock, place.accelerators)
    with tracking.stage(place, index.stage, 0) as log:
        log.params(config)
        log.index(index)
    return index


def _prepare(run: Run, config: RunConfig, inputs: dict[str, Any], clock: Clock, accelerators: int) -> Index:
    from spin import models, prompts
    from spin.accounting import cost, flops_per_encode, peak
    from spin.sampling import fast_precision, solver
    from spin.scorers import Setting, load
    from spin.scorers.frechet import Features
    from spin.training import process_for
    from spin.weights import Weights

    def local(name: str) -> str:
        return str(run.store.download(name)) if name.startswith("s3://") else name

    folder = models.find(local(config.base_model))
    model = models.load(folder)
    shape = model.latents_shape(config.data.resolution)
    process_for(config.train, model.scheduler_config)
    solver(model, config.generate, shape[-1])
    # What does not load would be noticed only when the first player is scored.
    setting = Setting(config.score, model.device, Weights(config.score.weights, run.store.download))
    for name in config.score.scorers:
        load(name, setting)
    if config.score.frechet_model:
        Features(config.score.frechet_model, model.device)
    asked = {"prompts": prompts.stored(run.store, config.score.prompts)} if config.score.prompts else {}
    with scratch() as work:
        data = config.data.model_copy(update={"source": local(config.data.source)})
        counts, rejections = _write(work / "dataset", config.model_copy(update={"data": data}), model)
        accepted = counts["train"]
        if accepted < config.train.batch_size:
            listed = ", ".join(f"{n} {why}" for why, n in rejections.most_common(4)) or "no rejections"
            what = (
                f"at least one {'pair of images' if config.train.needs_pairs else 'image'} with a caption"
                if not sum(counts.values())
                else (f"at least one batch of training pairs (train.batch_size {config.train.batch_size})")
            )
            raise SpinError(
                f"expected {what}, got {accepted} pairs from {config.data.source} ({listed}); add images or lower "
                "train.batch_size"
            )
        if not (counts["validation"] and counts["test"]):
            raise SpinError(
                f"expected held-out prompts for validation and test, got {counts['validation']} and {counts['test']} "
                f"from {config.data.source}; raise data.held_out_share or add images"
            )
        dataset = run.store.put_folder(work / "dataset")
        logger.info("prepare: data set %s stored, %.1f MB", dataset.digest[:12], dataset.size / 1e6)
        base = run.store.put_folder(_model_files(folder, work / "base"))
    run.begin(config)
    seconds, precision = clock.seconds, fast_precision(model.device)
    # The encoder is all that computes.
    flops = flops_per_encode(model, shape) * (2 if config.train.needs_pairs else 1)
    return run.finish(
        Index(
            stage="prepare",
            iteration=0,
            inputs=inputs,
            outputs={"dataset": dataset, "base": base, **asked},
            facts={
                **{f"{split}_rows": counts[split] for split in ("train", "validation", "test")},
                "rejected_rows": sum(rejections.values()),
                "rejections": dict(rejections),
                "latents_shape": list(shape),
            },
            seconds=seconds,
            items=accepted,
            cost=cost(peak(model.device.type, precision), flops, accepted, seconds, accelerators),
            producer=producer(),
        )
    )


def _model_files(folder: Path, target: Path) -> Path:
    """Link the files that a run needs (no model card, no licence texts) into ``target``."""
    from spin import models

    family, index = models.read_index(folder)
    kept = (*family.parts_of(index), "scheduler")
    keep = [
        folder / "model_index.json",
        *(path for part in kept for path in (folder / part).rglob("*") if path.is_file()),
    ]
    for path in keep:
        link = target / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    # A part that is left behind (safety checker, feature extractor) must not be asked for by those who load the folder.
    left = [name for name, value in index.items() if isinstance(value, list) and value[0] and name not in kept]
    if left:
        (target / "model_index.json").unlink()
        index |= {name: [None, None] for name in left}
        if "safety_checker" in left:
            index["requires_safety_checker"] = False
        (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return target


def _write(target: Path, config: RunConfig, model: "Model") -> tuple[Counter[str], Counter[str]]:
    """Write the data set folder; return counts of rows by split and of rejections by reason."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from spin.data.dataset import MOST_VALIDATION, ROWS_PER_FILE, Latents
    from spin.data.sources import Rejection, Row, read
    from spin.memory import room_for
    from spin.sampling import autocast, fast_precision

    target.mkdir()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    index: dict[str, list[str]] = {"id": [], "prompt": [], "split": []}
    held_out: list[dict[str, Any]] = []
    ids: list[str] = []
    latents: dict[str, list[torch.Tensor]] = {"latents": [], "losers": []}
    waiting: list[Row] = []
    asked: set[str] = set()
    repeated = 0
    precision = fast_precision(model.device)

    def encode() -> None:
        for side, images in (("latents", [row.image for row in waiting]), ("losers", [row.loser for row in waiting])):
            if images[0] is None:
                continue
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
            with room_for(f"data.encode_batch {config.data.encode_batch}"), autocast(model.device, precision):
                latents[side].append(model.encode(pixels.float() / 127.5 - 1).half().cpu())
        ids.extend(row.id for row in waiting)
        waiting.clear()
        logger.info("prepare: %d pairs encoded", counts["train"])
        if len(ids) >= ROWS_PER_FILE:
            flush()

    def flush() -> None:
        number = len(list(target.glob("latents-*")))
        for side, parts in latents.items():
            if parts:
                Latents.write(target / f"{side}-{number:05d}.safetensors", ids, torch.cat(parts))
                parts.clear()
        ids.clear()

    with (target / "rejections.jsonl").open("w") as rejected:
        for row in read(config.data, config.train.needs_pairs):
            if isinstance(row, Rejection):
                reasons[row.reason.split(":")[0]] += 1
                if sum(reasons.values()) <= MOST_REJECTIONS_LISTED:
                    rejected.write(json.dumps({"where": row.where, "reason": row.reason}) + "\n")
                continue
            if row.split != "train":
                # Intervals are over prompts: a held-out prompt counts once, however many images it has.
                if row.prompt in asked:
                    repeated += 1
                    continue
                asked.add(row.prompt)
            counts[row.split] += 1
            for name, values in index.items():
                values.append(getattr(row, name))
            if row.split == "train" or (row.split == "validation" and counts[row.split] <= MOST_VALIDATION):
                waiting.append(row)
                if len(waiting) == config.data.encode_batch:
                    encode()
            if row.split != "train" and counts[row.split] <= config.score.max_prompts:
                png = io.BytesIO()
                row.image.save(png, "PNG")
                held_out.append({"id": row.id, "prompt": row.prompt, "split": row.split, "image": png.getvalue()})
    if waiting:
        encode()
    if ids:
        flush()
    if repeated:
        logger.info("prepare: %d further images of held-out prompts left out", repeated)
    text = pa.string()
    pq.write_table(pa.table(index, pa.schema(dict.fromkeys(index, text))), target / "index.parquet")
    pq.write_table(
        pa.Table.from_pylist(held_out, pa.schema({"id": text, "prompt": text, "split": text, "image": pa.binary()})),
        target / "held-out.parquet",
    )
    return counts, reasons
