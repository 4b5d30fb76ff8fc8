"""register-model: a servable version per player, ``challenger`` on the best one, and the gate to ``champion``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from spin import gate
from spin.config import RunConfig, ScoreConfig
from spin.errors import SpinError
from spin.run import Clock, Index, Run, iteration_stage, producer, whole_iterations
from spin.scorers import names
from spin.stages import Place, logger
from spin.stages.promote import CHALLENGER, CHAMPION, make_champion
from spin.stages.train import played, verdict_of
from spin.store import canonical
from spin.tracking import DIGEST, ITERATION, RUN_KEY, Card, Registry, Version

SCORES = "spin.scores_digest"


@dataclass(frozen=True)
class Candidate:
    """A player with its scores."""

    iteration: int
    training: Index
    scores: Index

    def validation(self, score: str) -> float:
        return float(self.scores.facts["metrics"]["validation"][score]["value"])


def register(place: Place, model_name: str, iterations: int, policy: Mapping[str, Any] | None = None) -> Index:
    """Register the players of all iterations, point ``challenger`` at the best on the validation prompts, judge it.

    Iterations after the last one worth playing (see ``is_last``) are not asked for, and one that diverged has no
    player: if that is the first, nothing is registered. The test prompts have no part in the choice, so that the gate
    (``spin.gate``, options in ``policy``) judges on them. Without a tracking server there is no champion: the choice is
    made and judged against the base, and nothing is registered.

    Raises:
        SpinError: an iteration is incomplete, or the registry is out of reach (nothing is lost: run it again).
    """
    iterations = whole_iterations(iterations)
    if not model_name or any(sign in model_name for sign in "/:'\""):
        raise SpinError(f"expected a registry name without '/', ':' and quotes, got {model_name!r}; set model_name")
    # What needs no run is looked at before the store is waited for.
    gate.policy(dict(policy or {}), ScoreConfig(scorers=tuple(names()), styles=("any",)))
    run = place.open()
    config, clock = run.config(), Clock()
    asked, primary = gate.policy(dict(policy or {}), config.score), config.score.primary
    prepared = run.need("prepare", "register")
    candidates = [
        Candidate(index.iteration, index, run.need(iteration_stage(index.iteration, "score"), "register"))
        for index in played(run, iterations, "register")
        if verdict_of(index)[0] != "diverged"
    ]
    base = run.need(iteration_stage(0, "score"), "register")
    best = max(candidates, key=lambda candidate: candidate.validation(primary), default=None)
    model = best.training.outputs["model"] if best else prepared.outputs["base"]
    inputs: dict[str, Any] = {
        "model_name": model_name,
        "players": [c.training.outputs["model"].digest for c in candidates],
        "scores": [c.scores.outputs["scores"].digest for c in candidates],
        "gate": asked.model_dump(mode="json"),
    }
    registry = Registry(place.tracking_uri) if place.tracking_uri else None
    known = run.find("register", inputs)
    if known and _still_there(registry, known, best):
        if registry:
            # A stage that was run again may have failed in between.
            registry.close_run(place)
        if known.facts["version"]:
            logger.info("register: %s version %s is %s", model_name, known.facts["version"], known.facts["alias"])
        return known
    facts: dict[str, Any] = {"model_name": model_name, "version": "", "alias": "", "versions": {}, "mlflow_run_id": ""}
    if best is None:
        logger.info("register: the first iteration diverged, nothing registered; the best is the base model")
    elif registry is None:
        logger.info(
            "register: no tracking_uri, nothing registered; the best is iteration %d, %s", best.iteration, model.uri
        )
        facts |= _judge(run, asked, best, base, None, None)
    else:
        facts |= _register(registry, place, run, config, prepared, candidates, best, base, model_name, asked)
    if registry:
        facts["mlflow_run_id"] = registry.close_run(place)
    return run.finish(
        Index(
            stage="register",
            iteration=best.iteration if best else 0,
            inputs=inputs,
            outputs={"model": model},
            facts=facts | {"chosen_by": f"validation {primary}"},
            seconds=clock.seconds,
            items=len(candidates),
            producer=producer(),
        ),
        instead_of=known,
    )


def _still_there(registry: Registry | None, known: Index, best: Candidate | None) -> bool:
    """Return whether this server holds what the index says; without a server, what was registered before stays so."""
    if registry is None or best is None:
        return True
    version = registry.version(known.facts["model_name"], known.facts["version"]) if known.facts["version"] else None
    return version is not None and version.tags.get(DIGEST) == best.training.outputs["model"].digest


def _register(
    registry: Registry,
    place: Place,
    run: Run,
    config: RunConfig,
    prepared: Index,
    candidates: list[Candidate],
    best: Candidate,
    base: Index,
    name: str,
    asked: gate.Policy,
) -> dict[str, Any]:
    """Register all candidates, point the alias at the best, let the gate judge it; return the facts."""
    versions = {
        candidate.iteration: registry.register(
            place, name, run.store.get(candidate.training.outputs["model"]), _card(run, config, prepared, candidate)
        )
        for candidate in candidates
    }
    challenger = versions[best.iteration]
    registry.point(name, CHALLENGER, challenger.number)
    logger.info("register: %s version %s (iteration %d) is %s", name, challenger.number, best.iteration, CHALLENGER)
    champion = registry.aliased(name, CHAMPION)
    facts = _judge(run, asked, best, base, champion, challenger)
    decision = facts["gate"]
    if decision["outcome"] != "champion":  # what brought it there stays to be read
        registry.tag(
            name,
            challenger.number,
            {
                "spin.gate": decision["outcome"],
                "spin.gate_reason": decision["reason"],
                "spin.gate_policy": canonical(asked.model_dump(mode="json")).decode(),
            },
        )
    if decision["outcome"] == "passed" and asked.promote == "automatic":
        if "spin.rolled_back" in challenger.tags:
            logger.warning("register: version %s was rolled back before; promote it by hand", challenger.number)
        else:
            make_champion(registry, name, challenger, f"gate: {decision['reason']}")
    return facts | {
        "version": challenger.number,
        "alias": CHALLENGER,
        "versions": {str(k): version.number for k, version in versions.items()},
    }


def _judge(
    run: Run, asked: gate.Policy, best: Candidate, base: Index, champion: Version | None, challenger: Version | None
) -> dict[str, Any]:
    """Return the gate's decision as a fact: against the champion, or the base where there is none."""
    primary = run.config().score.primary
    if champion is None:
        decision = gate.decide(asked, primary, _scores(run, best.scores), _scores(run, base), "the base")
    else:
        against = f"{CHAMPION} version {champion.number}"
        if challenger and champion.number == challenger.number:
            decision = gate.Decision(outcome="champion", against=against, reason=f"it is {against} already")
        elif not (rival := _scores_of(run, champion)):
            decision = _incomparable(against, "has no scores in this store")
        elif otherwise := _otherwise(run, best.scores, champion, rival):
            decision = _incomparable(against, otherwise)
        else:
            decision = gate.decide(asked, primary, _scores(run, best.scores), _scores(run, rival), against)
    logger.info("register: the gate's outcome is %s (%s)", decision.outcome, decision.reason)
    return {"gate": decision.model_dump(mode="json")}


def _scores(run: Run, scored: Index) -> Any:
    return pq.read_table(run.store.get(scored.outputs["scores"]))


def _scores_of(run: Run, version: Version) -> Index | None:
    """Return the score index of another run's player, where this store has it; another may have such a key too."""
    stage = iteration_stage(int(version.tags[ITERATION]), "score")
    found = Run(run.store, version.tags[RUN_KEY]).find(stage)
    return found if found and found.outputs["scores"].digest == version.tags[SCORES] else None


def _incomparable(against: str, why: str) -> gate.Decision:
    return gate.Decision(outcome="incomparable", against=against, reason=f"{against} {why}; promote by hand")


def _otherwise(run: Run, ours: Index, champion: Version, theirs: Index) -> str:
    """Return why a champion's scores cannot stand beside ours; empty: they can."""
    try:
        other = Run(run.store, champion.tags[RUN_KEY]).config()
    except SpinError as error:
        return f"is of a run that this version cannot read ({error})"
    weights = [index.facts.get("weights", {}) for index in (ours, theirs)]
    names = gate.differences(run.config(), other) + gate.other_weights(*weights)
    return f"was scored with another {', '.join(names)}" if names else ""


def _producer(key: str, *stages: Index) -> str:
    """Return the first that the stages know of their producer."""
    return next((stage.producer[key] for stage in stages if stage.producer.get(key)), "")


def _card(run: Run, config: RunConfig, prepared: Index, candidate: Candidate) -> Card:
    """Return what the registry is told of a player."""
    from spin.diffusion import is_flow
    from spin.models import scheduler_config
    from spin.sampling import SOLVERS

    made = candidate.training
    model = made.outputs["model"]
    asked = config.generate.solver
    kind, options = SOLVERS["dpm-solver++" if asked == "auto" else asked]
    scores = {
        f"{split}.{metric}": float(estimate["value"])
        for split, metrics in candidate.scores.facts["metrics"].items()
        for metric, estimate in metrics.items()
    }
    tags = {
        RUN_KEY: run.key,
        ITERATION: str(candidate.iteration),
        DIGEST: model.digest,
        "spin.uri": model.uri,
        "spin.preset": config.preset,
        "spin.dataset_digest": prepared.outputs["dataset"].digest,
        "spin.base_digest": prepared.outputs["base"].digest,
        "spin.opponent_digest": str(made.inputs["opponent"]),
        SCORES: candidate.scores.outputs["scores"].digest,
        "spin.objective": config.train.objective,
        "spin.verdict": verdict_of(made)[0],
        "spin.store_endpoint": run.store.endpoint,
        "spin.commit": made.producer["commit"],
        **{f"spin.{key}": name for key in ("image", "kfp_run_id") if (name := _producer(key, made, prepared))},
        **{f"spin.{name}": f"{value:.4f}" for name, value in scores.items()},
    }
    return Card(
        stage=made.stage,
        iteration=candidate.iteration,
        tags=tags,
        params={"iteration": str(candidate.iteration), "objective": config.train.objective, "preset": config.preset},
        scores=scores,
        generate=config.generate,
        resolution=config.data.resolution,
        solver={} if is_flow(scheduler_config(run.store.get(model))) else {"class": kind.__name__, **options},
    )
