"""The Kubernetes cluster of a run, and the only module that knows its client: nodes and quotas, and its TrainJobs.

What may be scheduled where is decided by pure functions on plain values, so that it can be said before a pod waits.
TrainJobs go through the client's custom objects. The ``kubeflow`` package has a client of its own for them, which gives
a node's environment plain values alone, no reference to a secret, and knows neither owners nor why a job failed.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.config import nearest
from spin.errors import SpinError, cause

ACCELERATOR = "nvidia.com/gpu"
SECONDS = 10.0
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_ACCESS = "let the runs' service account do it, see manifests/base/workspace/access.yaml"
TRAINER, TRAINER_VERSION = "trainer.kubeflow.org", "v1alpha1"
RUNTIME = "torch-distributed"
"""The training runtime that comes with Kubeflow Trainer; it tells the nodes of each other."""


class ClusterAwayError(SpinError):
    """The API server does not answer; it may later."""


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
    pool: str = "gpu_pool"
    """The parameter that selector and tolerations come from."""


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
        connection = client.ApiClient(configuration)
        self._core, self._custom = client.CoreV1Api(connection), client.CustomObjectsApi(connection)

    def _ask(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return the server's answer; None: there is no such thing."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return function(*arguments, _request_timeout=SECONDS, **options)
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status >= 500 or error.status == 429:
                raise ClusterAwayError(
                    f"expected {what}, got {error.status} {error.reason}; look into the API server's log"
                ) from None
            do = _ACCESS if error.status == 403 else "look into the API server's log"
            raise SpinError(f"expected {what}, got {error.status} {_message(error)}; {do}") from None
        except HTTPError as error:
            raise ClusterAwayError(
                f"expected the Kubernetes API, got {cause(error)}; check the network policies of the runs"
            ) from None

    def _list(self, what: str, function: Callable[..., Any], *arguments: str, **options: str) -> list[Any]:
        answer = self._ask(f"the list of {what}", function, *arguments, **options)
        items: list[Any] = answer.items if answer else []
        return items

    def _json(self, what: str, function: Callable[..., Any], *arguments: str, **options: str) -> Any:
        """Return the server's answer as it is: the client's own classes may be older than the server."""
        answer = self._ask(what, function, *arguments, _preload_content=False, **options)
        return None if answer is None else json.loads(answer.data)

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
                allocatable={key: number(value) for key, value in (item.status.allocatable or {}).items()},
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
                found[key] = min(found.get(key, float("inf")), number(hard) - number(used.get(key, "0")))
        return found

    def need_trainer(self) -> None:
        """See that Kubeflow Trainer is installed, with the runtime that training needs.

        Raises:
            SpinError: (also) it is not.
        """
        if self._ask("Kubeflow Trainer", self._custom.get_api_resources, TRAINER, TRAINER_VERSION) is None:
            raise SpinError(
                f"expected Kubeflow Trainer ({TRAINER}/{TRAINER_VERSION}), got none in this cluster; install it, or "
                "set train_nodes to 1"
            )
        runtime = (TRAINER, TRAINER_VERSION, "clustertrainingruntimes", RUNTIME)
        if self._ask(f"the training runtime {RUNTIME}", self._custom.get_cluster_custom_object, *runtime) is None:
            raise SpinError(
                f"expected the ClusterTrainingRuntime {RUNTIME}, got none in this cluster; install Kubeflow Trainer's "
                "runtimes, or set train_nodes to 1"
            )

    def this_pod(self) -> dict[str, Any]:
        """Return the pod that this process runs in, as the API's JSON."""
        # A pod's host name ends after 63 characters; the name that KFP tells does not.
        name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
        pod: dict[str, Any] | None = self._json(f"the pod {name}", self._core.read_namespaced_pod, name, namespace())
        if pod is None:
            raise SpinError(f"expected this pod in {namespace()}, got none called {name!r}; set KFP_POD_NAME")
        return pod

    def _train_jobs(self) -> tuple[str, ...]:
        return TRAINER, TRAINER_VERSION, namespace(), "trainjobs"

    def create_train_job(self, document: Mapping[str, Any]) -> bool:
        """Create a TrainJob; False: there is one of that name.

        Raises:
            SpinError: (also) the server refuses it: Trainer is not there or too old, or a setting is not allowed.
        """
        from kubernetes.client import ApiException

        def create(*arguments: Any, **options: Any) -> bool:
            try:
                # Strict: else a Trainer that is too old would drop what it does not know, such as where pods may run.
                self._custom.create_namespaced_custom_object(*arguments, field_validation="Strict", **options)
            except ApiException as error:
                if error.status == 409:
                    return False
                if error.status in (400, 403, 422):
                    do = _ACCESS if error.status == 403 else "needed is Kubeflow Trainer 2.2 or newer"
                    raise SpinError(f"expected a TrainJob, got {error.status} {_message(error)}; {do}") from None
                raise
            return True

        made = self._ask("a TrainJob", create, *self._train_jobs(), document)
        if made is None:
            raise SpinError("expected Kubeflow Trainer, got none in this cluster; install it, or set train_nodes to 1")
        return bool(made)

    def train_job(self, name: str) -> dict[str, Any] | None:
        """Return a TrainJob, as the API's JSON; None: there is none of that name."""
        found: dict[str, Any] | None = self._ask(
            f"the TrainJob {name}", self._custom.get_namespaced_custom_object, *self._train_jobs(), name
        )
        return found

    def own_train_job(self, name: str, owners: Sequence[Mapping[str, Any]]) -> None:
        """Give a TrainJob other owners: it goes when they are gone."""
        change = {"metadata": {"ownerReferences": owners}}
        patch = self._custom.patch_namespaced_custom_object
        self._ask(f"the TrainJob {name}", patch, *self._train_jobs(), name, change)

    def delete_train_job(self, name: str) -> None:
        """Delete a TrainJob, and with it its pods; nothing happens where there is none."""
        delete = self._custom.delete_namespaced_custom_object
        self._ask(f"the TrainJob {name}", delete, *self._train_jobs(), name, propagation_policy="Background")

    def pods_of(self, train_job: str) -> list[dict[str, Any]]:
        """Return the pods of a TrainJob's nodes, as the API's JSON."""
        selector = f"jobset.sigs.k8s.io/jobset-name={train_job},jobset.sigs.k8s.io/replicatedjob-name=node"
        found = self._json("the list of pods", self._core.list_namespaced_pod, namespace(), label_selector=selector)
        pods: list[dict[str, Any]] = found["items"] if found else []
        return pods

    def log(self, pod: str, container: str, seconds: int = 0, lines: int = 0) -> list[str]:
        """Return a container's log as ``TIME TEXT``: of the last ``seconds`` and at most ``lines``; 0: all."""
        options = {"since_seconds": seconds or None, "tail_lines": lines or None}
        said = self._ask(
            f"the log of {pod}",
            self._core.read_namespaced_pod_log,
            *(pod, namespace()),
            container=container,
            timestamps=True,
            _preload_content=False,
            **{name: value for name, value in options.items() if value},
        )
        return [] if said is None else said.data.decode(errors="replace").splitlines()


def _message(error: Any) -> str:
    """Return why the server refused, in its own words."""
    try:
        return " ".join(str(json.loads(error.body)["message"]).split())
    except (KeyError, TypeError, ValueError):
        return str(error.reason)


def namespace() -> str:
    """Return the namespace of this pod, or the one that ``KFP_NAMESPACE`` names."""
    if _NAMESPACE.is_file():
        return _NAMESPACE.read_text().strip()
    return os.environ.get("KFP_NAMESPACE") or "default"


def number(quantity: str) -> float:
    """Return an amount in units: cores, bytes, devices."""
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(quantity))


def pool_of(options: Mapping[str, Any], where: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return the node selector and the tolerations of a pool of nodes.

    Args:
        options: ``node_selector``, labels by name, and ``tolerations``, a list; both may be absent.
        where: the parameter that they come from.

    Raises:
        SpinError: they are something else.
    """
    known = ["node_selector", "tolerations"]
    for name in options:
        if name not in known:
            raise SpinError(f"expected a setting of {where}, got {name!r}; {nearest(str(name), known)}")
    selector, tolerations = options.get("node_selector", {}), options.get("tolerations", [])
    if not isinstance(selector, dict) or not all(isinstance(part, str) for item in selector.items() for part in item):
        raise SpinError(f"expected labels as a mapping of text, got {selector!r}; correct {where}.node_selector")
    if not isinstance(tolerations, list) or not all(isinstance(item, dict) for item in tolerations):
        raise SpinError(f"expected a list of mappings, got {tolerations!r}; correct {where}.tolerations")
    return selector, tolerations


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
        f"{need.pool} or gpu_count, or add such a node"
    )


def room(nodes: Sequence[Node], need: Need) -> int:
    """Return how many such pods nodes that fit have room for, were they empty."""
    return sum(
        min(int(node.allocatable[name] // wanted) for name, wanted in need.amounts.items() if wanted) for node in nodes
    )


def shown(amount: float, name: str) -> str:
    """Return an amount for people: bytes in GiB."""
    return f"{amount / 2**30:.0f} GiB" if name in ("memory", "ephemeral-storage") else f"{amount:g}"
