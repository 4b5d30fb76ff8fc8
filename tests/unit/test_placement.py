"""Where every task of the compiled file runs, as one table."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "golden" / "spin-diffusion.yaml"
STORE, SCORE = "store_secret", "score_secret"
TRACKING = "tracking_secret (optional)"
GPU = ("nvidia.com/gpu x gpu_count", "gpu_node_selector", "gpu_tolerations", "/dev/shm Memory 16Gi")
NONE = ("", "", "", "")

# task: cpu request, memory request, memory limit, (accelerator, node selector, tolerations, shared memory), retries,
# secrets. No task has a CPU limit, is cached or has an environment of its own; every one runs as the image's own user.
TABLE = {
    "Preflight": ("1", "4Gi", "4Gi", NONE, 0, {STORE, TRACKING}),
    "Require preflight": ("100m", "1Gi", "1Gi", NONE, 0, set()),
    "Prepare data": ("4", "32Gi", "32Gi", GPU, 0, {STORE, TRACKING}),
    "Plan score shards": ("100m", "256Mi", "256Mi", NONE, 0, set()),
    "Score shard": ("4", "32Gi", "32Gi", GPU, 3, {SCORE, TRACKING}),
    "Score base": ("4", "32Gi", "32Gi", GPU, 3, {SCORE, TRACKING}),
    "Plan iterations": ("100m", "256Mi", "256Mi", NONE, 0, set()),
    "Continue play": ("500m", "1Gi", "1Gi", NONE, 3, {STORE}),
    "Plan shards": ("100m", "256Mi", "256Mi", NONE, 0, set()),
    "Generate losers": ("4", "32Gi", "32Gi", GPU, 3, {STORE, TRACKING}),
    "Train player": ("8", "64Gi", "64Gi", GPU, 3, {STORE, TRACKING}),
    # The nodes' pods, not the task's own: see the test of what it passes on.
    "Train player on nodes": ("8", "64Gi", "64Gi", GPU, 3, {STORE, TRACKING}),
    "Score player": ("4", "32Gi", "32Gi", GPU, 3, {SCORE, TRACKING}),
    "Register model": ("1", "4Gi", "4Gi", NONE, 3, {STORE, TRACKING}),
}
USER = {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
BACKOFF = {"maxRetryCount": 3, "backoffDuration": "10s", "backoffFactor": 2.0, "backoffMaxDuration": "600s"}


def plain(reference: dict[str, str]) -> str:
    """Return the pipeline parameter's name that a setting is taken from."""
    (name,) = reference.values()
    assert set(reference) == {"componentInputParameter"}
    return name.removeprefix("pipelinechannel--")


def test_placement() -> None:
    spec, platform = yaml.safe_load_all(PACKAGE.read_text())
    on_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = {}
    for dag in [spec["root"], *spec["components"].values()]:
        for task in dag.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if not label:
                continue
            name = task["taskInfo"]["name"]
            container, pod = spec["deploymentSpec"]["executors"][label]["container"], dict(on_kubernetes.get(label, {}))
            resources = container["resources"]
            accelerator = resources.get("accelerator", {})
            count = accelerator.get("resourceCount", "").removeprefix("{{$.inputs.parameters['pipelinechannel--")
            selector, tolerations = pod.pop("nodeSelector", None), pod.pop("tolerations", [])
            shared = [
                f"{mount['mountPath']} {mount['medium']} {mount['sizeLimit']}"
                for mount in pod.pop("emptyDirMounts", [])
            ]
            assert pod.pop("securityContext", None) == USER, f"{name}: the restricted Pod Security Standard refuses it"
            secrets = {
                plain(secret["secretNameParameter"]) + (" (optional)" if secret["optional"] else "")
                for secret in pod.pop("secretAsEnv", [])
            }
            assert pod == {}, f"{name}: a setting that the table does not show"
            assert task["cachingOptions"].get("enableCache", False) is False, name
            assert "resourceCpuLimit" not in resources, name
            assert "env" not in container, name
            policy = task.get("retryPolicy")
            assert policy in (None, BACKOFF), name
            found[name] = (
                resources["resourceCpuRequest"],
                resources["resourceMemoryRequest"],
                resources["resourceMemoryLimit"],
                (
                    f"{accelerator['resourceType']} x {count.removesuffix(chr(39) + ']}}')}" if accelerator else "",
                    plain(selector["nodeSelectorJson"]) if selector else "",
                    ", ".join(plain(toleration["tolerationJson"]) for toleration in tolerations),
                    ", ".join(shared),
                ),
                policy["maxRetryCount"] if policy else 0,
                secrets,
            )

    assert found == TABLE


def test_what_is_for_the_nodes_is_passed_on() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    passed = {
        name: component["taskConfigPassthroughs"]
        for name, component in spec["components"].items()
        if "taskConfigPassthroughs" in component
    }

    # The launching pod has the keys of its own accord, and neither accelerators nor a node of theirs.
    assert passed == {
        "comp-spin-train-nodes": [
            {"field": "RESOURCES"},
            {"field": "KUBERNETES_NODE_SELECTOR"},
            {"field": "KUBERNETES_TOLERATIONS"},
            {"applyToTask": True, "field": "ENV"},
        ]
    }
    pod = spec["components"]["comp-spin-train-nodes"]["inputDefinitions"]["parameters"]["pod"]
    assert (pod["parameterType"], pod["isOptional"]) == ("TASK_CONFIG", True)


def test_one_pod_trains_unless_there_are_more_nodes() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    conditions = {
        task["taskInfo"]["name"]: task["triggerPolicy"]["condition"]
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "triggerPolicy" in task and "train_nodes" in task["triggerPolicy"]["condition"]
    }

    several = "int(inputs.parameter_values['pipelinechannel--train_nodes']) > 1"
    assert conditions == {"on several nodes": several, "in one pod": f"!({several})"}
    assert spec["root"]["inputDefinitions"]["parameters"]["train_nodes"]["defaultValue"] == 1


def test_the_loop_over_iterations_is_in_order() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    loops = {
        task["taskInfo"]["name"]: task.get("iteratorPolicy", {}).get("parallelismLimit")
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "parameterIterator" in task
    }

    assert loops == {"iterations": 1, "shards": None, "score shards": None}


def test_the_defaults_ask_for_a100s() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    parameters: dict[str, Any] = spec["root"]["inputDefinitions"]["parameters"]

    assert parameters["gpu_count"]["defaultValue"] == 1
    assert parameters["gpu_node_selector"]["defaultValue"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert parameters["gpu_tolerations"]["defaultValue"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]


@pytest.mark.parametrize("file", ["spin-diffusion.yaml", "spin-comparison.yaml"])
def test_every_task_runs_as_the_images_user(file: str) -> None:
    """KFP's server adds the rest of the restricted Pod Security Standard, but not that root is refused."""
    spec, platform = yaml.safe_load_all(PACKAGE.with_name(file).read_text())
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    assert set(pods) == set(spec["deploymentSpec"]["executors"])
    assert [label for label, pod in pods.items() if pod.get("securityContext") != USER] == []
    assert f"\nUSER {USER['runAsUser']}:{USER['runAsGroup']}\n" in (ROOT / "images/runtime/Dockerfile").read_text()
