"""score-metrics: draw held-out prompts with a player, score them, compare with the base, report."""

from dataclasses import dataclass

from spin import page, tracking
from spin.measures import estimates
from spin.run import Clock, Index, iteration_stage, whole_iteration
from spin.stages import Place, logger


@dataclass(frozen=True)
class Scored:
    """What ``score`` hands to its component: the index and the two reports."""

    index: Index
    html: str
    markdown: str


def score(place: Place, iteration: int) -> Scored:
    """Score the player of ``iteration`` (0: the base model) on the held-out prompts.

    Each prompt has the same seeds in every iteration, so rows are paired. Facts hold, per split, every metric with its
    interval; outputs hold ``scores`` (one row per image), ``images`` and ``sheet``.
    """
    iteration = whole_iteration(iteration, 0)
    run = place.open()
    config, clock = run.config(), Clock()
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
    with tracking.stage(place, stage, iteration) as log:
        if index := run.find(stage, inputs):
            logger.info("iteration %d: scores complete", iteration)
        else:
            from spin.scoring import score_player

            index = score_player(
                run, config, iteration, stage, player, dataset, asked, earlier, inputs, clock, place.accelerators
            )
        pages = page.build(run, iteration)
        log.report(pages.html, {"contact_sheet": run.store.get(index.outputs["sheet"]), **pages.pictures}, iteration)
        log.table(run.store.get(index.outputs["scores"]), "scores")
        log.table(estimates(index.facts), "estimates")
        log.index(index)
    return Scored(index, pages.html, pages.markdown)
