"""A TrainJob of Kubeflow Trainer v2: its name, its document, and what its state and its pods say; plain values only.

Source: the API ``trainer.kubeflow.org/v1alpha1`` as of Trainer 2.3, where a TrainJob patches the runtime that it names.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spin.cluster import RUNTIME, TRAINER, TRAINER_VERSION

CONTAINER = "node"
"""Name of the nodes' container, and of their job, in Trainer's runtimes."""
SHARED_MEMORY = "16Gi"
LABELS = {"app.kubernetes.io/name": "spin-train-node", "app.kubernetes.io/part-of": "spin-diffusion"}
POD_LABELS = LABELS | {
    # What holds for every pod of a run, above all what it may reach, holds for these.
    "pipelines.kubeflow.org/v2_component": "true",
    # A proxy beside it would stand between the nodes, and go on when training has ended.
    "sidecar.istio.io/inject": "false",
}
QUEUE = "kueue.x-k8s.io/queue-name"
"""Kueue's label of what waits in a queue, and which."""


@dataclass(frozen=True)
class PodSettings:
    """What a node's pod is to have, as fragments of a pod's specification in Kubernetes' JSON."""

    resources: Mapping[str, Any]
    env: Sequence[Mapping[str, Any]] = ()
    node_selector: Mapping[str, str] | None = None
    tolerations: Sequence[Mapping[str, Any]] = ()


def name_of(store_uri: str, run_key: str, iteration: int) -> str:
    """Return the one name for the training of this iteration of this run: who comes second finds the first's TrainJob.

    At most 48 characters; a pod's host name adds its place to it and may have 63.
    """
    short = re.sub(r"[^a-z0-9]+", "-", run_key.lower())[:28].strip("-")
    digest = hashlib.sha256(f"{store_uri} {run_key} {iteration}".encode()).hexdigest()
    return f"spin-{short}-{iteration:03d}-{digest[:8]}"


def document(
    name: str, command: Sequence[str], nodes: int, settings: PodSettings, launcher: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the TrainJob that runs ``command`` on ``nodes`` nodes, in the image of the pod that launches it."""
    pod = launcher["spec"]
    image = next((item for item in pod["containers"] if item["name"] == "main"), pod["containers"][0])["image"]
    patch: dict[str, Any] = {
        # PyTorch's workers exchange tensors in shared memory; the default of 64 MiB ends in bus errors.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}}],
        "containers": [
            {
                "name": CONTAINER,
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    if settings.node_selector:
        patch["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        patch["tolerations"] = list(settings.tolerations)
    if secrets := pod.get("imagePullSecrets"):
        patch["imagePullSecrets"] = secrets
    nodes_patch = {
        "name": CONTAINER,
        "template": {"spec": {"template": {"metadata": {"labels": POD_LABELS}, "spec": patch}}},
    }
    trainer: dict[str, Any] = {
        "image": image,
        "command": list(command),
        "numNodes": nodes,
        "resourcesPerNode": dict(settings.resources),
    }
    if settings.env:
        trainer["env"] = list(settings.env)
    # A launcher that had to wait for its resources makes its nodes wait for theirs, all of them at once.
    queue = {key: value for key, value in launcher["metadata"].get("labels", {}).items() if key == QUEUE}
    return {
        "apiVersion": f"{TRAINER}/{TRAINER_VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": LABELS | queue, "ownerReferences": owners(launcher)},
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "trainer": trainer,
            "runtimePatches": [
                {
                    "manager": "spin-diffusion/launcher",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [nodes_patch]}}},
                }
            ],
        },
    }


def owners(launcher: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what makes Kubernetes delete a TrainJob with the pod that launched it."""
    metadata = launcher["metadata"]
    return [{"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}]


def goes_on(job: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether ``job`` is on its way to what ``wanted`` asks for."""
    same = all(
        job["spec"].get("trainer", {}).get(key) == wanted["spec"]["trainer"][key]
        for key in ("image", "command", "numNodes")
    )
    return same and "deletionTimestamp" not in job["metadata"] and state(job)[0] not in ("Complete", "Failed")


def state(job: Mapping[str, Any]) -> tuple[str, str]:
    """Return the state, ``Complete``, ``Failed``, ``Suspended`` or ``Created``, and why in the controller's words."""
    conditions = {item["type"]: item for item in job.get("status", {}).get("conditions", [])}
    for word in ("Complete", "Failed", "Suspended"):
        if (found := conditions.get(word, {})).get("status") == "True":
            return word, ": ".join(found[key] for key in ("reason", "message") if found.get(key))
    return "Created", ""


def node_of(pod: Mapping[str, Any]) -> int:
    """Return which node of its TrainJob a pod is."""
    return int(pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", 0))


def waiting(pod: Mapping[str, Any]) -> str:
    """Return why a pod has not started, where that is not just a matter of seconds."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        found = container.get("state", {}).get("waiting", {})
        if found.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return _said(found)
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _said(condition)
    return ""


def failure(pod: Mapping[str, Any]) -> str:
    """Return why a pod has failed, as Kubernetes sees it; empty: it has not."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated", {})
        if ended.get("exitCode"):
            return f"{ended.get('reason', 'Error')}, exit code {ended['exitCode']}"
    return _said(status) or "Failed" if status.get("phase") == "Failed" else ""


def _said(found: Mapping[str, Any]) -> str:
    return " ".join(": ".join(found[key] for key in ("reason", "message") if found.get(key)).split())
