"""score-metrics: draw held-out prompts with a player, score them, compare with the base, report."""

from dataclasses import dataclass
from typing import Any

from spin import page, tracking
from spin.config import RunConfig
from spin.errors import SpinError
from spin.measures import estimates
from spin.progress import forget
from spin.run import Clock, Index, Run, iteration_stage, whole_iteration, whole_shards
from spin.stages import Place, logger
from spin.store import Ref


@dataclass(frozen=True)
class Scored:
    """What ``score`` hands to its component: the index and the two reports."""

    index: Index
    html: str
    markdown: str


@dataclass(frozen=True)
class Scoring:
    """One player's scoring: who draws which prompts, and beside whom it stands.

    Attributes:
        asked: the prompt set that stands for the test split; None: the data set's own.
        earlier: the scores of all earlier iterations, the base's first.
        inputs: everything that determines the scores.
    """

    run: Run
    config: RunConfig
    iteration: int
    player: Ref
    dataset: Ref
    asked: Ref | None
    earlier: list[Index]
    inputs: dict[str, Any]
    accelerators: int

    @property
    def stage(self) -> str:
        return iteration_stage(self.iteration, "score")

    def shard_stage(self, shard: int, shards: int) -> str:
        return f"{self.stage}-{shard:04d}-of-{shards:04d}"


def _scoring(place: Place, iteration: int) -> Scoring:
    """Return what there is to score.

    Order is not trusted to any scheduler: an incomplete predecessor is refused here.
    """
    iteration = whole_iteration(iteration, 0)
    run = place.open()
    config = run.config()
    stage = iteration_stage(iteration, "score")
    prepared = run.need("prepare", stage)
    dataset = prepared.outputs["dataset"]
    trained = [run.need(iteration_stage(k, "train"), stage) for k in range(1, iteration + 1)]
    player = trained[-1].outputs["model"] if trained else prepared.outputs["base"]
    earlier = [run.need(iteration_stage(k, "score"), stage) for k in range(iteration)]
    inputs = {
        "player": player.digest,
        "dataset": dataset.digest,
        "earlier": [index.outputs["scores"].digest for index in earlier],
        "generate": config.generate.model_dump(mode="json"),
        "config": config.score.model_dump(mode="json"),
    }
    asked = prepared.outputs.get("prompts")
    if asked:
        inputs["prompts"] = asked.digest
    return Scoring(run, config, iteration, player, dataset, asked, earlier, inputs, place.accelerators)


def score_shard(place: Place, iteration: int, shard: int, shards: int) -> int:
    """Draw and score one shard of the held-out prompts of ``iteration`` (0: the base model); return its images.

    They are kept as parts of an unfinished stage, which ``score`` gathers.
    """
    clock, shard, shards = Clock(), int(shard), whole_shards(shards)
    if not 0 <= shard < shards:
        raise SpinError(f"expected a shard from 0 to {shards - 1}, got {shard}; shards count from 0")
    scoring = _scoring(place, iteration)
    if scoring.run.find(scoring.stage, scoring.inputs):
        logger.info("iteration %d: score shard %d of %d complete", scoring.iteration, shard + 1, shards)
        return 0
    from spin.scoring import draw_shard

    with tracking.stage(place, scoring.shard_stage(shard, shards), scoring.iteration):
        return draw_shard(scoring, shard, shards, clock)


def score(place: Place, iteration: int, shards: int = 1) -> Scored:
    """Score the player of ``iteration`` (0: the base model) on the held-out prompts.

    Each prompt has the same seeds in every iteration, so rows are paired. Facts hold, per split, every metric with its
    interval; outputs hold ``scores`` (one row per image), ``images`` and ``sheet``. They are the same for any number of
    shards; several are drawn by ``score_shard`` before, one is drawn here.

    Raises:
        SpinError: a shard is incomplete.
    """
    clock, shards, scoring = Clock(), whole_shards(shards), _scoring(place, iteration)
    run, iteration = scoring.run, scoring.iteration
    with tracking.stage(place, scoring.stage, iteration) as log:
        if index := run.find(scoring.stage, scoring.inputs):
            logger.info("iteration %d: scores complete", iteration)
        else:
            from spin.scoring import score_player

            index = score_player(scoring, shards, clock)
        for shard in range(shards):
            forget(run, scoring.shard_stage(shard, shards))
        pages = page.build(run, iteration)
        log.report(pages.html, {"contact_sheet": run.store.get(index.outputs["sheet"]), **pages.pictures}, iteration)
        log.table(run.store.get(index.outputs["scores"]), "scores")
        log.table(estimates(index.facts), "estimates")
        log.index(index)
    return Scored(index, pages.html, pages.markdown)
