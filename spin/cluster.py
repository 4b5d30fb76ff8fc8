"""The Kubernetes cluster that a run would use, and the only module that knows its client: nodes and quotas, read only.

What may be scheduled where is decided by pure functions on plain values, so that it can be said before a pod waits.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.errors import SpinError

ACCELERATOR = "nvidia.com/gpu"
SECONDS = 10.0
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_ACCESS = "let the runs' service account list it, see manifests/base/workspace/access.yaml"


@dataclass(frozen=True)
class Node:
    """A node as the scheduler sees it; ``allocatable`` is in units (cores, bytes, devices)."""

    name: str
    labels: Mapping[str, str]
    taints: Sequence[Mapping[str, str]]
    allocatable: Mapping[str, float]
    ready: bool = True


@dataclass(frozen=True)
class Need:
    """What a pod asks of its node; ``amounts`` is in the units of ``Node.allocatable``."""

    amounts: Mapping[str, float]
    selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, str]] = ()
    architecture: str = "amd64"


def inside() -> bool:
    """Return whether there is a cluster to ask: this is one of its pods, or KUBECONFIG names one."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST") or os.environ.get("KUBECONFIG"))


class Cluster:
    """A connection to the API server, by the pod's service account or by KUBECONFIG.

    Raises:
        SpinError: (each method too) the server is out of reach, or this account may not look.
    """

    def __init__(self) -> None:
        from kubernetes import client, config

        configuration = client.Configuration()
        configuration.retries = 1
        try:
            if path := os.environ.get("KUBECONFIG"):
                config.load_kube_config(path, client_configuration=configuration)
            else:
                config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException as error:
            raise SpinError(
                f"expected a service account or KUBECONFIG, got {error}; let the pod mount its account's token"
            ) from None
        self._core = client.CoreV1Api(client.ApiClient(configuration))

    def _list(self, what: str, function: Any, *arguments: str) -> list[Any]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            items: list[Any] = function(*arguments, _request_timeout=SECONDS).items
            return items
        except ApiException as error:
            do = _ACCESS if error.status == 403 else "look into the API server's log"
            raise SpinError(f"expected the list of {what}, got {error.status} {error.reason}; {do}") from None
        except HTTPError as error:
            raise SpinError(
                f"expected the Kubernetes API, got {type(error).__name__}; check the network policies of the runs"
            ) from None

    def nodes(self) -> list[Node]:
        """Return all nodes."""
        return [
            Node(
                name=item.metadata.name,
                labels=item.metadata.labels or {},
                taints=[
                    {"key": taint.key, "value": taint.value or "", "effect": taint.effect}
                    for taint in item.spec.taints or []
                ],
                allocatable={key: _number(value) for key, value in (item.status.allocatable or {}).items()},
                ready=not item.spec.unschedulable
                and any(c.type == "Ready" and c.status == "True" for c in item.status.conditions or []),
            )
            for item in self._list("nodes", self._core.list_node)
        ]

    def left(self) -> dict[str, float]:
        """Return what the quotas of the runs' namespace leave, by resource (``requests.nvidia.com/gpu``)."""
        found: dict[str, float] = {}
        for item in self._list("quotas", self._core.list_namespaced_resource_quota, namespace()):
            used = item.status.used or {}
            for key, hard in (item.status.hard or {}).items():
                found[key] = min(found.get(key, float("inf")), _number(hard) - _number(used.get(key, "0")))
        return found


def namespace() -> str:
    """Return the namespace of this pod, or the one that ``KFP_NAMESPACE`` names."""
    if _NAMESPACE.is_file():
        return _NAMESPACE.read_text().strip()
    return os.environ.get("KFP_NAMESPACE") or "default"


def _number(quantity: str) -> float:
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(quantity))


def tolerated(taint: Mapping[str, str], tolerations: Sequence[Mapping[str, str]]) -> bool:
    """Return whether a pod with ``tolerations`` may start in spite of ``taint``, by Kubernetes' rules."""
    if taint["effect"] == "PreferNoSchedule":
        return True
    for toleration in tolerations:
        if toleration.get("effect") not in (None, "", taint["effect"]):
            continue
        exists = toleration.get("operator") == "Exists"
        if not toleration.get("key"):
            if exists:
                return True
            continue
        same_value = exists or toleration.get("value", "") == taint.get("value", "")
        if toleration["key"] == taint["key"] and same_value:
            return True
    return False


def obstacles(node: Node, need: Need) -> list[str]:
    """Return why a pod may never start on a node, whatever runs there now; empty: it may."""
    found = [] if node.ready else ["is not ready"]
    for key, value in need.selector.items():
        if (got := node.labels.get(key)) != value:
            found.append(f"has {key}={got}, not {value}" if got else f"has no label {key}")
    for taint in node.taints:
        if not tolerated(taint, need.tolerations):
            found.append(f"has the taint {taint['key']}={taint.get('value', '')}:{taint['effect']}")
    for name, wanted in need.amounts.items():
        if (there := node.allocatable.get(name, 0)) < wanted:
            found.append(f"has {shown(there, name)} {name}, not {shown(wanted, name)}")
    if (got := node.labels.get("kubernetes.io/arch", need.architecture)) != need.architecture:
        found.append(f"is {got}, and the image is {need.architecture}")
    return found


def fitting(nodes: Sequence[Node], need: Need) -> list[Node]:
    """Return the nodes on which a pod may start.

    Raises:
        SpinError: there is none; the nearest node and what it lacks are named.
    """
    found = [node for node in nodes if not obstacles(node, need)]
    if found:
        return found
    if not nodes:
        raise SpinError("expected a node for a run's pod, got none at all; add a node pool")
    nearest = min(nodes, key=lambda node: len(obstacles(node, need)))
    raise SpinError(
        f"expected a node for {', '.join(f'{shown(value, key)} {key}' for key, value in need.amounts.items())}, got "
        f"none of {len(nodes)} (nearest is {nearest.name}: {', '.join(obstacles(nearest, need))}); change "
        "gpu_node_selector, gpu_tolerations or gpu_count, or add such a node"
    )


def shown(amount: float, name: str) -> str:
    """Return an amount for people: bytes in GiB."""
    return f"{amount / 2**30:.0f} GiB" if name in ("memory", "ephemeral-storage") else f"{amount:g}"
