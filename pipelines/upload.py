"""Uploads a compiled pipeline to a Kubeflow Pipelines server as a named version, and starts runs of it."""

import contextlib
import io
import json
import logging
import os
import subprocess
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp
import kfp.client
import kfp_server_api
import urllib3.exceptions
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

from components.settings import DEFAULT_IMAGE
from spin import __version__
from spin.errors import SpinError, cause

IN_CLUSTER_HOST = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"

_ROOT = Path(__file__).resolve().parent.parent
_HINTS = {
    401: "set KFP_TOKEN (bearer token) or KFP_COOKIE (session cookie) to valid credentials",
    403: "these credentials may not do this: set KFP_NAMESPACE to a namespace they own, or use others",
    404: "set KFP_HOST to the address in front of /apis/v2beta1",
}


@dataclass(frozen=True)
class Uploaded:
    """A pipeline version on the server; `created`: the pipeline itself is new; `reused`: the version was there."""

    pipeline_id: str
    version_id: str
    version_name: str
    url: str
    created: bool
    reused: bool = False


@dataclass(frozen=True)
class RunStarted:
    run_id: str
    url: str


class Client(kfp.Client):
    """A kfp.Client whose health check fails at once and says why.

    The stock check retries for twenty seconds, logs a traceback each time, and takes a login page for an answer.
    """

    def __init__(self, host: str, **options: Any) -> None:
        self.host = _without_credentials(host)
        ui_host = os.environ.get(kfp.client.client.KF_PIPELINES_UI_ENDPOINT_ENV) or host
        self.ui = _without_credentials(ui_host) + "/#"
        super().__init__(host=host, **options)

    def get_kfp_healthz(self, sleep_duration: int = 0) -> kfp_server_api.V2beta1GetHealthzResponse:  # noqa: ARG002
        response = self.healthzs.healthz_service_get_healthz(_preload_content=False, _request_timeout=(5, 30))
        try:
            health = json.loads(response.data)
        except ValueError:
            health = None
        if not isinstance(health, dict):
            raise _no_kfp(self, response.headers.get("content-type") or "something else")
        return kfp_server_api.V2beta1GetHealthzResponse(multi_user=health.get("multi_user", False))


def version_name() -> str:
    """`v<package version>-g<commit>`, `-dirty` when tracked files differ from it; without git `v<package version>`."""
    name = f"v{__version__}"
    # A copy of this project that lies inside another repository must not take that one's commit.
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "--short=7", "HEAD")
    if not top or not commit or Path(top).resolve() != _ROOT:
        return name
    dirty = "-dirty" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{name}-g{commit}{dirty}"


def connect(
    host: str | None = None,
    *,
    token: str | None = None,
    cookie: str | None = None,
    namespace: str | None = None,
    ca_cert: Path | None = None,
) -> Client:
    """Connects to a KFP server and checks that it answers.

    What is not given comes from KFP_HOST, KFP_TOKEN, KFP_COOKIE, KFP_NAMESPACE and KFP_CA_CERT. In a pod with a
    projected KFP service-account token, that token is used and the host defaults to the in-cluster service.
    """
    # A token read from a file ends in a newline, which would be an error that quotes it.
    token = (token or os.environ.get("KFP_TOKEN") or "").strip() or None
    cookie = (cookie or os.environ.get("KFP_COOKIE") or "").strip() or None
    namespace = namespace or os.environ.get("KFP_NAMESPACE")
    ca_file = str(ca_cert or os.environ.get("KFP_CA_CERT") or "")
    sa_token = Path(os.environ.get(kfp.client.KF_PIPELINES_SA_TOKEN_ENV) or kfp.client.KF_PIPELINES_SA_TOKEN_PATH)
    in_cluster = sa_token.is_file()

    host = host or os.environ.get("KFP_HOST") or os.environ.get(kfp.client.client.KF_PIPELINES_ENDPOINT_ENV)
    if not host and in_cluster:
        host = IN_CLUSTER_HOST
    if not host:
        raise SpinError("expected the address of a KFP server, got none; set KFP_HOST, e.g. http://localhost:8080")
    host = host.rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise SpinError(
            f"expected KFP_HOST to start with http:// or https://, got {host.rpartition('@')[2]}; write it in full"
        )
    if ca_file and not Path(ca_file).is_file():
        raise SpinError(f"expected a CA certificate, got no file (KFP_CA_CERT={ca_file}); correct the path")

    options: dict[str, Any] = {"existing_token": token, "cookies": cookie, "ssl_ca_cert": ca_file or None}
    if namespace:
        options["namespace"] = namespace
    if in_cluster and not token and not cookie:
        options["credentials"] = kfp.client.ServiceAccountTokenVolumeCredentials(str(sa_token))
    with _answers(host, "connect"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = Client(host, **options)
        multi_user = client.get_kfp_healthz().multi_user
    if multi_user and not client.get_user_namespace():
        raise SpinError(f"expected a namespace, got none (KFP server {client.host} is multi-user); set KFP_NAMESPACE")
    return client


def upload(client: Client, package: Path, version: str | None = None, reuse: bool = False) -> Uploaded:
    """Uploads `package` as a new version of the pipeline that it names, which is created when the server lacks it.

    A version of that name on the server is never replaced: that is an error, and nothing is uploaded. With `reuse`
    it is taken as it is, if its name stands for one commit (`-dirty` may stand for anything).
    """
    version = version or version_name()
    name = _checked_name(package)
    namespace = client.get_user_namespace() or None

    with _answers(client.host, f"look up pipeline {name}"):
        found = client.list_pipelines(filter=_named(name), page_size=2, namespace=namespace).pipelines or []
    if len(found) > 1:
        raise SpinError(f"expected one pipeline shown as {name}, got several (KFP server {client.host}); rename one")

    created = not found
    if created:
        # POST /pipelines/upload would name the first version after the pipeline, so the pipeline is created empty.
        with _answers(client.host, f"create pipeline {name}"):
            pipeline = client.pipelines.pipeline_service_create_pipeline(
                kfp_server_api.V2beta1Pipeline(name=name, display_name=name, namespace=namespace)
            )
        pipeline_id = _id(client, pipeline.pipeline_id)
    else:
        pipeline_id = found[0].pipeline_id
        with _answers(client.host, f"list the versions of pipeline {name}"):
            same = client.list_pipeline_versions(pipeline_id, filter=_named(version), page_size=1).pipeline_versions
        if same:
            version_id = same[0].pipeline_version_id
            url = _version_url(client, pipeline_id, version_id)
            if reuse and "-g" in version and not version.endswith("-dirty"):
                return Uploaded(pipeline_id, version_id, version, url, created=False, reused=True)
            raise SpinError(
                f"expected a new version name, got {version}, which pipeline {name} already has ({url}); "
                "nothing was uploaded: commit your changes or bump spin.__version__"
            )

    try:
        # kfp.Client prints a link of its own.
        with _answers(client.host, f"add version {version} to {name}"), contextlib.redirect_stdout(io.StringIO()):
            added = client.upload_pipeline_version(str(package), version, pipeline_id=pipeline_id)
        version_id = _id(client, added.pipeline_version_id)
    except SpinError:
        if created:
            # Best effort; the server keeps a pipeline that has a version, so an upload that did land is safe.
            with contextlib.suppress(SpinError), _answers(client.host, f"remove the empty pipeline {name}"):
                client.delete_pipeline(pipeline_id)
        raise
    return Uploaded(pipeline_id, version_id, version, _version_url(client, pipeline_id, version_id), created)


def run(
    client: Client,
    uploaded: Uploaded,
    experiment: str,
    job_name: str,
    params: Mapping[str, Any],
    *,
    pipeline_root: str | None = None,
    service_account: str | None = None,
) -> RunStarted:
    """Starts a run of an uploaded version in `experiment`, which is created when the server lacks it."""
    with _answers(client.host, f"start run {job_name}"), contextlib.redirect_stdout(io.StringIO()):
        started = client.run_pipeline(
            _id(client, client.create_experiment(experiment).experiment_id),
            job_name,
            params=dict(params),
            pipeline_id=uploaded.pipeline_id,
            version_id=uploaded.version_id,
            pipeline_root=pipeline_root,
            service_account=service_account,
        )
    run_id = _id(client, started.run_id)
    return RunStarted(run_id, f"{client.ui}/runs/details/{run_id}")


def _checked_name(package: Path) -> str:
    """Returns the pipeline's name; refuses what is no compiled pipeline of ours before the server is changed."""
    try:
        spec, *platform = yaml.safe_load_all(package.read_text())
        parsed = json_format.ParseDict(spec, PipelineSpec())
        executors = spec.get("deploymentSpec", {}).get("executors", {}).values()
        images = [executor.get("container", {}).get("image") for executor in executors]
        for document in platform:
            json_format.ParseDict(document, PlatformSpec())
    except OSError as error:
        raise SpinError(f"expected a compiled pipeline, got {error.strerror} ({package}); compile it first") from error
    except (yaml.YAMLError, json_format.ParseError, ValueError, TypeError, AttributeError) as error:
        why = _one_line(str(error))
        raise SpinError(f"expected a compiled pipeline, got {why} ({package}); compile it again") from error
    if not parsed.pipeline_info.name:
        raise SpinError(f"expected a compiled pipeline, got YAML without pipelineInfo ({package}); compile it again")
    # Nodes would look for it in a public registry, and hand whatever is there the S3 keys.
    if DEFAULT_IMAGE in images:
        raise SpinError(
            f"expected an image in a registry of yours, got {DEFAULT_IMAGE} ({package}); nothing was uploaded: set "
            "SPIN_RUNTIME_IMAGE to it and compile again"
        )
    return str(parsed.pipeline_info.name)


@contextlib.contextmanager
def _answers(host: str, doing: str) -> Iterator[None]:
    """Turns what a server may answer, or its silence, into a SpinError."""
    host = _without_credentials(host)
    log = logging.getLogger("urllib3.connectionpool")
    level = log.level
    # Its retries would warn on stderr about the failure that is reported below.
    log.setLevel(logging.ERROR)
    try:
        yield
    except kfp_server_api.ApiException as error:
        message = _message(error)
        status = error.status or 0
        hint = "read the ml-pipeline server's log" if status >= 500 else _HINTS.get(status)
        if status == 404 and message:
            hint = None
        raise SpinError(
            f"cannot {doing} (KFP server {host}): {status} {_one_line(error.reason or '')}"
            + (f", {message}" if message else "")
            + (f"; {hint}" if hint else "")
        ) from error
    except urllib3.exceptions.HTTPError as error:
        if isinstance(getattr(error, "reason", None) or error, urllib3.exceptions.SSLError):
            hint = "check http:// or https:// in KFP_HOST, or set KFP_CA_CERT to its CA's certificate"
        else:
            hint = "check KFP_HOST, and that its port-forward is up"
        raise SpinError(f"KFP server {host} cannot be reached: {cause(error)}; {hint}") from error
    finally:
        log.setLevel(level)


def _message(error: kfp_server_api.ApiException) -> str:
    """The server's own words: the gateway says `message`, the upload endpoints say `error_message`."""
    try:
        body = json.loads(error.body or "")
        return _one_line(body.get("message") or body.get("error_message") or "").rstrip(".")
    except (ValueError, AttributeError):
        return ""


def _id(client: Client, value: str | None) -> str:
    # The generated client turns any 200, a login page included, into a model whose fields are all None.
    if not value:
        raise _no_kfp(client, "something else")
    return value


def _no_kfp(client: Client, got: str) -> SpinError:
    return SpinError(
        f"expected JSON of the KFP API, got {got} (KFP server {client.host}, a login page?); "
        f"set KFP_TOKEN or KFP_COOKIE, or {_HINTS[404]}"
    )


def _one_line(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _version_url(client: Client, pipeline_id: str, version_id: str) -> str:
    return f"{client.ui}/pipelines/details/{pipeline_id}/version/{version_id}"


def _without_credentials(host: str) -> str:
    parts = urllib.parse.urlsplit(host.rstrip("/"))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _git(*arguments: str) -> str:
    try:
        command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
