"""spin-train on several nodes: one iteration of self-play as a TrainJob of Kubeflow Trainer."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(
    base_image=RUNTIME_IMAGE,
    install_kfp_package=False,
    # What this task is given goes to the nodes; its own pod has the keys, and takes no accelerator.
    task_config_passthroughs=[
        dsl.TaskConfigField.RESOURCES,
        dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR,
        dsl.TaskConfigField.KUBERNETES_TOLERATIONS,
        dsl.TaskConfigPassthrough(field=dsl.TaskConfigField.ENV, apply_to_task=True),
    ],
)
def spin_train_nodes(
    run_key: str,
    iteration: int,
    shards: int,
    nodes: int,
    accelerators: int,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    losers: dsl.Input[list[dsl.Dataset]],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    pod: dsl.TaskConfig,
):
    """Train the player on several nodes. A retry follows the TrainJob that it finds, or resumes from its checkpoint.

    Args:
        run_key: Name of the run in the store.
        iteration: Self-play iteration, from 1.
        shards: Number of shards that the losers were drawn in.
        nodes: Nodes that train together.
        accelerators: Accelerators of each node; one with fewer refuses to start.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        losers: The indexes of all shards; they make this task wait for them.
        model: The player's index, with the verdict on the iteration.
        metrics: The last training step's measures, and the change of the error on held-out real images.
        pod: What Kubeflow Pipelines would have given this task's pod, for the nodes.
    """
    from pathlib import Path

    from spin.stages import Place
    from spin.stages.launch import train_on_nodes
    from spin.stages.train import measures_of, metadata_of
    from spin.trainjob import PodSettings

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    settings = PodSettings(pod.resources or {}, pod.env or (), pod.node_selector, pod.tolerations or ())
    index = train_on_nodes(place, iteration, shards, nodes, accelerators, settings)
    model.metadata.update(metadata_of(index))
    Path(model.path).write_text(index.model_dump_json())
    for name, value in measures_of(index).items():
        metrics.log_metric(name, value)
