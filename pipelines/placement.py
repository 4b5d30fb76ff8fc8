"""Where tasks run: resources, accelerators, retries, secrets. The one place for Kubernetes settings of tasks."""

from typing import Any

from kfp import dsl, kubernetes

ACCELERATOR = "nvidia.com/gpu"
A100_80GB = {
    "node_selector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
}
SHARED_MEMORY = "16Gi"
USER = 10001
"""The images' own user, by number: a namespace under the restricted Pod Security Standard asks for one."""


def place_on_cpu(task: dsl.PipelineTask, cpu: Any, memory: Any) -> dsl.PipelineTask:
    """Give a task CPU and memory, which may be pipeline parameters; its result is never taken from KFP's cache."""
    task.set_cpu_request(cpu).set_memory_request(memory).set_memory_limit(memory)
    _hand_over(task, cpu, memory)
    # Stages look into the store by themselves; a cached task would not notice that an object is gone.
    task.set_caching_options(False)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    # A pod can't tell which image it runs. Stages keep it with what they make, if it says so for good.
    if "@sha256:" in task.container_spec.image:
        task.set_env_variable("SPIN_IMAGE", task.container_spec.image)
    return task


def with_retries(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Let a task outlast its node: a retry goes on from the last checkpoint or shard.

    prepare-data has none: it is where bad input is told, which should be at once and only once.
    """
    return task.set_retry(num_retries=3, backoff_duration="10s", backoff_factor=2.0, backoff_max_duration="600s")


def _hand_over(task: dsl.PipelineTask, *settings: Any) -> None:
    """Make pipeline parameters reach a task that has them in its resources alone.

    The compiler hands over to the body of a loop or condition only what a task is said to read; a resource would point
    at a parameter that is not there.
    """
    task.register_pipeline_channels([setting for setting in settings if not isinstance(setting, str)])


def of_work(pool: dict[str, Any], work: str) -> dict[str, Any]:
    """Return the part of a pool that is for ``train``, or for ``draw`` (preparing, sampling, scoring)."""
    return {name: value for name, value in pool.items() if name.startswith(f"{work}_")}


def place_on_gpu(task: dsl.PipelineTask, work: str, pool: dict[str, Any]) -> dsl.PipelineTask:
    """Give a task what its ``work`` takes, ``train`` or ``draw``, on a pool of nodes; all of it pipeline parameters."""
    place_on_cpu(task, pool[f"{work}_cpu"], pool[f"{work}_memory"])
    task.set_accelerator_type(ACCELERATOR).set_accelerator_limit(pool[f"{work}_gpus"])
    _hand_over(task, pool[f"{work}_gpus"])
    kubernetes.add_node_selector_json(task, pool[f"{work}_selector"])
    kubernetes.add_toleration_json(task, pool[f"{work}_tolerations"])
    # PyTorch's workers exchange tensors here; the default of 64 MiB ends in bus errors.
    kubernetes.empty_dir_mount(
        task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=SHARED_MEMORY
    )
    return task


def with_store(task: dsl.PipelineTask, store_secret: Any) -> dsl.PipelineTask:
    """Hand a task the S3 keys from a Kubernetes secret, as the usual variables, and the region if it has one."""
    kubernetes.use_secret_as_env(
        task,
        secret_name=store_secret,
        secret_key_to_env={"AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY"},
    )
    # All of a call is optional, or none of it; an optional key may be absent from a secret that is there.
    kubernetes.use_secret_as_env(
        task,
        secret_name=store_secret,
        optional=True,
        secret_key_to_env={"AWS_DEFAULT_REGION": "AWS_DEFAULT_REGION"},
    )
    return task


def with_tracking(task: dsl.PipelineTask, tracking_secret: Any) -> dsl.PipelineTask:
    """Hand a task the MLflow credentials; a server without authentication needs no such secret."""
    kubernetes.use_secret_as_env(
        task,
        secret_name=tracking_secret,
        optional=True,
        secret_key_to_env={
            "MLFLOW_TRACKING_USERNAME": "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
        },
    )
    return task


def with_secrets(task: dsl.PipelineTask, store_secret: Any, tracking_secret: Any) -> dsl.PipelineTask:
    """Hand a task the S3 keys and the MLflow credentials."""
    return with_tracking(with_store(task, store_secret), tracking_secret)
