"""Whether a challenger may become champion: a policy, and its judgement of two players' scores on the same images."""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spin.config import NonNegativeFloat, Positive, RunConfig, ScoreConfig, integral, nearest
from spin.emoji import Split
from spin.errors import SpinError
from spin.measures import with_average
from spin.stats import Estimate, bootstrap, wins

RESAMPLES = 2000
COMPARED = (
    "data.resolution",
    *(f"generate.{name}" for name in ("solver", "num_inference_steps", "guidance_scale", "guidance_interval")),
    *(f"score.{name}" for name in ("seed", "precision", "template", "styles")),
)
"""Options that decide on an image, whichever player draws it, or on its scores."""
Place = tuple[str, int]
"""Prompt id and sample: images of the same place were drawn from the same noise."""


class Policy(BaseModel):
    """When a challenger may take the champion's place (the base's, where there is no champion yet).

    "Surely" means that the whole interval of the difference, paired by prompt and seed, lies on that side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    split: Split = "test"
    """Prompts to judge on. The challenger was chosen on those for validation, so their scores flatter it."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Of the intervals."""
    better: dict[str, NonNegativeFloat]
    """Scores that must surely rise by more than this, in the score's unit; left out: the primary score, by anything."""
    win_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of images that must surely be exceeded by those that win by the primary score, ties as half; 0: not
    asked."""
    not_worse: dict[str, NonNegativeFloat] = {}
    """Scores that must surely not fall by this much, in the score's unit."""
    fewest_prompts: Positive = 20
    """With fewer prompts in common an interval is too narrow to rely on, and the gate stays shut."""
    promote: Literal["recommend", "automatic"] = "recommend"
    """What follows when the gate is passed: a recommendation, or the alias ``champion`` moves at once."""


class Finding(BaseModel):
    """One condition of a policy: what was measured (challenger minus rival; a share of wins) and asked."""

    model_config = ConfigDict(frozen=True)
    name: str
    value: float
    low: float
    high: float
    above: float
    """What the interval's lower end had to exceed."""

    @property
    def passed(self) -> bool:
        return self.low > self.above

    def __str__(self) -> str:
        word = "above" if self.passed else "not surely above"
        return f"{self.name} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}], {word} {self.above:.3f}"


class Decision(BaseModel):
    """The gate's answer.

    ``incomparable``: the rival was drawn or judged otherwise, or on other prompts; ``champion``: the challenger holds
    the place already.
    """

    model_config = ConfigDict(frozen=True)
    outcome: Literal["passed", "failed", "incomparable", "champion"]
    against: str
    reason: str
    findings: tuple[Finding, ...] = ()


def policy(options: dict[str, Any], scoring: ScoreConfig) -> Policy:
    """Return the policy with these ``options``, for a run that is scored as ``scoring`` says.

    Raises:
        SpinError: an unknown option, a value outside its range, or a score that the run does not have.
    """
    try:
        asked = Policy.model_validate({"better": {scoring.primary: 0.0}} | integral(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise SpinError(
                f"expected a known option of the gate, got {where!r}; {nearest(where, list(Policy.model_fields))}"
            ) from None
        should = first["msg"].removeprefix("Input should ")
        raise SpinError(f"expected {where or 'the gate'} to {should}, got {first['input']!r} (in gate)") from None
    known = with_average(scoring.scorers)
    for name in (*asked.better, *asked.not_worse):
        if name not in known:
            raise SpinError(f"expected a score that the run has, got {name!r} (in gate); {nearest(name, known)}")
    return asked


def differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """Return the options by which an image or its scores differ for two runs, whichever player draws it.

    Other options may differ: rows are paired by prompt and seed, and a row's id stands for its content.
    """
    return [name for name in COMPARED if attrgetter(name)(ours) != attrgetter(name)(theirs)]


def other_weights(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return the scorers, of those that both runs have, whose weights are others, from their digests."""
    return [f"judge ({name})" for name in ours if name in theirs and ours[name] != theirs[name]]


def decide(policy: Policy, primary: str, ours: pa.Table, theirs: pa.Table, against: str) -> Decision:
    """Judge a challenger's scores against a rival's, tables with a row per image; ``primary`` decides who wins."""
    needed = {*policy.better, *policy.not_worse, *([primary] if policy.win_rate else [])}
    if missing := sorted(needed - {*theirs.column_names}):
        reason = f"{against} has no scores by {', '.join(missing)}, which the gate asks for"
        return Decision(outcome="incomparable", against=against, reason=reason)
    mine, rival = (_by_place(table, policy.split) for table in (ours, theirs))
    shared = sorted(mine.keys() & rival.keys())
    images: dict[str, list[Place]] = {}
    for place in shared:
        images.setdefault(place[0], []).append(place)
    if len(images) < policy.fewest_prompts:
        found = f"{len(images)} {policy.split} prompts in common with {against}, the gate asks for"
        reason = f"{found} {policy.fewest_prompts} or more"
        return Decision(outcome="incomparable", against=against, reason=reason)

    def estimate(name: str, value: Callable[[float, float], float]) -> Estimate:
        means = [np.mean([value(mine[p][name], rival[p][name]) for p in places]) for places in images.values()]
        return bootstrap(np.array(means), RESAMPLES, confidence=policy.confidence)

    def gain(name: str) -> Estimate:
        return estimate(name, lambda one, other: one - other)

    asked = [(name, gain(name), least) for name, least in policy.better.items()]
    asked += [(name, gain(name), -most) for name, most in policy.not_worse.items()]
    if policy.win_rate:
        share = estimate(primary, lambda one, other: wins(np.array(one), np.array(other)).item())
        asked.append(("win_rate", share, policy.win_rate))
    findings = tuple(Finding(name=name, above=above, **found.as_dict()) for name, found, above in asked)
    passed = all(finding.passed for finding in findings)
    return Decision(
        outcome="passed" if passed else "failed",
        against=against,
        reason=f"against {against}: {'; '.join(str(finding) for finding in findings) or 'nothing was asked'}",
        findings=findings,
    )


def _by_place(table: pa.Table, split: str) -> dict[Place, dict[str, Any]]:
    return {(row["id"], row["sample"]): row for row in table.to_pylist() if row["split"] == split}
