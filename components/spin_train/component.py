"""spin-train: one iteration of self-play."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def spin_train(
    run_key: str,
    iteration: int,
    shards: int,
    accelerators: int,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    losers: dsl.Input[list[dsl.Dataset]],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train the player to tell real images from its opponent's. Resumes from its last checkpoint.

    Args:
        run_key: Name of the run in the store.
        iteration: Self-play iteration, from 1.
        shards: Number of shards that the losers were drawn in.
        accelerators: Accelerators that this task was given; it refuses to start with fewer.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        losers: The indexes of all shards; they make this task wait for them.
        model: The player's index, with the verdict on the iteration.
        metrics: The last training step's measures, and the change of the error on held-out real images.
    """
    from pathlib import Path

    from spin.stages import Place
    from spin.stages.train import measures_of, metadata_of, train

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment, accelerators)
    index = train(place, iteration, shards)
    model.metadata.update(metadata_of(index))
    Path(model.path).write_text(index.model_dump_json())
    for name, value in measures_of(index).items():
        metrics.log_metric(name, value)
