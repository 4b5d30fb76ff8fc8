"""What is estimated from scores per image: means, the best of several images, win rates; each with its interval."""

import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin.run import Index
from spin.scorers import AVERAGED
from spin.stats import bootstrap, per_prompt, wins

AVERAGE = "average"
MOST_CATEGORIES = 20
"""With more of them, a table by category tells nothing; the scores per image still have the column."""


def with_average(names: Sequence[str]) -> list[str]:
    """Return ``names`` and, where all four scorers of the paper's average are among them, ``average``."""
    return [*names, AVERAGE] if set(AVERAGED) <= {*names} else [*names]


def scores_of(scored: Index) -> list[str]:
    """Return the names of the scores that a score stage gave every image, the primary one first."""
    return with_average(scored.inputs["config"]["scorers"])


def average(scores: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the plain mean of the paper's four scores, image by image."""
    mean: list[float] = np.mean([scores[name] for name in AVERAGED], axis=0).tolist()
    return mean


def representatives(table: pa.Table, primary: str, images_per_prompt: int) -> np.ndarray:
    """Return the row of each prompt's best image, int [P]: best on the average, without it on the primary score.

    ``table`` is ordered by prompt. Source: the paper draws five images per prompt and keeps one of them so.
    """
    deciding = table[AVERAGE if AVERAGE in table.column_names else primary].to_numpy()
    best = deciding.reshape(-1, images_per_prompt).argmax(axis=1)
    rows: np.ndarray = best + np.arange(len(best)) * images_per_prompt
    return rows


def measure(
    table: pa.Table,
    earlier: Mapping[str, pa.Table],
    names: Sequence[str],
    images_per_prompt: int,
    resamples: int,
) -> dict[str, dict[str, Any]]:
    """Return the estimates of one split as facts.

    Args:
        table: one row per image, ordered by prompt and sample.
        earlier: the same of earlier players by their title, the base first; rows are paired with ``table``'s.
        names: columns with scores, the primary one first.

    Returns:
        ``metrics``: the mean over prompts of one image's expected score, its median over images, and ``win_rate``
        over the base on the primary score. ``best_of_n``: the same of each prompt's best image, where several are
        drawn. ``win_rates``: on every score over every earlier player, image by image. ``by_category``: means by the
        prompt set's categories, where it has some. Intervals are over prompts; ties count half.
    """

    def estimate(values: np.ndarray, n: int = images_per_prompt) -> dict[str, float]:
        return bootstrap(per_prompt(values, n), resamples).as_dict()

    primary = names[0]
    scores = {name: table[name].to_numpy() for name in names}
    metrics = {name: estimate(values) | {"median": float(np.median(values))} for name, values in scores.items()}
    rates = {
        title: {name: estimate(wins(values, theirs[name].to_numpy())) for name, values in scores.items()}
        for title, theirs in earlier.items()
    }
    if rates:
        metrics["win_rate"] = next(iter(rates.values()))[primary]
    facts: dict[str, dict[str, Any]] = {"metrics": metrics, "win_rates": rates}
    if images_per_prompt > 1:
        best = table.take(representatives(table, primary, images_per_prompt))
        facts["best_of_n"] = {name: estimate(best[name].to_numpy(), 1) for name in names}
        if earlier:
            base = next(iter(earlier.values()))
            base = base.take(representatives(base, primary, images_per_prompt))
            won = wins(best[primary].to_numpy(), base[primary].to_numpy())
            facts["best_of_n"]["win_rate"] = estimate(won, 1)
    categories = [name for name in pc.unique(table["category"]).to_pylist() if name]
    if 1 < len(categories) <= MOST_CATEGORIES:
        facts["by_category"] = {}
        for category, plain in zip(categories, _plain(categories), strict=True):
            mine = pc.equal(table["category"], category).to_numpy()
            facts["by_category"][plain] = {name: estimate(values[mine]) for name, values in scores.items()}
    return facts


def estimates(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all estimates in a score stage's facts as rows: ``split``, ``kind`` (that of the facts), ``of`` (the
    earlier player or the category, where there is one), ``score``, ``value``, ``low``, ``high``, ``median``."""
    rows = []
    for kind in ("metrics", "best_of_n", "win_rates", "by_category"):
        for split, found in facts.get(kind, {}).items():
            for of, scores in found.items() if kind in ("win_rates", "by_category") else [("", found)]:
                place = {"split": split, "kind": kind, "of": of}
                rows += [{**place, "score": name, "median": None, **estimate} for name, estimate in scores.items()]
    for split, distance in facts.get("frechet_distance", {}).items():
        place = {"split": split, "kind": "metrics", "of": "", "score": "frechet_distance", "median": None}
        rows.append({**place, "value": distance, "low": None, "high": None})
    # Facts that were stored are in another order than those just made.
    return sorted(rows, key=lambda row: [row[key] for key in ("split", "kind", "of", "score")])


def followed(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return what a score stage's facts estimate, by the names under which it is followed over iterations."""
    found: dict[str, float] = {}
    for row in estimates(facts):
        kind = "" if row["kind"] == "metrics" else row["kind"]
        found[".".join(filter(None, (row["split"], kind, row["of"], row["score"])))] = row["value"]
        if row["median"] is not None:
            found[f"{row['split']}.median.{row['score']}"] = row["median"]
    return found


def _plain(categories: Sequence[str]) -> list[str]:
    """Return ``categories`` in letters of any script and signs that MLflow takes in the name of a metric.

    Those that are the same then are told apart by a number.
    """
    found: list[str] = []
    for category in categories:
        plain = re.sub(r"[^\w -]+", "_", category)[:60]
        numbered = (plain if n == 1 else f"{plain} {n}" for n in count(1))
        found.append(next(name for name in numbered if name not in found))
    return found
