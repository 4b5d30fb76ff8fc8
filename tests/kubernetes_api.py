"""A Kubernetes API server as far as a run asks one: nodes, quotas and TrainJobs over HTTP, for the real client."""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubeflow_trainer_api import models
from pydantic import ValidationError

from spin.cluster import RUNTIME

A100 = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


def node(
    name: str,
    labels: dict[str, str] | None = None,
    gpus: int = 0,
    taints: list[dict[str, str]] | None = None,
    ready: bool = True,
    **allocatable: str,
) -> dict[str, Any]:
    """Return a node as the server lists it."""
    amounts = {"cpu": "16", "memory": "128Gi", "ephemeral-storage": "500Gi"} | allocatable
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/arch": "amd64"} | (labels or {})},
        "spec": {"taints": taints or []},
        "status": {
            "allocatable": amounts,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def quota(resource: str, hard: str, used: str) -> dict[str, Any]:
    """Return a quota as the server lists it."""
    return {"metadata": {"name": "quota"}, "status": {"hard": {resource: hard}, "used": {resource: used}}}


def schema_fault(document: dict[str, Any]) -> str:
    """Return what of a TrainJob its published API (package ``kubeflow-trainer-api``) does not know or allow."""
    try:
        known = models.TrainerV1alpha1TrainJob.from_dict(document)
    except (ValidationError, ValueError, KeyError) as error:
        return f"invalid: {error}"
    if unknown := _lost(document, known.to_dict() if known else {}):
        return f"strict decoding error: unknown field {unknown}"
    # What the models do not say: rules of the CRD and of Trainer's webhook.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"]):
        return "metadata.name: must be a DNS-1035 label"
    for patch in document["spec"].get("runtimePatches", []):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            for container in job["template"]["spec"]["template"]["spec"].get("containers", []):
                if container["name"] == "node" and "env" in container:
                    return "must not have envs for the node container"
    return ""


def _lost(given: Any, kept: Any, where: str = "") -> str:
    """Return the first field of ``given`` that is not in ``kept``."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                return f"{where}{key}"
            if lost := _lost(value, kept[key], f"{where}{key}."):
                return lost
    elif isinstance(given, list) and isinstance(kept, list):
        for number, (ours, theirs) in enumerate(zip(given, kept, strict=True)):
            if lost := _lost(ours, theirs, f"{where}{number}."):
                return lost
    return ""


Step = Callable[["Trainer", dict[str, Any]], None]


class Trainer:
    """Kubeflow Trainer: TrainJobs as clients make them, and pods and states as ``play`` makes them, a step per look."""

    def __init__(self, play: Iterable[Step] = (), installed: bool = True) -> None:
        self.play, self.installed = iter(play), installed
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[str]] = {}
        self.log_status = 200
        self.asked: list[tuple[str, str]] = []
        launcher = {"containers": [{"name": "wait", "image": "argo"}, {"name": "main", "image": "spin:1"}]}
        self.pods["launcher"] = {"metadata": {"name": "launcher", "uid": "uid-1"}, "spec": launcher}

    @property
    def made(self) -> list[str]:
        """The changes that clients asked for, in order."""
        return [method for method, _ in self.asked if method != "GET"]

    def set_pod(self, job: dict[str, Any], node: int, phase: str, attempt: int = 0, **status: Any) -> str:
        """Make or change a node's pod; return its name."""
        name = job["metadata"]["name"]
        pod = f"{name}-node-0-{node}-{attempt}"
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(node),
        }
        self.pods[pod] = {
            "metadata": {"name": pod, "labels": labels, "creationTimestamp": f"2026-01-01T00:00:{attempt:02d}Z"},
            "spec": {"containers": [{"name": "node"}]},
            "status": {"phase": phase, **status},
        }
        return pod

    def end(self, job: dict[str, Any], word: str, reason: str = "", message: str = "") -> None:
        """Set a condition of a TrainJob."""
        now = "2026-01-01T00:01:00Z"
        condition = {"type": word, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now}
        job["status"] = {"conditions": [condition]}

    def answer(self, method: str, url: str, body: Any, kind: str) -> tuple[int, Any]:
        """Return status and body; a body that is text is sent as it is."""
        self.asked.append((method, url))
        path, query = urlsplit(url).path, {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}
        api = "/apis/trainer.kubeflow.org/v1alpha1"
        jobs, pods = f"{api}/namespaces/runs/trainjobs", "/api/v1/namespaces/runs/pods"
        if path.startswith(api) and not self.installed:
            return 404, _status(404, "the server could not find the requested resource")
        if path.rstrip("/") == api:
            return 200, {"kind": "APIResourceList", "groupVersion": api.removeprefix("/apis/"), "resources": []}
        if path == f"{api}/clustertrainingruntimes/{RUNTIME}":
            return 200, {"kind": "ClusterTrainingRuntime"}
        if path == pods:
            wanted = [term.split("=") for term in query["labelSelector"].split(",")]
            found = [pod for pod in self.pods.values() if all(self._label(pod, key) == value for key, value in wanted)]
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found}
        if path.startswith(f"{pods}/"):
            name, _, part = path.removeprefix(f"{pods}/").partition("/")
            if name not in self.pods:
                return 404, _status(404, f'pods "{name}" not found')
            if part == "log":
                if self.log_status != 200:
                    return self.log_status, _status(self.log_status, f'container "node" in pod "{name}" has no log')
                lines = [f"2026-01-01T00:00:00.{n:09d}Z {line}" for n, line in enumerate(self.logs.get(name, []), 1)]
                return 200, "".join(f"{line}\n" for line in lines[-int(query.get("tailLines", len(lines) or 1)) :])
            return 200, self.pods[name]
        if path == jobs and method == "POST":
            if fault := schema_fault(body):
                return 400, _status(400, fault)
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, _status(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
            self.jobs[name] = body
            return 201, body
        name = path.removeprefix(f"{jobs}/")
        if path == jobs or name not in self.jobs:
            return 404, _status(404, f'"{name}" not found')
        if method == "DELETE":
            self.pods = {key: pod for key, pod in self.pods.items() if not key.startswith(f"{name}-")}
            return 200, self.jobs.pop(name)
        if method == "PATCH":
            if kind != "application/merge-patch+json" or set(body) != {"metadata"}:
                return 415, _status(415, kind)
            self.jobs[name]["metadata"].update(body["metadata"])
            return 200, self.jobs[name]
        job = self.jobs[name]
        if step := next(self.play, None):
            step(self, job)
        return (200, job) if name in self.jobs else (404, _status(404, f'"{name}" not found'))

    def _label(self, pod: dict[str, Any], key: str) -> str:
        value: str = pod["metadata"].get("labels", {}).get(key, "")
        return value


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "code": code, "message": message}


@contextmanager
def api_server(
    folder: Path,
    nodes: list[dict[str, Any]],
    quotas: Sequence[dict[str, Any]] = (),
    status: int = 200,
    trainer: Trainer | None = None,
) -> Iterator[Path]:
    """Serve the lists, and what ``trainer`` holds, to whoever shows the token; give the kubeconfig that leads there."""
    trainer = trainer or Trainer()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = self.path.partition("?")[0]
            lists = {"/api/v1/nodes": ("NodeList", nodes), "/api/v1/namespaces/runs/resourcequotas": ("", quotas)}
            kind, items = lists.get(path, ("", None))
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body: Any
            if self.headers.get("Authorization") != "Bearer token-of-the-run":
                code, body = 401, _status(401, "Unauthorized")
            elif status != 200:
                code, body = status, _status(status, "refused")
            elif items is not None:
                body = {"kind": kind or "ResourceQuotaList", "apiVersion": "v1", "metadata": {}, "items": list(items)}
                code = 200
            else:
                received = json.loads(sent) if sent else None
                code, body = trainer.answer(self.command, self.path, received, self.headers.get("Content-Type", ""))
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {"token": "token-of-the-run"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    try:
        (folder / "kubeconfig").write_text(yaml.safe_dump(config))
        yield folder / "kubeconfig"
    finally:
        server.shutdown()
        server.server_close()
