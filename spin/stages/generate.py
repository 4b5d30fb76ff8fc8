"""generate-synthetic: the opponent draws the losers for one shard of the prompts that training will see."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin import tracking
from spin.config import RunConfig
from spin.disk import scratch
from spin.errors import SpinError
from spin.progress import Progress, forget
from spin.run import Clock, Index, Run, iteration_stage, producer, whole_iteration, whole_shards
from spin.stages import Place, logger
from spin.store import Ref

if TYPE_CHECKING:
    from spin.data.dataset import Dataset, Prompt

SECONDS_BETWEEN_PARTS = 120.0
"""What a killed shard loses at most, beside the batch that it was drawing."""


def opponent_of(run: Run, iteration: int, for_what: str) -> Ref:
    """Return the opponent of ``iteration``: the base model, or the player that iteration - 1 ended with.

    Order is not trusted to any scheduler: an incomplete predecessor is refused here.
    """
    if iteration == 1:
        return run.need("prepare", for_what).outputs["base"]
    return run.need(iteration_stage(iteration - 1, "train"), for_what).outputs["model"]


def shard_stage(iteration: int, shard: int, shards: int) -> str:
    return iteration_stage(iteration, f"generate-{shard:04d}-of-{shards:04d}")


def prompts_of(data: "Dataset", config: RunConfig, iteration: int) -> "list[Prompt]":
    """Return the prompts whose losers ``iteration`` needs: the pairs that training can consume, and the validation's.

    The paper draws the whole data set; with fewer steps than that, what training never sees is left out.
    """
    from spin.data.dataset import Prompt
    from spin.training import consumed

    rows = sorted(consumed(data.ids, config.train, iteration))
    unseen = [] if config.train.ranks else data.validation
    return [*(Prompt(data.ids[row], data.prompts[row]) for row in rows), *unseen]


def generate(place: Place, iteration: int, shard: int = 0, shards: int = 1) -> Index:
    """Draw and store the losers of one shard, as latents.

    Returns:
        The index: output ``losers``, a folder of safetensors files with ``latents`` float16 [n, C, H, W] and the pair
        ids. Where a scorer makes the pairs, ``losers`` are the worst draws of the training prompts, ``winners`` the
        best.

    Raises:
        SpinError: a predecessor is incomplete, or the run was begun with another number of shards.
    """
    iteration, shard, shards = whole_iteration(iteration, 1), int(shard), whole_shards(shards)
    if not 0 <= shard < shards:
        raise SpinError(f"expected a shard from 0 to {shards - 1}, got {shard}; shards count from 0")
    run = place.open()
    config, clock = run.config(), Clock()
    stage = shard_stage(iteration, shard, shards)
    opponent = opponent_of(run, iteration, stage)
    dataset = run.need("prepare", stage).outputs["dataset"]
    agreed = run.agreed("shards", str(shards))
    if agreed != str(shards):
        # The same images would be drawn and trained on again, under other names.
        raise SpinError(
            f"expected {agreed} shard(s), as run {run.key!r} was begun with, got {shards}; "
            "set shards to that to resume, or choose another run key"
        )
    train = config.train
    inputs = {
        "opponent": opponent.digest,
        "dataset": dataset.digest,
        "shard": shard,
        "shards": shards,
        "config": config.generate.model_dump(mode="json"),
        # What decides which pairs are trained on.
        "order": [train.seed, train.previous_share, *(train.consumes(k) for k in (iteration, iteration + 1))],
    }
    if config.train.ranks:
        judge = {"scorers", "weights", "precision", "clip_model", "template", "styles"}
        score = config.score.model_dump(mode="json", include=judge)
        inputs["ranked"] = {"draws": config.train.ranked_draws, "score": score}
    with tracking.stage(place, stage, iteration) as log:
        if index := run.find(stage, inputs):
            forget(run, stage)
            logger.info("iteration %d: shard %d of %d complete", iteration, shard + 1, shards)
        else:
            index = _generate(run, config, iteration, stage, opponent, dataset, inputs, clock, place.accelerators)
        log.index(index)
    return index


def _generate(
    run: Run,
    config: RunConfig,
    iteration: int,
    stage: str,
    opponent: Ref,
    dataset: Ref,
    inputs: dict[str, Any],
    clock: Clock,
    accelerators: int,
) -> Index:
    import torch

    from spin import models
    from spin.accounting import cost, flops_per_image, peak
    from spin.data.dataset import ROWS_PER_FILE, Dataset, Latents
    from spin.memory import room_for
    from spin.sampling import batches, fast_precision, roundtrip, sample_latents, shard_batches
    from spin.scoring import best_and_worst, primary_scorer
    from spin.seeding import noise_of

    shard, shards, options = inputs["shard"], inputs["shards"], config.generate.of_losers
    pairs = Dataset(run.store.get(dataset))
    prompts = prompts_of(pairs, config, iteration) if config.train.needs_losers else []
    mine = list(shard_batches(len(prompts), options.batch_size, shard, shards))
    if not config.train.needs_losers:
        logger.info("iteration %d: %s needs no losers, none are drawn", iteration, config.train.objective)
    progress = Progress(run, stage, inputs)
    before = progress.seconds
    # A scorer makes pairs of several draws of a prompt; else there is one, the loser.
    ranks = config.train.ranks
    samples: list[tuple[int, ...]] = [(i,) for i in range(config.train.ranked_draws)] if ranks else [()]
    drawn: dict[str, list[torch.Tensor]] = {"losers": [], "winners": []} if ranks else {"losers": []}
    ids: list[str] = []
    pieces, begun = list(progress.folders), progress.facts.get("batches", 0)
    kept = sum(len(rows) for rows in mine[:begun])
    total = sum(len(rows) for rows in mine) * len(samples)
    if pieces:
        logger.info("iteration %d: shard %d of %d: going on after %d images", iteration, shard + 1, shards, kept)
    spent: dict[str, float] = {}
    if mine:
        model = models.load(run.store.get(opponent))
        model.compile_for(config.compile, total)
        precision = fast_precision(model.device)
        flops = flops_per_image(model, pairs.latents_shape, options, decoded=False)
        scorer = primary_scorer(config.score, model.device, run.store.download) if ranks else None
    with scratch() as work, ThreadPoolExecutor(1) as uploads:

        def piece() -> Path:
            """Write what was drawn since the last piece: memory never holds more of a shard."""
            folder = work / f"part-{len(pieces):06d}"
            folder.mkdir()
            for side, parts in drawn.items():
                latents = torch.cat([torch.zeros(0, *pairs.latents_shape).half(), *parts])
                Latents.write(folder / f"{side}.safetensors", ids, latents)
                parts.clear()
            ids.clear()
            pieces.append(folder)
            return folder

        since = time.monotonic()
        upload: Future[None] | None = None
        for number, rows in enumerate(mine[begun:], begun + 1):
            names, asked = [prompts[row].id for row in rows], [prompts[row].prompt for row in rows]
            draws = []
            for sample in samples:
                name = ("generate", options.seed, iteration)
                noise = torch.stack([noise_of(pairs.latents_shape, *name, id, *sample) for id in names])
                with room_for(f"generate.batch_size {options.batch_size}"):
                    latents = sample_latents(model, asked, noise, options, precision)
                    draws.append((roundtrip(model, latents, precision) if options.roundtrip else latents).cpu())
            if scorer:
                winners, losers = best_and_worst(torch.stack(draws), model, scorer, asked, precision)
                drawn["winners"].append(winners.half())
                drawn["losers"].append(losers.half())
            else:
                drawn["losers"].append(draws[0].half())
            ids += names
            kept += len(names)
            logger.info(
                "iteration %d: shard %d of %d: %d of %d images, %.1f images/s",
                iteration,
                shard + 1,
                shards,
                kept * len(samples),
                total,
                kept * len(samples) / max(before + clock.seconds, 1e-3),
            )
            due = time.monotonic() - since > SECONDS_BETWEEN_PARTS or len(ids) >= ROWS_PER_FILE
            if due and number < len(mine):
                # The next batch is drawn beside the upload.
                if upload:
                    upload.result()
                upload = uploads.submit(progress.add, piece(), before + clock.seconds, batches=number)
                since = time.monotonic()
        if upload:
            upload.result()
        if ids or not pieces:
            piece()
        outputs = {}
        for side in drawn:
            outputs[side] = run.store.put_folder(Latents.under(pieces, side).save(work / side, side))
    seconds = round(before + clock.seconds, 2)
    if mine:
        spent = cost(peak(model.device.type, precision), flops, total, seconds, accelerators)
    index = run.finish(
        Index(
            stage=stage,
            iteration=iteration,
            inputs=inputs,
            outputs=outputs,
            facts={
                "batches": len(mine),
                "batches_in_all": len(batches(len(prompts), options.batch_size)),
                "left_out": len(pairs) + len(pairs.validation) - len(prompts) if prompts else 0,
            },
            seconds=seconds,
            items=total,
            cost=spent,
            producer=producer(),
        )
    )
    forget(run, stage)
    return index
