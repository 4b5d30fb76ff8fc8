"""plan-comparison: a run for every arm and training seed, from one data set and one base."""

from typing import NamedTuple

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def plan_comparison(
    run_key: str,
    arms: dict,
    iterations: int,
    seeds: int,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
) -> NamedTuple("Plan", [("rivals", list[str]), ("players", list[str])]):
    """Begin the arms' runs; return the run keys of those with one iteration and of those that are self-play.

    Args:
        run_key: Name of the prepared and scored run in the store.
        arms: Overrides by the arm's name; empty for the usual ones.
        iterations: Rounds of the arms that are self-play.
        seeds: Training seeds of every arm.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
    """
    from spin.stages import Place
    from spin.stages.compare import plan_arms

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    return plan_arms(place, arms, iterations, seeds)
