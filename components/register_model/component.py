"""register-model: a registry version per iteration, the alias challenger on the best."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def register_model(
    run_key: str,
    iterations: int,
    model_name: str,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    model: dsl.Output[dsl.Model],
):
    """Register every iteration's player in MLflow; promote by moving the alias champion there.

    Args:
        run_key: Name of the run in the store.
        iterations: Number of finished iterations.
        model_name: Name in the MLflow registry.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        model: The challenger.
    """
    from pathlib import Path

    from spin.stages import Place
    from spin.stages.register import register

    index = register(Place(run_key, store_uri, store_endpoint, tracking_uri, experiment), model_name, iterations)
    model.metadata.update(index.outputs["model"].model_dump())
    model.metadata.update({name: str(index.facts[name]) for name in ("model_name", "version", "alias")})
    Path(model.path).write_text(index.model_dump_json())
