"""register-model: a servable version per iteration, the alias challenger on the best, the gate to champion."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def register_model(
    run_key: str,
    iterations: int,
    model_name: str,
    gate: dict,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    model: dsl.Output[dsl.Model],
    decision: dsl.Output[dsl.Markdown],
):
    """Register every iteration's player in MLflow and judge the best one against the champion.

    Args:
        run_key: Name of the run in the store.
        iterations: Number of finished iterations.
        model_name: Name in the MLflow registry.
        gate: Options of the gate's policy.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        model: The challenger.
        decision: What the gate says of it.
    """
    from pathlib import Path

    from spin import report
    from spin.stages import Place
    from spin.stages.register import register

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    index = register(place, model_name, iterations, gate)
    model.metadata.update(index.outputs["model"].model_dump())
    model.metadata.update({name: str(index.facts[name]) for name in ("model_name", "version", "alias")})
    Path(model.path).write_text(index.model_dump_json())
    Path(decision.path).write_text(report.decision(index))
