"""register-model: a registry version per player, the alias ``challenger`` on the best one, the run closed."""

from dataclasses import dataclass
from typing import Any

from spin import tracking
from spin.config import RunConfig
from spin.errors import SpinError
from spin.run import Clock, Index, Run, iteration_stage, producer, whole_iteration
from spin.scorers import PRIMARY
from spin.stages import Place, logger
from spin.stages.train import played, verdict_of


@dataclass(frozen=True)
class Candidate:
    """A player with its validation score."""

    iteration: int
    training: Index
    scores: Index

    @property
    def validation(self) -> float:
        return float(self.scores.facts["metrics"]["validation"][PRIMARY]["value"])


def register(place: Place, model_name: str, iterations: int) -> Index:
    """Register the players of all iterations and point ``challenger`` at the best on the validation prompts.

    Iterations after the last one worth playing (see ``is_last``) are not asked for, and one that diverged has no
    player: if that is the first, nothing is registered. The test prompts have no part in the choice, so the table on
    them stays honest. Without a tracking server the choice is made and nothing is registered.

    Raises:
        SpinError: an iteration is incomplete, or the registry is out of reach (nothing is lost: run it again).
    """
    iterations = whole_iteration(iterations, 1)
    if not model_name or any(sign in model_name for sign in "/:"):
        raise SpinError(f"expected a registry name without '/' and ':', got {model_name!r}; set model_name")
    run = place.open()
    config, clock = run.config(), Clock()
    prepared = run.need("prepare", "register")
    candidates = [
        Candidate(index.iteration, index, run.need(iteration_stage(index.iteration, "score"), "register"))
        for index in played(run, iterations, "register")
        if verdict_of(index)[0] != "diverged"
    ]
    best = max(candidates, key=lambda candidate: candidate.validation, default=None)
    model = best.training.outputs["model"] if best else prepared.outputs["base"]
    inputs: dict[str, Any] = {
        "model_name": model_name,
        "players": [c.training.outputs["model"].digest for c in candidates],
        "scores": [c.scores.outputs["scores"].digest for c in candidates],
        "registered": bool(place.tracking_uri),
    }
    # Without a server, what was registered before stays so.
    known = run.find("register", inputs) or (
        None if place.tracking_uri else run.find("register", inputs | {"registered": True})
    )
    if known:
        if known.facts["version"]:
            logger.info("register: %s version %s is %s", model_name, known.facts["version"], known.facts["alias"])
        return known
    facts: dict[str, Any] = {"model_name": model_name, "version": "", "alias": "", "versions": {}, "mlflow_run_id": ""}
    if best is None:
        logger.info("register: the first iteration diverged, nothing registered; the best is the base model")
        if place.tracking_uri:
            facts["mlflow_run_id"] = tracking.Registry(place).close_run()
    elif place.tracking_uri:
        facts |= _register(place, run, config, prepared, candidates, best, model_name)
    else:
        logger.info(
            "register: no tracking_uri, nothing registered; the best is iteration %d, %s", best.iteration, model.uri
        )
    return run.finish(
        Index(
            stage="register",
            iteration=best.iteration if best else 0,
            inputs=inputs,
            outputs={"model": model},
            facts=facts | {"chosen_by": f"validation {PRIMARY}"},
            seconds=clock.seconds,
            items=len(candidates),
            producer=producer(),
        )
    )


def _register(
    place: Place,
    run: Run,
    config: RunConfig,
    prepared: Index,
    candidates: list[Candidate],
    best: Candidate,
    name: str,
) -> dict[str, Any]:
    """Register all candidates, point the alias at the best, close the MLflow run; return the facts."""
    registry = tracking.Registry(place)
    versions = {}
    for candidate in candidates:
        made = candidate.training
        tags = {
            "spin.run_key": run.key,
            "spin.iteration": str(candidate.iteration),
            "spin.preset": config.preset,
            "spin.digest": made.outputs["model"].digest,
            "spin.dataset_digest": prepared.outputs["dataset"].digest,
            "spin.opponent_digest": str(made.inputs["opponent"]),
            "spin.commit": made.producer["commit"],
            "spin.objective": config.train.objective,
            "spin.verdict": verdict_of(made)[0],
            "spin.store_endpoint": run.store.endpoint,
        }
        for split, metrics in candidate.scores.facts["metrics"].items():
            tags |= {f"spin.{split}.{metric}": f"{value['value']:.4f}" for metric, value in metrics.items()}
        versions[candidate.iteration] = registry.register(name, made.outputs["model"].uri, tags, made.stage)
    alias = "challenger"
    registry.point(name, alias, versions[best.iteration])
    parent = registry.close_run()
    logger.info("register: %s version %s (iteration %d) is %s", name, versions[best.iteration], best.iteration, alias)
    return {
        "version": versions[best.iteration],
        "alias": alias,
        "versions": {str(k): version for k, version in versions.items()},
        "mlflow_run_id": parent,
    }
