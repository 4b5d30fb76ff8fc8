"""A faulty way to a real S3 or MLflow server: it forwards every request, but for the faults that a test asks for."""

import http.client
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What the server said, or what the proxy makes of it."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    send: int | None = None
    """Bytes of the body to send before the connection is cut; ``None``: all."""


@dataclass
class Request:
    """What the client asked for."""

    method: str
    path: str
    body: bytes


Fault = Callable[[Request, Callable[[], Answer]], Answer]
"""Given the request and the way to the server: what the client gets."""


def s3_error(status: int, code: str) -> Answer:
    """Return an error as an S3 server words it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return Answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)


def mlflow_error(status: int, code: str) -> Answer:
    """Return an error as an MLflow server words it."""
    body = json.dumps({"error_code": code, "message": f"{code}, says the server"}).encode()
    return Answer(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))], body)


class Proxy:
    """Listens on a port of its own; ``fault`` decides on every answer, and may be changed at any time.

    The client signs the proxy's host, which is forwarded as it came, so the server accepts the signature.
    """

    def __init__(self, endpoint: str):
        self.upstream = endpoint.removeprefix("http://")
        self.fault: Fault = lambda _, forward: forward()
        self.seen: list[Request] = []
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.listen()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def listens(self) -> bool:
        return self._server is not None

    def refuse(self) -> None:
        """Stop to listen: connections are refused from now on."""
        assert self._server
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    def refuse_for(self, seconds: float) -> None:
        self.refuse()
        threading.Timer(seconds, self.listen).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                request = Request(self.command, self.path, self.rfile.read(length))
                with proxy._lock:
                    proxy.seen.append(request)
                answer = proxy.fault(request, lambda: self.forward(request))
                self.send_response_only(answer.status)
                for name, value in answer.headers:
                    self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.send])

            do_GET = do_PUT = do_HEAD = do_POST = do_PATCH = do_DELETE = answer

            def forward(self, request: Request) -> Answer:
                connection = http.client.HTTPConnection(proxy.upstream, timeout=60)
                try:
                    connection.request(request.method, request.path, request.body or None, dict(self.headers))
                    came = connection.getresponse()
                    hop = {"connection", "transfer-encoding", "keep-alive"}
                    body = came.read()
                    headers = [(name, value) for name, value in came.getheaders() if name.lower() not in hop]
                    if "content-length" not in {name.lower() for name, _ in headers}:
                        headers.append(("Content-Length", str(len(body))))
                    return Answer(came.status, headers, body)
                finally:
                    connection.close()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def after(passed: int, fault: Fault, method: str = "", count: float = math.inf) -> Fault:
    """Return ``fault`` for ``count`` requests (of ``method``), once ``passed`` of them have passed."""
    seen, lock = [0], threading.Lock()

    def decide(request: Request, forward: Callable[[], Answer]) -> Answer:
        with lock:
            meant = request.method == (method or request.method)
            strikes = meant and passed <= seen[0] < passed + count
            seen[0] += meant
        return fault(request, forward) if strikes else forward()

    return decide


def first(count: int, fault: Fault, method: str = "") -> Fault:
    """Return ``fault`` for the first ``count`` requests (of ``method``), then none."""
    return after(0, fault, method, count)


def says(status: int, code: str) -> Fault:
    return lambda *_: s3_error(status, code)


def slow(seconds: float) -> Fault:
    def decide(_: Request, forward: Callable[[], Answer]) -> Answer:
        time.sleep(seconds)
        return forward()

    return decide


def cut(_: Request, forward: Callable[[], Answer]) -> Answer:
    """Send half of the body, then end the connection."""
    answer = forward()
    answer.send = len(answer.body) // 2
    return answer


def flip(_: Request, forward: Callable[[], Answer]) -> Answer:
    """Change a byte of the body on its way to the client."""
    answer = forward()
    if answer.body:
        answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]
    return answer


def flip_upload(request: Request, forward: Callable[[], Answer]) -> Answer:
    """Change a byte of the body on its way to the server."""
    if request.body:
        request.body = bytes([request.body[0] ^ 1]) + request.body[1:]
    return forward()


@dataclass
class Hidden:
    """A server that shows new objects only some seconds after they were written."""

    seconds: float
    written: dict[str, float] = field(default_factory=dict)

    def __call__(self, request: Request, forward: Callable[[], Answer]) -> Answer:
        path = request.path.split("?")[0]
        if request.method == "PUT":
            self.written[path] = time.monotonic()
        elif request.method in ("GET", "HEAD") and time.monotonic() < self.written.get(path, -1e9) + self.seconds:
            return s3_error(404, "NoSuchKey")
        return forward()
