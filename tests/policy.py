"""Rules that every rendered Kubernetes object must keep, as functions from objects to faults."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spin.trainjob import POD_LABELS

Object = dict[str, Any]
WORKLOADS = {"Deployment", "StatefulSet", "Job", "CronJob"}
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "PriorityClass", "ResourceFlavor", "ClusterQueue"}
VOLUMES = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected", "downwardAPI", "ephemeral", "csi"}
"""Kinds of volumes that the restricted Pod Security Standard allows."""
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|STORE_URI")
FULL_TAG = re.compile(r"[^:@]+(:\w*\d+\.\d+[\w.-]*|:RELEASE\.\d{4}-\d\d-\d\dT[\dZ-]+|@sha256:[0-9a-f]{64})")


def name_of(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def namespace_of(item: Object) -> str:
    return "" if item["kind"] in CLUSTER_WIDE else item["metadata"].get("namespace", "")


def template_of(item: Object) -> Object:
    """Return the pod template of a workload."""
    spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
    return spec["template"]


def workloads(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Give each workload with its pod's spec."""
    for item in objects:
        if item["kind"] in WORKLOADS:
            yield item, template_of(item)["spec"]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def pod_security(objects: list[Object]) -> Iterator[str]:
    """The restricted Pod Security Standard, a numeric user, a read-only root, no token that nobody reads."""
    for item, pod in workloads(objects):
        where, security = name_of(item), pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{where}: runs as a numeric user other than root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where}: seccompProfile RuntimeDefault"
        if {"hostNetwork", "hostPID", "hostIPC"} & {key for key, value in pod.items() if value}:
            yield f"{where}: no namespace of the host"
        if pod.get("automountServiceAccountToken") is not False or pod.get("enableServiceLinks") is not False:
            yield f"{where}: no service account token, no service links"
        for volume in pod.get("volumes", []):
            if not set(volume) - {"name"} <= VOLUMES:
                yield f"{where}: no volume of kind {sorted(set(volume) - {'name'})}"
            if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
                yield f"{where}: emptyDir {volume['name']} has a size limit"
        for container in containers(pod):
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{where}: no more privileges"
            if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("capabilities", {}).get("add"):
                yield f"{where}: drops all capabilities"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{where}: read-only root file system"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{where}: no port of the host"


def resources(objects: list[Object]) -> Iterator[str]:
    """Every container asks for CPU and memory and has a limit of memory; no limit of CPU, which only slows down."""
    for item, pod in workloads(objects):
        for container in containers(pod):
            given = container.get("resources", {})
            if set(given.get("requests", {})) < {"cpu", "memory"} or set(given.get("limits", {})) != {"memory"}:
                yield f"{name_of(item)}: requests of CPU and memory, a limit of memory"


def probes(objects: list[Object]) -> Iterator[str]:
    """Every server has a startup, a readiness and a liveness probe."""
    for item, pod in workloads(objects):
        if item["kind"] in ("Deployment", "StatefulSet"):
            for container in pod["containers"]:
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if probe not in container:
                        yield f"{name_of(item)}: {probe}"


def labels(objects: list[Object]) -> Iterator[str]:
    """Every object says what it is and what it belongs to."""
    for item in objects:
        given = item["metadata"].get("labels", {})
        if "app.kubernetes.io/name" not in given or given.get("app.kubernetes.io/part-of") != "spin-diffusion":
            yield f"{name_of(item)}: labels app.kubernetes.io/name and part-of"


def images(objects: list[Object]) -> Iterator[str]:
    """Every image has a full version or a digest."""
    for item, pod in workloads(objects):
        for container in containers(pod):
            if not FULL_TAG.fullmatch(container["image"]):
                yield f"{name_of(item)}: a full tag or a digest, not {container['image']}"


def secrets(objects: list[Object]) -> Iterator[str]:
    """No secret's value is in the manifests."""
    for item in objects:
        if item["kind"] == "Secret":
            yield f"{name_of(item)}: no secret in the manifests"
        if item["kind"] == "ConfigMap":
            yield from (f"{name_of(item)}: {key} is a secret" for key in item["data"] if SECRET_NAME.search(key))
    for item, pod in workloads(objects):
        for container in containers(pod):
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]) and "value" in variable:
                    yield f"{name_of(item)}: {variable['name']} comes from a secret"
            for word in [*container.get("command", []), *container.get("args", [])]:
                if found := re.search(rf"\$\(\w*({SECRET_NAME.pattern})\w*\)", word):
                    yield f"{name_of(item)}: {found[0]} stands among the arguments of a process, for others to read"


def queue(objects: list[Object]) -> Iterator[str]:
    """Where runs are queued, their namespace has no quota of what the queue shares out: it refuses those who wait."""
    queued = {namespace_of(item) for item in objects if item["kind"] == "LocalQueue"}
    groups = [group for item in objects if item["kind"] == "ClusterQueue" for group in item["spec"]["resourceGroups"]]
    shared = {name for group in groups for name in group["coveredResources"]}
    for item in objects:
        if item["kind"] == "ResourceQuota" and namespace_of(item) in queued:
            held = {name.removeprefix("requests.") for name in item["spec"]["hard"]} & shared
            yield from (f"{name_of(item)}: {name} is the queue's" for name in sorted(held))


def _keys_needed(item: Object, pod: Object) -> Iterator[tuple[str, str, str]]:
    """Give (kind, name, key) of everything a pod reads; the key is empty where the whole object is meant."""
    for container in containers(pod):
        for source in container.get("envFrom", []):
            yield "ConfigMap", source["configMapRef"]["name"], ""
        for variable in container.get("env", []):
            if found := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield "Secret", found["name"], found["key"]
    for volume in pod.get("volumes", []):
        if found := volume.get("configMap"):
            yield "ConfigMap", found["name"], ""
        if found := volume.get("secret"):
            yield from (("Secret", found["secretName"], entry["key"]) for entry in found["items"])
        if found := volume.get("persistentVolumeClaim"):
            yield "PersistentVolumeClaim", found["claimName"], ""
    yield "ServiceAccount", pod["serviceAccountName"], ""
    if found := pod.get("priorityClassName"):
        yield "PriorityClass", found, ""
    if item["kind"] == "StatefulSet":
        yield "Service", item["spec"]["serviceName"], ""


def references(objects: list[Object], known_secrets: list[Object]) -> Iterator[str]:
    """Whatever is named is there: secrets and their keys, config maps, accounts, claims, services, roles, pods."""
    there: dict[tuple[str, str, str], set[str]] = {
        (item["kind"], namespace_of(item), item["metadata"]["name"]): set(item.get("data", {}))
        for item in [*objects, *known_secrets]
    }
    for item, pod in workloads(objects):
        for kind, name, key in _keys_needed(item, pod):
            found = there.get((kind, "" if kind in CLUSTER_WIDE else namespace_of(item), name))
            if found is None or (key and key not in found):
                yield f"{name_of(item)}: {kind} {name} {key}".rstrip()
        for container in containers(pod):
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = item["spec"].get("volumeClaimTemplates", [])
            volumes = {volume["name"] for volume in [*pod.get("volumes", []), *(c["metadata"] for c in claims)]}
            if mounted != volumes:
                yield f"{name_of(item)}: volumes and mounts {mounted ^ volumes}"
    pods = list(pods_of(objects))
    for item in objects:
        if item["kind"] in ("Service", "PodDisruptionBudget"):
            selector = item["spec"]["selector"]
            selector = selector if item["kind"] == "PodDisruptionBudget" else {"matchLabels": selector}
            chosen = [pod for pod in pods if pod.namespace == namespace_of(item) and matches(selector, pod.labels)]
            if len(chosen) != 1:
                yield f"{name_of(item)}: selects one workload, not {[pod.name for pod in chosen]}"
            if item["kind"] == "Service":
                for port in item["spec"]["ports"]:
                    if not any(port["targetPort"] in pod.ports for pod in chosen):
                        yield f"{name_of(item)}: port {port['targetPort']} of its pod"
        for kind, name in _queues_needed(item):
            if (kind, "", name) not in there:
                yield f"{name_of(item)}: {kind} {name}"
        if item["kind"] == "LocalQueue":
            yield from _lets_in(item, objects)
        for host, number in _destinations(item):
            ports = [
                port["port"]
                for service in objects
                if service["kind"] == "Service"
                and host == f"{service['metadata']['name']}.{namespace_of(service)}.svc.cluster.local"
                for port in service["spec"]["ports"]
            ]
            if number not in ports:
                yield f"{name_of(item)}: a Service at {host}:{number}"
        if "roleRef" in item:
            kind, namespace = item["roleRef"]["kind"], namespace_of(item)
            if (kind, "" if kind in CLUSTER_WIDE else namespace, item["roleRef"]["name"]) not in there:
                yield f"{name_of(item)}: {kind} {item['roleRef']['name']}"


def _queues_needed(item: Object) -> Iterator[tuple[str, str]]:
    """Give (kind, name) of the objects of Kueue that one names."""
    if item["kind"] == "LocalQueue":
        yield "ClusterQueue", item["spec"]["clusterQueue"]
    if item["kind"] == "ClusterQueue":
        for group in item["spec"]["resourceGroups"]:
            yield from (("ResourceFlavor", flavor["name"]) for flavor in group["flavors"])


def _lets_in(local: Object, objects: list[Object]) -> Iterator[str]:
    here = {"kubernetes.io/metadata.name": namespace_of(local)}
    for item in objects:
        meant = item["kind"] == "ClusterQueue" and item["metadata"]["name"] == local["spec"]["clusterQueue"]
        if meant and not matches(item["spec"]["namespaceSelector"], here):
            yield f"{name_of(item)}: lets the namespace {namespace_of(local)} in"


def _destinations(item: Object) -> Iterator[tuple[str, int]]:
    """Give the (host, port) that a VirtualService leads to."""
    if item["kind"] == "VirtualService":
        for rule in item["spec"]["http"]:
            for route in rule.get("route", []):
                yield route["destination"]["host"], route["destination"]["port"]["number"]


@dataclass(frozen=True)
class Pod:
    """One end of a connection."""

    name: str
    namespace: str
    labels: dict[str, str]
    ports: dict[str, int]


OUTSIDE = [
    Pod("dns", "kube-system", {"k8s-app": "kube-dns"}, {"dns": 53}),
    Pod("ml-pipeline", "kubeflow", {"app": "ml-pipeline"}, {}),
    Pod("gateway", "istio-system", {"app": "istio-ingressgateway"}, {}),
]
"""Pods of others that the policies speak of."""


def pods_of(objects: list[Object]) -> Iterator[Pod]:
    """Give the pods of all workloads."""
    for item, pod in workloads(objects):
        ports = {port["name"]: port["containerPort"] for c in pod["containers"] for port in c.get("ports", [])}
        yield Pod(name_of(item), namespace_of(item), template_of(item)["metadata"]["labels"], ports)


def matches(selector: Object, given: dict[str, str]) -> bool:
    """Return whether a label selector chooses these labels."""
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        if given.get(expression["key"]) not in expression["values"]:
            return False
    return all(given.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _is_peer(peer: Object, policy: Object, pod: Pod) -> bool:
    if "ipBlock" in peer:
        return False
    namespace = {"kubernetes.io/metadata.name": pod.namespace}
    if "namespaceSelector" in peer:
        here = matches(peer["namespaceSelector"], namespace)
    else:
        here = pod.namespace == namespace_of(policy)
    return here and matches(peer.get("podSelector", {}), pod.labels)


def network(objects: list[Object]) -> Iterator[str]:
    """Both ends of every allowed connection allow it, and every rule concerns somebody."""
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    own = list(pods_of(objects))
    runs = next((item for item in policies if item["metadata"]["name"] == "spin-runs"), None)
    if runs is None:
        yield "NetworkPolicy/spin-runs: what runs may reach"
        return
    runs_pod = Pod("run", namespace_of(runs), {"pipelines.kubeflow.org/v2_component": "true"}, {})
    nodes = [Pod(f"train-node-{place}", namespace_of(runs), POD_LABELS, {}) for place in range(2)]
    everyone = [*own, runs_pod, *nodes, *OUTSIDE]

    def rules(pod: Pod, direction: str) -> list[tuple[Object, Object]] | None:
        """Return the rules that hold for a pod; None: it is not isolated."""
        chosen = [
            policy
            for policy in policies
            if namespace_of(policy) == pod.namespace
            and matches(policy["spec"]["podSelector"], pod.labels)
            and direction.capitalize() in policy["spec"]["policyTypes"]
        ]
        if not chosen:
            return None
        return [(policy, rule) for policy in chosen for rule in policy["spec"].get(direction, [])]

    def allowed(pod: Pod, direction: str, other: Pod, port: int | None) -> bool:
        found = rules(pod, direction)
        side = "from" if direction == "ingress" else "to"
        return found is None or any(
            any(_is_peer(peer, policy, other) for peer in rule.get(side, []))
            and (port is None or port in [entry["port"] for entry in rule.get("ports", [{"port": port}])])
            for policy, rule in found
        )

    for pod in own:
        if rules(pod, "ingress") is None or rules(pod, "egress") is None:
            yield f"{pod.name}: denied by default"
    one, other = nodes
    if (
        rules(one, "ingress") is None
        or not allowed(one, "egress", other, None)
        or not allowed(one, "ingress", other, None)
    ):
        yield "nodes that train together: reach each other, and nobody else them"
    for direction, opposite, side in (("ingress", "egress", "from"), ("egress", "ingress", "to")):
        for policy in policies:
            selected = [
                pod
                for pod in everyone
                if pod.namespace == namespace_of(policy) and matches(policy["spec"]["podSelector"], pod.labels)
            ]
            for rule in policy["spec"].get(direction, []):
                ports = [entry["port"] for entry in rule.get("ports", [])] or [None]
                for peer in rule[side]:
                    if "ipBlock" in peer:
                        continue
                    # A rule for a whole namespace, such as Kubeflow's, does not mean the nodes that are there too.
                    named = [*own, runs_pod, *OUTSIDE] if "namespaceSelector" in peer else everyone
                    others = [pod for pod in named if _is_peer(peer, policy, pod)]
                    if not others or not selected:
                        yield f"{name_of(policy)}: nobody at one end of {peer}"
                    for pod in selected:
                        for other in others:
                            if pod != other and not any(allowed(other, opposite, pod, port) for port in ports):
                                yield f"{name_of(policy)}: {direction} of {pod.name} is not allowed by {other.name}"
                    target = selected if direction == "ingress" else others
                    for pod in (pod for pod in target if pod in own):
                        if not {*pod.ports.values()} & {*ports}:
                            yield f"{name_of(policy)}: {pod.name} listens on none of {ports}"
