"""Rivals on equal terms: one data set, one base, equal budgets; the tables that tell them apart.

A comparison is a prepared run whose base has been scored, and one run per arm and training seed that begins from the
same data set, base and base scores. One self-play arm is the budget, in passes through the denoiser (``spin.budget``):
the one named ``spin``, else the first by name, approximate ones before exact ones. A rival without steps of its own
gets as many as cost what that arm does when it plays all its iterations, and an ``exact-spin`` arm those of each
iteration; where the rate decays, it decays over them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spin.budget import passes, passes_in, steps_for
from spin.config import RunConfig, override
from spin.emoji import Split
from spin.errors import SpinError
from spin.measures import scores_of
from spin.run import Index, Run, iteration_stage
from spin.stages.generate import shard_stage
from spin.stages.train import played, verdict_of
from spin.stats import bootstrap_seeds, per_prompt, wins

ARMS: dict[str, dict[str, Any]] = {
    "sft": {"train": {"objective": "sft"}},
    "sft-lora": {"train": {"objective": "sft", "lora_rank": 16}},
    "dpo": {"train": {"objective": "dpo", "pairs": "ranked"}},
    "spin": {"train": {"objective": "spin"}},
}
"""Overrides by the arm's name: of ``train``, and of how the losers are drawn. See ``default_arms``."""
SELF_PLAY = ("spin", "exact-spin")
RESAMPLES = 5000
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,18}")
"""With the key of a new run, the seed and two dashes this is within a run key's 63 signs."""


def default_arms(shared: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the arms of a comparison that names none; where the data has pairs, Diffusion-DPO learns from these."""
    return {**ARMS, "dpo": {"train": {"objective": "dpo"}}} if shared.train.needs_pairs else ARMS


@dataclass(frozen=True)
class Arm:
    """One arm at one training seed."""

    name: str
    seed: int
    run_key: str
    config: RunConfig
    iterations: int

    @property
    def plays(self) -> bool:
        """Whether it is self-play, with several iterations."""
        return self.config.train.objective in SELF_PLAY


def arms_of(
    key: str, shared: RunConfig, arms: Mapping[str, Mapping[str, Any]], iterations: int, seeds: int, pairs: int
) -> list[Arm]:
    """Return every arm at every seed.

    Args:
        key: the shared run's.
        shared: its config, which the arms' overrides are laid over.
        arms: overrides by name.
        iterations: of the arms that are self-play; the others have one.
        pairs: training pairs, for the budget.

    Raises:
        SpinError: no arm, a name that is no plain name, no seed, or options that are refused: unknown ones, and those
            that all arms share.
    """
    if not arms or seeds < 1:
        raise SpinError(f"expected at least one arm and one seed, got {len(arms)} and {seeds}; set arms and seeds")
    if wrong := [name for name in arms if not NAME.fullmatch(name) or name == "base"]:
        raise SpinError(
            "expected arms named by small letters, digits, '-' and '.' (at most 19, not 'base'), got "
            f"{wrong[0]!r}; rename it"
        )
    # Mappings come out of KFP in an order that differs from run to run.
    arms = dict(sorted(arms.items()))
    configs = {name: _laid_over(shared, name, arm) for name, arm in arms.items()}
    given = {name: arm.get("train", {}) for name, arm in arms.items()}
    for name, steps in _steps(configs, pairs, iterations).items():
        if "steps" not in given[name]:
            train: dict[str, Any] = {"steps": steps}
            if configs[name].train.decay_steps and "decay_steps" not in given[name]:
                train["decay_steps"] = max(steps)
            configs[name] = override(configs[name], {"train": train})
    return [
        Arm(
            name,
            seed,
            f"{key}-{name}-{seed}",
            override(
                config, {"train": {"seed": shared.train.seed + seed}, "generate": {"seed": shared.generate.seed + seed}}
            ),
            iterations if config.train.objective in SELF_PLAY else 1,
        )
        for seed in range(seeds)
        for name, config in configs.items()
    ]


def _steps(configs: Mapping[str, RunConfig], pairs: int, iterations: int) -> dict[str, list[int]]:
    """Return the steps per iteration by which arms cost what the arm that is the budget costs."""
    players = {name: config for name, config in configs.items() if config.train.objective in SELF_PLAY}
    if not players:
        return {}
    first = min(players, key=lambda name: (players[name].train.objective != "spin", name != "spin", name))
    found = {}
    for name, config in configs.items():
        if name not in players:
            found[name] = [steps_for(config, pairs, passes(players[first], pairs, iterations))]
        elif config.train.objective != "spin" and name != first:
            budgets = [passes_in(players[first], pairs, k) for k in range(1, iterations + 1)]
            found[name] = [steps_for(config, pairs, budget) for budget in budgets]
    return found


def _laid_over(shared: RunConfig, name: str, arm: Mapping[str, Any]) -> RunConfig:
    """Return an arm's config; what decides on the data and on the images that are scored is every arm's."""
    config = override(shared, dict(arm))
    own = config.generate
    losers = {"opponent_guidance": own.opponent_guidance, "roundtrip": own.roundtrip}
    common = {"train": config.train, "generate": shared.generate.model_copy(update=losers)}
    if config != shared.model_copy(update=common):
        raise SpinError(
            f"expected arm {name!r} to change train, generate.opponent_guidance or generate.roundtrip, got "
            f"{dict(arm)}; give what all arms share in overrides"
        )
    return config


def begin(run: Run, arms: Sequence[Arm]) -> None:
    """Begin the arms' runs with the data set, base and base scores of ``run``.

    Raises:
        SpinError: ``run`` is not prepared and scored, an arm's run began with other options, or an arm learns from
            pairs that the data set does not hold.
    """
    prepared, scored = run.need("prepare", "the comparison"), run.need(iteration_stage(0, "score"), "the comparison")
    for arm in arms:
        if arm.config.train.needs_pairs and not prepared.inputs.get("pairs"):
            raise SpinError(
                f"expected a data set with a loser for each winner for arm {arm.name!r}, got winners alone; prepare it "
                "with overrides {'train': {'objective': 'dpo'}}, and set the other arms' objective, or set the arm's "
                "pairs to ranked"
            )
    for arm in arms:
        own = Run(run.store, arm.run_key)
        own.begin(arm.config)
        for index in (prepared, scored):
            if own.find(index.stage) is None:
                own.finish(index)


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        title: what it is called.
        scores: the score stage of every seed; of its last iteration, where play has ended before this one.
        stages: all stages of this iteration, of the seeds that played it.
        ended: seeds whose play had ended before.
        diverged: seeds whose training in this iteration came to nothing, so that the scores are of the player before.
    """

    title: str
    arm: str
    iteration: int
    scores: list[Index]
    stages: list[Index]
    ended: int = 0
    diverged: int = 0


def rows_of(run: Run, arms: Sequence[Arm], shards: int) -> list[Row]:
    """Return the base's row and one per arm and iteration that some seed has played; losers come in ``shards``.

    Raises:
        SpinError: an arm is incomplete.
    """
    rows = [Row("base", "base", 0, [run.need(iteration_stage(0, "score"), "the comparison")], [])]
    for name in dict.fromkeys(arm.name for arm in arms):
        same = [arm for arm in arms if arm.name == name]
        runs = [Run(run.store, arm.run_key) for arm in same]
        trained = [played(own, arm.iterations, "the comparison") for own, arm in zip(runs, same, strict=True)]
        lasts = [len(stages) for stages in trained]
        for k in range(1, max(lasts) + 1):
            names = [shard_stage(k, shard, shards) for shard in range(shards)]
            names += [iteration_stage(k, "train"), iteration_stage(k, "score")]
            playing = [own for own, last in zip(runs, lasts, strict=True) if k <= last]
            stages = [own.need(stage, "the comparison") for own in playing for stage in names]
            scores = [
                own.need(iteration_stage(min(k, last), "score"), "the comparison")
                for own, last in zip(runs, lasts, strict=True)
            ]
            title = f"{name} {k}" if same[0].iterations > 1 else name
            if same[0].config.train.ranks:
                title = f"{name} on pairs ranked by {same[0].config.score.primary}"
            elif same[0].config.train.needs_pairs:
                title = f"{name} on the data's pairs"
            verdicts = [verdict_of(indexes[k - 1])[0] for indexes in trained if k <= len(indexes)]
            ended, diverged = len(runs) - len(playing), verdicts.count("diverged")
            rows.append(Row(title, name, k, scores, stages, ended, diverged))
    return rows


def images_of(run: Run, row: Row, split: Split, metric: str) -> np.ndarray:
    """Return the scores of every image, float [S, P * n]: seeds, prompts times images per prompt."""
    tables = [pq.read_table(run.store.get(index.outputs["scores"]), filters=[("split", "=", split)]) for index in
              row.scores]  # fmt: skip
    return np.stack([table[metric].to_numpy() for table in tables])


def compare(run: Run, rows: Sequence[Row], split: Split, against: str = "sft") -> list[dict[str, Any]]:
    """Return a dict per row: ``title``, every metric's interval, and how the row stands against base and ``against``.

    Intervals are over training seeds and prompts, crossed. ``win_rates`` hold every score's by whom they are over.
    ``gain_shares`` are every score's gain over the base as a share of the last ``against`` row's gain (the seed paper's
    measure); those where that gain is not surely positive are left out.
    """
    names, n = scores_of(rows[0].scores[0]), rows[0].scores[0].facts["images_per_prompt"]
    primary = names[0]
    seeds = max(len(row.scores) for row in rows)

    read: dict[tuple[str, str], np.ndarray] = {}

    def cells(row: Row, metric: str) -> np.ndarray:
        if (row.title, metric) not in read:
            scores = images_of(run, row, split, metric)
            read[row.title, metric] = scores if len(scores) == seeds else np.repeat(scores, seeds, axis=0)
        return read[row.title, metric]

    def means(values: np.ndarray) -> np.ndarray:
        return np.stack([per_prompt(seed, n) for seed in values])

    rival = next((row for row in reversed(rows) if row.arm == against), None)
    gains = {}
    if rival:
        gains = {name: bootstrap_seeds(means(cells(rival, name) - cells(rows[0], name)), RESAMPLES) for name in names}
    table = []
    for row in rows:
        line: dict[str, Any] = {name: getattr(row, name) for name in ("title", "arm", "iteration", "ended", "diverged")}
        for name in names:
            line[name] = bootstrap_seeds(means(cells(row, name)), RESAMPLES).as_dict()
        line["win_rates"] = {}
        for other, title in ((rows[0], "base"), (rival, against)):
            if other is None or other is row:
                continue
            line["win_rates"][title] = {
                name: bootstrap_seeds(means(wins(cells(row, name), cells(other, name))), RESAMPLES).as_dict()
                for name in names
            }
            line[f"win_rate_over_{title}"] = line["win_rates"][title][primary]
            ahead = cells(row, primary) - cells(other, primary)
            line[f"{primary}_minus_{title}"] = bootstrap_seeds(means(ahead), RESAMPLES).as_dict()
        line["gain_shares"] = {
            name: float((cells(row, name) - cells(rows[0], name)).mean()) / gain.value
            for name, gain in gains.items()
            if gain.low > 0 and row is not rows[0]
        }
        table.append(line)
    return table


def costs(rows: Sequence[Row], against: str = "sft") -> list[dict[str, Any]]:
    """Return per row and phase: seconds, items (images or pairs), accelerator-hours; means over seeds that played.

    ``hours``: accelerator-hours of drawing and training from the arm's first iteration to this one; ``hours_share``: as
    a share of all of ``against``'s, where there is such an arm. Equal budgets are of passes, not of these.
    ``mfu``: FLOPs as a share of what the accelerators could have done in that time, all seeds and shards together.
    """
    table, totals = [], dict[str, float]()
    for row in rows:
        line: dict[str, Any] = {"title": row.title, "arm": row.arm}
        for phase in ("generate", "train", "score"):
            found = [stage for stage in row.stages if stage.stage.split("/")[1].startswith(phase)]
            played = len(row.scores) - row.ended
            seconds = sum(stage.seconds for stage in found) / played
            # What cost nothing to compute held a CPU alone.
            hours = sum(stage.cost.get("accelerator_hours", stage.seconds / 3600) for stage in found)
            counted = [stage for stage in found if stage.cost]
            could = sum(stage.cost["flops"] / stage.cost["mfu"] for stage in counted if stage.cost["mfu"])
            line[phase] = {
                "mfu": round(sum(stage.cost["flops"] for stage in counted) / could, 4) if could else None,
                "seconds": round(seconds, 1),
                "items": round(sum(stage.items for stage in found) / played),
                "accelerator_hours": round(hours / played, 4),
            }
        hours = sum(line[phase]["accelerator_hours"] for phase in ("generate", "train"))
        totals[row.arm] = totals.get(row.arm, 0.0) + hours
        line["hours"] = round(totals[row.arm], 4)
        table.append(line)
    if totals.get(against):
        for line in table:
            line["hours_share"] = round(line["hours"] / totals[against], 4)
    return table


def best(lines: Sequence[Mapping[str, Any]], score: str) -> Mapping[str, Any]:
    """Return the line with the highest ``score``."""
    return max(lines, key=lambda line: line[score]["value"])
