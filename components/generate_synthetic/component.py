"""generate-synthetic: the opponent draws the losers of one shard."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def generate_synthetic(
    run_key: str,
    iteration: int,
    shard: int,
    shards: int,
    accelerators: int,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    losers: dsl.Output[dsl.Dataset],
):
    """Draw this shard's training prompts with the opponent; the images are kept as latents.

    Args:
        run_key: Name of the run in the store.
        iteration: Self-play iteration, from 1.
        shard: This shard, from 0.
        shards: Number of shards.
        accelerators: Accelerators that this task was given; it refuses to start with fewer.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        losers: The shard's index.
    """
    from pathlib import Path

    from spin.stages import Place
    from spin.stages.generate import generate

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment, accelerators)
    index = generate(place, iteration, shard, shards)
    losers.metadata.update(index.outputs["losers"].model_dump() | {"images": index.items, "seconds": index.seconds})
    Path(losers.path).write_text(index.model_dump_json())
