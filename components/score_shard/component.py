"""score-shard: draw and score one shard of the held-out prompts; score-metrics gathers the shards."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def score_shard(
    run_key: str,
    iteration: int,
    shard: int,
    shards: int,
    accelerators: int,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
) -> int:
    """Draw and score this shard's held-out prompts with the player of an iteration; return the number of images.

    Args:
        run_key: Name of the run in the store.
        iteration: Self-play iteration; 0 is the base model.
        shard: This shard, from 0.
        shards: Number of shards.
        accelerators: Accelerators that this task was given; it refuses to start with fewer.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
    """
    from spin.stages import Place
    from spin.stages.score import score_shard

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment, accelerators)
    return score_shard(place, iteration, shard, shards)
