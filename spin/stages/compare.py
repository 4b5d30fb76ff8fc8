"""The comparison's two stages: begin a run per arm and seed, and gather their tables when all have been played."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spin import report, tracking
from spin.comparison import Arm, arms_of, begin, best, compare, costs, default_arms, rows_of
from spin.emoji import Split
from spin.errors import SpinError
from spin.run import Clock, Index, Run, producer, whole_iterations, whole_shards
from spin.stages import Place, logger

STAGE = "comparison"


@dataclass(frozen=True)
class Compared:
    """What ``gather`` hands to its component."""

    index: Index
    markdown: str


def _arms(run: Run, arms: Mapping[str, Any], iterations: int, seeds: float) -> list[Arm]:
    iterations = whole_iterations(iterations)
    if seeds % 1:
        raise SpinError(f"expected a whole number of seeds, got {seeds}; change it")
    pairs = run.need("prepare", STAGE).items
    config = run.config()
    return arms_of(run.key, config, arms or default_arms(config), iterations, int(seeds), pairs)


def plan_arms(place: Place, arms: Mapping[str, Any], iterations: int, seeds: int) -> tuple[list[str], list[str]]:
    """Begin the arms' runs; return the run keys of those with one iteration, and of those that are self-play.

    Raises:
        SpinError: see ``spin.comparison``.
    """
    run = place.open()
    planned = _arms(run, arms, iterations, seeds)
    begin(run, planned)
    for arm in planned:
        train = arm.config.train
        steps = [train.of(k)[1] for k in range(1, arm.iterations + 1)]
        logger.info("comparison: %s, %s, steps %s", arm.run_key, train.objective, steps)
    return [arm.run_key for arm in planned if not arm.plays], [arm.run_key for arm in planned if arm.plays]


def gather(
    place: Place, arms: Mapping[str, Any], iterations: int, seeds: int, shards: int, split: str = "test"
) -> Compared:
    """Return the tables over all arms, and store them.

    ``split`` says which prompts the table is on; the best row is always chosen on the validation prompts.

    Raises:
        SpinError: an arm is incomplete.
    """
    run, clock = place.open(), Clock()
    shown: Split = "validation" if split == "validation" else "test"
    if shown != split:
        raise SpinError(f"expected the split validation or test, got {split!r}; change it")
    planned = _arms(run, arms, iterations, seeds)
    rows = rows_of(run, planned, whole_shards(shards))
    inputs = {
        "scores": {row.title: [index.outputs["scores"].digest for index in row.scores] for row in rows},
        "split": split,
        # What an older version made of them has other tables.
        "tables": 2,
    }
    index = run.find(STAGE, inputs)
    if index is None:
        lines = compare(run, rows, shown)
        primary = run.config().score.primary
        chosen = best(compare(run, rows, "validation"), primary)["title"]
        facts = {
            "split": split,
            "primary": primary,
            "best_on_validation": chosen,
            "seeds": seeds,
            "rows": {line["title"]: line for line in lines},
            "costs": {line["title"]: line for line in costs(rows[1:])},
        }
        index = run.finish(
            Index(
                stage=STAGE,
                iteration=0,
                inputs=inputs,
                outputs={},
                facts=facts,
                seconds=clock.seconds,
                items=len(lines),
                producer=producer(),
            )
        )
    markdown = report.comparison(run.key, rows[0].scores[0], index)
    with tracking.stage(place, STAGE, 0) as log:
        log.text(markdown, "report/comparison.md")
        log.index(index)
    if place.tracking_uri:
        for key in (run.key, *(arm.run_key for arm in planned)):
            try:
                tracking.Registry(place.tracking_uri).close_run(replace(place, run_key=key))
            except SpinError as error:
                logger.warning("comparison: %s stays open in MLflow (%s)", key, error)
    logger.info("comparison: best on the validation prompts is %s", index.facts["best_on_validation"])
    return Compared(index, markdown)
