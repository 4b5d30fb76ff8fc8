"""An HTTP server that holds a KFP client to the API which kfp_server_api was generated from.

Methods, paths, query parameters, bodies and answers are not written down here: they are read at run time from the
generated operations and models, and anything outside of them is refused. What is added is the behaviour that the
clients under test rely on: names are unique, an upload must parse as a PipelineSpec, a run's parameters must be
inputs of its pipeline. Nothing is scheduled, so a pass means that client and API agree, not that a pipeline runs.
"""

import inspect
import json
import re
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

JsonObject = dict[str, Any]

_PRIMITIVES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "datetime": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


@dataclass(frozen=True)
class Operation:
    """One generated operation: what it sends where, and what it expects back."""

    name: str
    method: str
    path: str
    query: frozenset[str]
    body: str | None
    files: frozenset[str]
    answer: str | None

    @property
    def pattern(self) -> re.Pattern[str]:
        literals = re.split(r"\{[^}]+\}", self.path)
        return re.compile("([^/:]+)".join(map(re.escape, literals)))


class _Recorder(kfp_server_api.ApiClient):
    """Takes the place of the transport, so that calling a generated method tells what it would send."""

    call: JsonObject

    def call_api(self, resource_path: str, method: str, *args: Any, **options: Any) -> None:
        path_params, query_params, _headers = args
        self.call = {"path": resource_path, "method": method, "query": query_params, "path_params": path_params}
        self.call |= options


@cache
def operations() -> tuple[Operation, ...]:
    """All generated operations, literal paths before templated ones."""
    found = []
    api: Any
    for api_name, api in inspect.getmembers(kfp_server_api.api, inspect.isclass):
        if not api_name.endswith("ServiceApi"):
            continue
        for name, _ in inspect.getmembers(api, inspect.isfunction):
            if name.startswith("_") or name.endswith("_with_http_info"):
                continue
            configuration = kfp_server_api.Configuration()
            configuration.client_side_validation = False
            recorder = _Recorder(configuration)
            method = getattr(api(recorder), name)
            types = dict(re.findall(r":type (\w+): (\S+)", method.__doc__))
            parameters = {key: key for key in types if key != "async_req" and not key.startswith("_")}
            method(**parameters)
            call = recorder.call
            body = call["body"]
            found.append(
                Operation(
                    name=name,
                    method=call["method"],
                    path=call["path"],
                    query=frozenset(wire for wire, _ in call["query"]),
                    body=types[body] if body else None,
                    files=frozenset(call["files"]),
                    answer=call["response_type"],
                )
            )
    return tuple(sorted(found, key=lambda operation: operation.path.count("{")))


def conforms(value: Any, kind: str, where: str = "body") -> None:
    """Raises ValueError unless `value` is JSON of the generated type `kind`, with known fields only."""
    if listed := re.fullmatch(r"list\[(.+)\]", kind):
        _expect(isinstance(value, list), where, kind, value)
        for index, item in enumerate(value):
            conforms(item, listed[1], f"{where}[{index}]")
    elif mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
        _expect(isinstance(value, dict), where, kind, value)
        for key, item in value.items():
            conforms(item, mapped[1], f"{where}.{key}")
    elif kind in _PRIMITIVES:
        _expect(type(value) in _PRIMITIVES[kind], where, kind, value)
    elif kind != "object":
        model = getattr(kfp_server_api.models, kind)
        if allowed := getattr(model, "allowable_values", None):
            _expect(value in allowed, where, f"one of {allowed}", value)
            return
        _expect(isinstance(value, dict), where, kind, value)
        types = {wire: model.openapi_types[name] for name, wire in model.attribute_map.items()}
        for key, item in value.items():
            _expect(key in types, f"{where}.{key}", f"a field of {kind}", item)
            conforms(item, types[key], f"{where}.{key}")


def _expect(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {got!r}")


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Received:
    """One request as the server understood it."""

    operation: str
    path: tuple[str, ...]
    query: dict[str, str]
    body: Any
    files: dict[str, bytes]
    headers: dict[str, str]


@dataclass
class ContractServer:
    """The state of the server; tests read it and set its faults."""

    url: str = ""
    token: str | None = None  # Bearer token to demand: 401 without one, 403 for another.
    failing: dict[str, int] = field(default_factory=dict)  # Operation, or "*" for all, to the status it answers.
    login_page: frozenset[str] = frozenset()  # Operations, or "*" for all, that answer with a 200 and HTML.
    multi_user: bool = False
    received: list[Received] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    pipelines: dict[str, JsonObject] = field(default_factory=dict)
    versions: dict[str, JsonObject] = field(default_factory=dict)
    experiments: dict[str, JsonObject] = field(default_factory=dict)
    runs: dict[str, JsonObject] = field(default_factory=dict)

    def calls(self) -> list[str]:
        return [request.operation for request in self.received]

    def serve(self, method: str, target: str, headers: dict[str, str], content: bytes) -> tuple[int, str, bytes]:
        """Answers one request with a status, a content type and a body."""
        operation = None
        try:
            operation, request = self._understand(method, target, headers, content)
            self.received.append(request)
            if {operation.name, "*"} & self.login_page:
                return HTTPStatus.OK, "text/html; charset=utf-8", b"<html><form>Log in</form></html>"
            self._authorize(headers)
            if status := self.failing.get(operation.name) or self.failing.get("*"):
                raise Refused(status, "told to fail")
            serve = _HANDLERS.get(operation.name)
            if serve is None:
                raise Refused(HTTPStatus.NOT_IMPLEMENTED, f"{operation.name} is in the API, but not served here")
            answer = serve(self, request)
            conforms(answer, operation.answer or "object", "answer")
            return HTTPStatus.OK, "application/json", json.dumps(answer).encode()
        except Refused as error:
            return error.status, "application/json", json.dumps(_error(operation, error)).encode()
        except ValueError as error:
            self.violations.append(f"{method} {target}: {error}")
            refused = Refused(HTTPStatus.BAD_REQUEST, str(error))
            return refused.status, "application/json", json.dumps(_error(operation, refused)).encode()

    def _understand(
        self, method: str, target: str, headers: dict[str, str], content: bytes
    ) -> tuple[Operation, Received]:
        url = urllib.parse.urlsplit(target)
        for operation in operations():
            match = operation.pattern.fullmatch(url.path)
            if match and operation.method == method:
                break
        else:
            self.violations.append(f"{method} {url.path}: not an operation of the generated client")
            raise Refused(HTTPStatus.NOT_FOUND, "Not Found")
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query)))
        _expect(query.keys() <= operation.query, "query", f"some of {sorted(operation.query)}", sorted(query))
        body, files = None, {}
        if operation.files:
            files = _multipart(headers, content)
            _expect(files.keys() == operation.files, "form", f"the files {sorted(operation.files)}", sorted(files))
        elif operation.body:
            body = json.loads(content)
            conforms(body, operation.body)
        else:
            _expect(not content, "body", "none", content)
        path = tuple(map(urllib.parse.unquote, match.groups()))
        return operation, Received(operation.name, path, query, body, files, headers)

    def _authorize(self, headers: dict[str, str]) -> None:
        if self.token is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not token:
            raise Refused(HTTPStatus.UNAUTHORIZED, "Request header error: there is no user identity header.")
        if token != self.token:
            raise Refused(HTTPStatus.FORBIDDEN, "User is not authorized.")

    def healthz(self, _: Received) -> JsonObject:
        return {"multi_user": self.multi_user, "pipeline_store": "database"}

    def list_pipelines(self, request: Received) -> JsonObject:
        namespace = request.query.get("namespace", "")
        owned = [item for item in self.pipelines.values() if item.get("namespace", "") == namespace]
        return _listed("pipelines", owned, request)

    def create_pipeline(self, request: Received) -> JsonObject:
        name = request.body.get("name") or request.body.get("display_name")
        return self._add_pipeline(name, request.body.get("display_name"), request.body.get("namespace"))

    def delete_pipeline(self, request: Received) -> JsonObject:
        (pipeline_id,) = request.path
        if any(version["pipeline_id"] == pipeline_id for version in self.versions.values()):
            raise Refused(HTTPStatus.BAD_REQUEST, f"pipeline {pipeline_id} has existing pipeline versions")
        _get(self.pipelines, pipeline_id, "pipeline")
        del self.pipelines[pipeline_id]
        return {}

    def upload_pipeline(self, request: Received) -> JsonObject:
        spec = _pipeline_spec(request.files["uploadfile"])
        pipeline = self._add_pipeline(
            request.query.get("name"), request.query.get("display_name"), request.query.get("namespace")
        )
        # As the real server does: the first version gets the pipeline's own name.
        self._add_version(pipeline["pipeline_id"], pipeline["name"], pipeline["display_name"], spec)
        return pipeline

    def upload_version(self, request: Received) -> JsonObject:
        spec = _pipeline_spec(request.files["uploadfile"])
        pipeline = _get(self.pipelines, request.query.get("pipelineid", ""), "pipeline")
        name, shown = request.query.get("name"), request.query.get("display_name")
        return self._add_version(pipeline["pipeline_id"], name, shown, spec)

    def list_versions(self, request: Received) -> JsonObject:
        (pipeline_id,) = request.path
        _get(self.pipelines, pipeline_id, "pipeline")
        owned = [version for version in self.versions.values() if version["pipeline_id"] == pipeline_id]
        return _listed("pipeline_versions", owned, request)

    def list_experiments(self, request: Received) -> JsonObject:
        self._demand_namespace(request.query.get("namespace"))
        return _listed("experiments", list(self.experiments.values()), request)

    def create_experiment(self, request: Received) -> JsonObject:
        self._demand_namespace(request.body.get("namespace"))
        _unique(self.experiments.values(), "experiment", display_name=request.body["display_name"])
        return _store(self.experiments, "experiment_id", request.body)

    def create_run(self, request: Received) -> JsonObject:
        run = request.body
        _get(self.experiments, run.get("experiment_id", ""), "experiment")
        reference = run.get("pipeline_version_reference", {})
        version = _get(self.versions, reference.get("pipeline_version_id", ""), "pipeline version")
        _expect(version["pipeline_id"] == reference.get("pipeline_id"), "pipeline_id", version["pipeline_id"], run)
        spec = version["pipeline_spec"].get("pipeline_spec") or version["pipeline_spec"]
        inputs = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = run.get("runtime_config", {}).get("parameters", {})
        if unknown := sorted(given.keys() - inputs.keys()):
            message = f"parameter(s) provided are not required by pipeline: {', '.join(unknown)}"
            raise Refused(HTTPStatus.BAD_REQUEST, message)
        for name, definition in inputs.items():
            if name not in given and "defaultValue" not in definition and not definition.get("isOptional"):
                message = f"input parameter {name} is not optional, yet has neither default value nor user value"
                raise Refused(HTTPStatus.BAD_REQUEST, message)
        return _store(self.runs, "run_id", run | {"state": kfp_server_api.V2beta1RuntimeState.PENDING})

    def _demand_namespace(self, namespace: str | None) -> None:
        if self.multi_user and not namespace:
            raise Refused(HTTPStatus.BAD_REQUEST, "Namespace cannot be empty in multi-user mode")

    def _add_pipeline(self, name: str | None, shown: str | None, namespace: str | None) -> JsonObject:
        if not name:
            raise Refused(HTTPStatus.BAD_REQUEST, "pipeline's name cannot be empty")
        _unique(self.pipelines.values(), "pipeline", name=name, namespace=namespace)
        pipeline = {"name": name, "display_name": shown or name}
        return _store(self.pipelines, "pipeline_id", pipeline | ({"namespace": namespace} if namespace else {}))

    def _add_version(self, pipeline_id: str, name: str | None, shown: str | None, spec: JsonObject) -> JsonObject:
        if not name:
            raise Refused(HTTPStatus.BAD_REQUEST, "pipeline version's name cannot be empty")
        _unique(self.versions.values(), "pipeline version", pipeline_id=pipeline_id, name=name)
        version = {"pipeline_id": pipeline_id, "name": name, "display_name": shown or name, "pipeline_spec": spec}
        return _store(self.versions, "pipeline_version_id", version)


_HANDLERS: dict[str, Callable[[ContractServer, Received], JsonObject]] = {
    "healthz_service_get_healthz": ContractServer.healthz,
    "pipeline_service_list_pipelines": ContractServer.list_pipelines,
    "pipeline_service_create_pipeline": ContractServer.create_pipeline,
    "pipeline_service_delete_pipeline": ContractServer.delete_pipeline,
    "pipeline_service_list_pipeline_versions": ContractServer.list_versions,
    "upload_pipeline": ContractServer.upload_pipeline,
    "upload_pipeline_version": ContractServer.upload_version,
    "experiment_service_list_experiments": ContractServer.list_experiments,
    "experiment_service_create_experiment": ContractServer.create_experiment,
    "run_service_create_run": ContractServer.create_run,
}


def _error(operation: Operation | None, error: Refused) -> JsonObject:
    # The upload endpoints are plain HTTP handlers; the rest answers through the gRPC gateway.
    if operation and operation.files:
        return {"error_message": str(error), "error_details": str(error)}
    return {"error": str(error), "code": error.status, "message": str(error), "details": []}


def _multipart(headers: dict[str, str], content: bytes) -> dict[str, bytes]:
    head = f"Content-Type: {headers.get('content-type', '')}\r\n\r\n".encode()
    form = message_from_bytes(head + content)
    _expect(form.get_content_type() == "multipart/form-data", "form", "multipart/form-data", form.get_content_type())
    files = {}
    parts: Any = form.get_payload()
    for part in parts:
        name = part.get_param("name", header="content-disposition")
        _expect(bool(part.get_filename()), f"form.{name}", "a file", part.get_filename())
        files[str(name)] = part.get_payload(decode=True)
    return files


def _pipeline_spec(content: bytes) -> JsonObject:
    """Parses an upload as strictly as the compiler's schema allows, into what the API shows for it."""
    try:
        spec, *platforms = yaml.safe_load_all(content)
        if not json_format.ParseDict(spec, PipelineSpec()).pipeline_info.name:
            raise ValueError("pipelineInfo.name is empty")
        for platform in platforms:
            json_format.ParseDict(platform, PlatformSpec())
    except (yaml.YAMLError, json_format.ParseError, ValueError, TypeError, AttributeError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"Failed to parse the pipeline spec: {error}") from error
    return {"pipeline_spec": spec, "platform_spec": platforms[0]} if platforms else spec


def _listed(key: str, items: list[JsonObject], request: Received) -> JsonObject:
    if text := request.query.get("filter"):
        for predicate in _predicates(text):
            field_name, wanted = predicate["key"], predicate["string_value"]
            _expect(predicate["operation"] == "EQUALS", "filter", "EQUALS, all that is served here", predicate)
            _expect(all(field_name in item for item in items), "filter.key", "a field of the items", field_name)
            items = [item for item in items if item[field_name] == wanted]
    total = len(items)
    items = items[: int(request.query.get("page_size") or 20)]
    # Protobuf's JSON leaves out what is empty.
    return {key: items, "total_size": total} if items else {}


def _predicates(text: str) -> list[JsonObject]:
    def snake(value: Any) -> Any:
        # Protobuf's JSON takes a field in either spelling, and an enum by number as well.
        if isinstance(value, dict):
            return {re.sub(r"([A-Z])", r"_\1", key).lower(): snake(item) for key, item in value.items()}
        return [snake(item) for item in value] if isinstance(value, list) else value

    parsed = snake(json.loads(text))
    for predicate in parsed["predicates"]:
        if predicate["operation"] == 1:
            predicate["operation"] = kfp_server_api.V2beta1PredicateOperation.EQUALS
    conforms(parsed, "V2beta1Filter", "filter")
    return parsed["predicates"]


def _get(items: dict[str, JsonObject], key: str, what: str) -> JsonObject:
    if key not in items:
        raise Refused(HTTPStatus.NOT_FOUND, f"{what} {key!r} not found")
    return items[key]


def _unique(items: Any, what: str, **values: Any) -> None:
    if any(all(item.get(key) == value for key, value in values.items()) for item in items):
        raise Refused(HTTPStatus.CONFLICT, f"Already exist error: {what} {values} exists")


def _store(items: dict[str, JsonObject], key: str, item: JsonObject) -> JsonObject:
    identity = str(uuid.uuid4())
    items[identity] = item | {key: identity, "created_at": datetime.now(UTC).isoformat()}
    return items[identity]


@contextmanager
def serving() -> Iterator[ContractServer]:
    """A contract server on a free port of the loopback interface."""
    contract = ContractServer()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {key.lower(): value for key, value in self.headers.items()}
            status, kind, body = contract.serve(self.command, self.path, headers, content)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        contract.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield contract
        finally:
            server.shutdown()
            thread.join()
