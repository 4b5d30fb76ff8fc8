"""score-metrics: draw held-out prompts with a player, score them, compare with the base, report."""

from dataclasses import dataclass

from spin import report, tracking
from spin.comparison import Row, costs
from spin.run import Clock, Index, Run, iteration_stage, whole_iteration
from spin.stages import Place, logger
from spin.stages.generate import shard_stage
from spin.stages.train import verdict_of


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
    if index := run.find(stage, inputs):
        logger.info("iteration %d: scores complete", iteration)
    else:
        from spin.scoring import score_player

        index = score_player(
            run, config, iteration, stage, player, dataset, asked, earlier, inputs, clock, place.accelerators
        )
    rows, verdicts = [*earlier, index], [verdict_of(stage) for stage in trained]
    sheet = run.store.get(index.outputs["sheet"])
    spent = costs([Row("base", "", 0, rows[:1], []), *_played(run, trained, rows)], place.accelerators)
    markdown = report.markdown(run.key, rows, verdicts, spent)
    result = Scored(index, report.html(run.key, rows, verdicts, sheet), markdown)
    with tracking.stage(place, stage, iteration) as log:
        log.report(result.html, sheet, iteration)
        log.index(index)
    return result


def _played(run: Run, trained: list[Index], scored: list[Index]) -> list[Row]:
    """Return a row per iteration with all its stages; the losers came in as many shards as training read."""
    rows = []
    for k, index in enumerate(trained, 1):
        shards = len(index.inputs["losers"])
        drawn = [run.need(shard_stage(k, shard, shards), index.stage) for shard in range(shards)]
        rows.append(Row(report.row_name(k), "", k, [scored[k]], [*drawn, index, scored[k]]))
    return rows
