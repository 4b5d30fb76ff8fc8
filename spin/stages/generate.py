"""generate-synthetic: the opponent draws the losers for one shard of the training and validation prompts."""

import tempfile
from pathlib import Path
from typing import Any

from spin import tracking
from spin.config import RunConfig
from spin.errors import SpinError
from spin.run import Clock, Index, Run, iteration_stage, producer, whole_iteration, whole_shards
from spin.stages import Place, logger
from spin.store import Ref


def opponent_of(run: Run, iteration: int, for_what: str) -> Ref:
    """Return the opponent of ``iteration``: the base model, or the player that iteration - 1 ended with.

    Order is not trusted to any scheduler: an incomplete predecessor is refused here.
    """
    if iteration == 1:
        return run.need("prepare", for_what).outputs["base"]
    return run.need(iteration_stage(iteration - 1, "train"), for_what).outputs["model"]


def shard_stage(iteration: int, shard: int, shards: int) -> str:
    return iteration_stage(iteration, f"generate-{shard:04d}-of-{shards:04d}")


def generate(place: Place, iteration: int, shard: int = 0, shards: int = 1) -> Index:
    """Draw and store the losers of one shard, as latents.

    Returns:
        The index: output ``losers``, a safetensors file with ``latents`` float16 [n, C, H, W] and the pair ids. Where
        a scorer makes the pairs, ``losers`` are the worst draws of the training prompts, ``winners`` the best.
    """
    iteration, shard, shards = whole_iteration(iteration, 1), int(shard), whole_shards(shards)
    if not 0 <= shard < shards:
        raise SpinError(f"expected a shard from 0 to {shards - 1}, got {shard}; shards count from 0")
    run = place.open()
    config, clock = run.config(), Clock()
    stage = shard_stage(iteration, shard, shards)
    opponent = opponent_of(run, iteration, stage)
    dataset = run.need("prepare", stage).outputs["dataset"]
    inputs = {
        "opponent": opponent.digest,
        "dataset": dataset.digest,
        "shard": shard,
        "shards": shards,
        "config": config.generate.model_dump(mode="json"),
    }
    if config.train.ranks:
        score = config.score.model_dump(mode="json", include={"clip_model", "template"})
        inputs["ranked"] = {"draws": config.train.ranked_draws, "score": score}
    with tracking.stage(place, stage, iteration) as log:
        if index := run.find(stage, inputs):
            logger.info("iteration %d: shard %d of %d complete", iteration, shard + 1, shards)
        else:
            index = _generate(run, config, iteration, shard, shards, opponent, dataset, inputs, clock)
        log.index(index)
    return index


def _generate(
    run: Run,
    config: RunConfig,
    iteration: int,
    shard: int,
    shards: int,
    opponent: Ref,
    dataset: Ref,
    inputs: dict[str, Any],
    clock: Clock,
) -> Index:
    import torch

    from spin import models
    from spin.data.dataset import Dataset, Latents, Prompt
    from spin.sampling import batches, fast_precision, roundtrip, sample_latents, shard_batches
    from spin.scoring import best_and_worst, primary_scorer
    from spin.seeding import noise_of

    pairs = Dataset(run.store.get(dataset))
    prompts = [Prompt(*row) for row in zip(pairs.ids, pairs.prompts, strict=True)]
    if not config.train.ranks:
        prompts += pairs.validation
    mine = list(shard_batches(len(prompts), config.generate.batch_size, shard, shards))
    if not config.train.needs_losers:
        logger.info("iteration %d: %s needs no losers, none are drawn", iteration, config.train.objective)
        mine = []
    if mine:
        model = models.load(run.store.get(opponent))
        precision = fast_precision(model.device)
        scorer = primary_scorer(config.score, model.device, run.store.download) if config.train.ranks else None
    drawn: dict[str, list[torch.Tensor]] = {"losers": [], "winners": []} if config.train.ranks else {"losers": []}
    samples: list[tuple[int, ...]] = [(i,) for i in range(config.train.ranked_draws)] if config.train.ranks else [()]
    ids: list[str] = []
    total = sum(len(rows) for rows in mine) * len(samples)
    for rows in mine:
        names = [prompts[row].id for row in rows]
        asked = [prompts[row].prompt for row in rows]
        draws = []
        for sample in samples:
            noise = torch.stack(
                [
                    noise_of(pairs.latents_shape, "generate", config.generate.seed, iteration, id, *sample)
                    for id in names
                ]
            )
            latents = sample_latents(model, asked, noise, config.generate.of_losers, precision)
            if config.generate.roundtrip:
                latents = roundtrip(model, latents, precision)
            draws.append(latents.cpu())
        if scorer:
            best, worst = best_and_worst(torch.stack(draws), model, scorer, asked, precision)
            drawn["winners"].append(best)
            drawn["losers"].append(worst)
        else:
            drawn["losers"] += draws
        ids += names
        logger.info(
            "iteration %d: shard %d of %d: %d of %d images, %.1f images/s",
            iteration,
            shard + 1,
            shards,
            len(ids) * len(samples),
            total,
            len(ids) * len(samples) / max(clock.seconds, 1e-3),
        )
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        outputs = {}
        for side, parts in drawn.items():
            path = Path(scratch) / f"{side}.safetensors"
            Latents.write(path, ids, torch.cat(parts) if parts else torch.zeros(0, *pairs.latents_shape))
            outputs[side] = run.store.put_file(path)
    return run.finish(
        Index(
            stage=shard_stage(iteration, shard, shards),
            iteration=iteration,
            inputs=inputs,
            outputs=outputs,
            facts={"batches": len(mine), "batches_in_all": len(batches(len(prompts), config.generate.batch_size))},
            seconds=clock.seconds,
            items=total,
            producer=producer(),
        )
    )
