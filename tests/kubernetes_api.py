"""A Kubernetes API server as far as preflight asks one: nodes and quotas over HTTP, for the real client."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

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


@contextmanager
def api_server(
    folder: Path,
    nodes: list[dict[str, Any]],
    quotas: Sequence[dict[str, Any]] = (),
    status: int = 200,
) -> Iterator[Path]:
    """Serve the lists to whoever shows the token; give the kubeconfig that leads there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            lists = {"/api/v1/nodes": ("NodeList", nodes), "/api/v1/namespaces/runs/resourcequotas": ("", quotas)}
            code = status if self.headers.get("Authorization") == "Bearer token-of-the-run" else 401
            kind, items = lists.get(path, ("", None))
            if items is None:
                code = 404
            body = {"kind": kind or "ResourceQuotaList", "apiVersion": "v1", "metadata": {}, "items": list(items)}
            data = json.dumps(body if code == 200 else {"kind": "Status", "code": code}).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
