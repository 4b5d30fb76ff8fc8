"""Uploads and runs with the real kfp client, against a server that holds it to the generated API."""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import pytest
import yaml
from kfp import compiler, dsl, kubernetes

from components.settings import DEFAULT_IMAGE
from pipelines import upload as uploads
from pipelines.upload import Client, connect, run, upload, version_name
from spin import __version__
from spin.errors import SpinError
from tests.integration.kfp_contract import ContractServer, operations, serving

pytestmark = pytest.mark.integration

VERSION = "v0.1.0-g1a2b3c4"
PIPELINE_NAME = "spin-diffusion"
GOLDEN = Path(__file__).parents[1] / "golden"


@dsl.component(base_image="python:3.11-slim")
def prepare(rows: int) -> int:
    return rows


@dsl.component(base_image="python:3.11-slim")
def train(rows: int, name: str) -> str:
    return f"{name} {rows}"


@dsl.pipeline(name=PIPELINE_NAME)
def two_tasks(name: str, rows: int = 8) -> None:
    prepared = prepare(rows=rows)
    trained = train(rows=prepared.output, name=name)
    kubernetes.add_node_selector(trained, label_key="accelerator", label_value="gpu")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "pipeline.yaml"
    compiler.Compiler().compile(two_tasks, str(path))
    assert len(list(yaml.safe_load_all(path.read_text()))) == 2
    return path


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KFP_HOST", "KFP_TOKEN", "KFP_COOKIE", "KFP_NAMESPACE", "KFP_CA_CERT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "none.json"))


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with serving() as contract:
        yield contract


@pytest.fixture
def client(server: ContractServer) -> Client:
    return connect(server.url)


def refusal(error: pytest.ExceptionInfo[SpinError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_contract_is_the_whole_generated_api(server: ContractServer) -> None:
    assert len(operations()) >= 40
    assert {"upload_pipeline", "upload_pipeline_version", "run_service_create_run"} <= {op.name for op in operations()}

    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}/apis/v2beta1/nothing")
    request = urllib.request.Request(
        f"{server.url}/apis/v2beta1/pipelines", json.dumps({"name": "p", "colour": "red"}).encode()
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert len(server.violations) == 2
    assert "a field of V2beta1Pipeline" in server.violations[1]


def test_first_upload_creates_the_pipeline_and_names_its_version(
    server: ContractServer, client: Client, package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = upload(client, package, version=VERSION)

    assert done.created
    (pipeline,) = server.pipelines.values()
    (version,) = server.versions.values()
    assert (pipeline["name"], pipeline["display_name"]) == (PIPELINE_NAME, PIPELINE_NAME)
    assert (version["name"], version["display_name"]) == (VERSION, VERSION) == (done.version_name, VERSION)
    assert (version["pipeline_id"], version["pipeline_version_id"]) == (done.pipeline_id, done.version_id)
    assert done.url == f"{server.url}/#/pipelines/details/{done.pipeline_id}/version/{done.version_id}"
    (sent,) = [request for request in server.received if request.operation == "upload_pipeline_version"]
    assert sent.files["uploadfile"] == package.read_bytes()
    assert sent.query == {"name": VERSION, "pipelineid": done.pipeline_id}
    assert "nodeSelector" in json.dumps(version["pipeline_spec"]["platform_spec"])
    assert server.violations == []
    assert capfd.readouterr() == ("", "")


def test_an_existing_pipeline_gets_another_version(server: ContractServer, client: Client, package: Path) -> None:
    first = upload(client, package, version=VERSION)
    second = upload(client, package, version="v0.1.0-g5d6e7f8")

    assert (first.created, second.created) == (True, False)
    assert second.pipeline_id == first.pipeline_id
    assert [version["name"] for version in server.versions.values()] == [VERSION, "v0.1.0-g5d6e7f8"]
    assert len(server.pipelines) == 1
    assert server.violations == []


def test_each_pipeline_has_versions_of_its_own(server: ContractServer, client: Client, tmp_path: Path) -> None:
    """Both compiled files at one commit; a run of one is never a run of the other."""
    names = ("spin-diffusion", "spin-comparison")
    for name in names:
        text = (GOLDEN / f"{name}.yaml").read_text()
        (tmp_path / name).write_text(text.replace(DEFAULT_IMAGE, "registry.example/team/spin:1"))
    done = {name: upload(client, tmp_path / name, version=VERSION, reuse=True) for name in names}
    again = {name: upload(client, tmp_path / name, version=VERSION, reuse=True) for name in names}

    assert [pipeline["name"] for pipeline in server.pipelines.values()] == list(names)
    assert [version["name"] for version in server.versions.values()] == [VERSION, VERSION]
    for name in names:
        assert done[name].created
        assert again[name].reused
        assert again[name].version_id == done[name].version_id
        uploaded = server.versions[done[name].version_id]
        assert uploaded["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == name
        assert server.pipelines[done[name].pipeline_id]["name"] == name
    assert server.violations == []


@pytest.mark.parametrize("name", ["spin-diffusion", "spin-comparison"])
def test_an_image_that_nobody_has_pushed_is_refused(server: ContractServer, client: Client, name: str) -> None:
    server.received.clear()

    with pytest.raises(
        SpinError, match=f"got {DEFAULT_IMAGE} .*; nothing was uploaded: set SPIN_RUNTIME_IMAGE "
    ) as error:
        upload(client, GOLDEN / f"{name}.yaml", version=VERSION)

    refusal(error)
    assert server.received == []


def test_an_existing_version_is_refused_and_nothing_is_uploaded(
    server: ContractServer, client: Client, package: Path
) -> None:
    first = upload(client, package, version=VERSION)
    server.received.clear()

    with pytest.raises(SpinError) as error:
        upload(client, package, version=VERSION)

    message = refusal(error)
    assert VERSION in message
    assert first.url in message
    assert "commit your changes or bump" in message
    assert server.calls() == ["pipeline_service_list_pipelines", "pipeline_service_list_pipeline_versions"]
    assert len(server.versions) == 1


def test_a_run_takes_the_version_that_is_there(server: ContractServer, client: Client, package: Path) -> None:
    first = upload(client, package, version=VERSION)
    again = upload(client, package, version=VERSION, reuse=True)
    assert (again.version_id, again.created, again.reused) == (first.version_id, False, True)
    assert len(server.versions) == 1


def test_a_version_with_uncommitted_changes_is_never_taken_for_another(client: Client, package: Path) -> None:
    upload(client, package, version=f"{VERSION}-dirty")
    with pytest.raises(SpinError, match=r"^expected a new version name"):
        upload(client, package, version=f"{VERSION}-dirty", reuse=True)


def test_a_version_that_appears_meanwhile_is_a_conflict(
    server: ContractServer, client: Client, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(client, package, version=VERSION)
    nothing = kfp_server_api.V2beta1ListPipelineVersionsResponse()
    monkeypatch.setattr(client, "list_pipeline_versions", lambda *_, **__: nothing)

    with pytest.raises(SpinError, match="409 Conflict, Already exist error"):
        upload(client, package, version=VERSION)

    assert (len(server.pipelines), len(server.versions)) == (1, 1)


def test_upload_pipeline_names_the_first_version_after_the_pipeline(
    server: ContractServer, client: Client, package: Path
) -> None:
    """Why `upload` does not use it; a duplicate pipeline is a 409."""
    client.upload_pipeline(str(package), PIPELINE_NAME)

    assert [version["name"] for version in server.versions.values()] == [PIPELINE_NAME]
    with pytest.raises(kfp_server_api.ApiException) as error:
        client.upload_pipeline(str(package), PIPELINE_NAME)
    assert error.value.status == 409


@pytest.mark.parametrize("status", [500, 503])
def test_a_failing_server_is_one_line(server: ContractServer, client: Client, package: Path, status: int) -> None:
    server.failing["*"] = status

    with pytest.raises(SpinError) as error:
        upload(client, package, version=VERSION)

    message = refusal(error)
    assert str(status) in message
    assert server.url in message
    assert "told to fail" in message
    with pytest.raises(SpinError, match=f"cannot connect .*{status}"):
        connect(server.url)


def test_a_failed_first_upload_leaves_no_empty_pipeline(server: ContractServer, client: Client, package: Path) -> None:
    server.failing["upload_pipeline_version"] = 500

    with pytest.raises(SpinError, match="500 Internal Server Error, told to fail"):
        upload(client, package, version=VERSION)

    assert server.calls()[-1] == "pipeline_service_delete_pipeline"
    assert server.pipelines == {}
    server.failing.clear()
    assert upload(client, package, version=VERSION).created


def test_a_failed_upload_keeps_a_pipeline_that_was_there(server: ContractServer, client: Client, package: Path) -> None:
    upload(client, package, version=VERSION)
    server.failing["upload_pipeline_version"] = 500

    with pytest.raises(SpinError):
        upload(client, package, version="v0.1.0-g5d6e7f8")

    assert (len(server.pipelines), len(server.versions)) == (1, 1)


def test_the_token_that_the_server_demands(
    server: ContractServer, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "good-token"

    with pytest.raises(SpinError) as missing:
        connect(server.url)
    assert "401 Unauthorized" in refusal(missing)
    assert "KFP_TOKEN" in refusal(missing)

    with pytest.raises(SpinError) as bad:
        connect(server.url, token="bad-token")
    assert "403 Forbidden" in refusal(bad)
    assert "bad-token" not in refusal(bad)

    # As read from a file, with the line's end.
    monkeypatch.setenv("KFP_TOKEN", "good-token\n")
    assert upload(connect(server.url), package, version=VERSION).created
    assert server.received[-1].headers["authorization"] == "Bearer good-token"


def test_a_pods_service_account_token_is_used_and_read_anew(
    server: ContractServer, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    server.token = "first"
    client = connect(server.url)
    token.write_text("rotated\n")
    server.token = "rotated"

    assert upload(client, package, version=VERSION).created


def test_a_cookie_and_a_namespace_reach_the_server(
    server: ContractServer, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.multi_user = True
    with pytest.raises(SpinError, match="set KFP_NAMESPACE"):
        connect(server.url)

    monkeypatch.setenv("KFP_COOKIE", "authservice_session=abc")
    monkeypatch.setenv("KFP_NAMESPACE", "team")
    client = connect(server.url)
    done = upload(client, package, version=VERSION)
    run(client, done, "spin", "first", {"name": "x"})

    assert not upload(client, package, version="other").created
    assert server.pipelines[done.pipeline_id]["namespace"] == "team"
    assert [experiment["namespace"] for experiment in server.experiments.values()] == ["team"]
    assert server.received[-1].headers["cookie"] == "authservice_session=abc"
    assert server.violations == []


@pytest.mark.parametrize("operation", ["*", "pipeline_service_create_pipeline", "upload_pipeline_version"])
def test_a_login_page_is_no_answer(server: ContractServer, package: Path, operation: str) -> None:
    server.login_page = frozenset({operation})

    with pytest.raises(SpinError, match=r"a login page\?\); set KFP_TOKEN or KFP_COOKIE") as error:
        upload(connect(server.url), package, version=VERSION)

    refusal(error)
    assert server.pipelines == {}


def test_no_server_at_all(package: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with serving() as gone:
        client = connect(gone.url)

    with pytest.raises(SpinError, match=f"KFP server {gone.url} cannot be reached: .*Connection refused") as error:
        upload(client, package, version=VERSION)
    refusal(error)
    with pytest.raises(SpinError, match=r"cannot be reached: .*Connection refused") as error:
        connect(gone.url.replace("://", "://user:secret@"))
    assert "secret" not in refusal(error)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_tls_trouble_names_the_certificate_setting(server: ContractServer, tmp_path: Path) -> None:
    secure = server.url.replace("http://", "https://")
    with pytest.raises(SpinError, match=r"cannot be reached: .*SSL.*KFP_CA_CERT") as error:
        connect(secure)
    refusal(error)

    garbage = tmp_path / "ca.pem"
    garbage.write_text("no certificate")
    with pytest.raises(SpinError, match="KFP_CA_CERT"):
        connect(secure, ca_cert=garbage)
    with pytest.raises(SpinError, match="got no file"):
        connect(secure, ca_cert=tmp_path / "none.pem")


@pytest.mark.parametrize(("host", "expected"), [(None, "set KFP_HOST"), ("localhost:8080", "http:// or https://")])
def test_an_unusable_host(host: str | None, expected: str) -> None:
    with pytest.raises(SpinError, match=expected):
        connect(host)


def test_run_passes_its_parameters(
    server: ContractServer, client: Client, package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = upload(client, package, version=VERSION)
    params = {"name": "näme", "rows": 3}

    started = run(client, done, "spin", "first run", params, pipeline_root="s3://bucket/root", service_account="runner")
    again = run(client, done, "spin", "second run", params)

    assert started.url == f"{server.url}/#/runs/details/{started.run_id}"
    assert [run["experiment_id"] for run in server.runs.values()] == list(server.experiments) * 2
    body = server.runs[started.run_id]
    assert body["display_name"] == "first run"
    assert body["runtime_config"] == {"parameters": params, "pipeline_root": "s3://bucket/root"}
    assert body["service_account"] == "runner"
    assert body["pipeline_version_reference"] == {
        "pipeline_id": done.pipeline_id,
        "pipeline_version_id": done.version_id,
    }
    assert client.get_user_namespace() == ""
    assert again.run_id in server.runs
    assert server.violations == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("params", "expected"), [({"name": "x", "nope": 1}, "not required by pipeline: nope"), ({}, "name is not optional")]
)
def test_run_refuses_wrong_parameters(
    server: ContractServer, client: Client, package: Path, params: dict[str, Any], expected: str
) -> None:
    done = upload(client, package, version=VERSION)

    with pytest.raises(SpinError, match=f"cannot start run first .*400 Bad Request.*{expected}") as error:
        run(client, done, "spin", "first", params)

    refusal(error)
    assert server.runs == {}


@pytest.mark.parametrize(
    "text",
    [
        "a: [unclosed",
        "",
        "{}",
        "- a list",
        "pipelineInfo: {name: p}\ncolour: red\n",
        "pipelineInfo: {name: p}\n---\ncolour: red\n",
    ],
    ids=["unclosed", "empty", "no-name", "list", "unknown-field", "unknown-platform-field"],
)
def test_a_broken_package_is_refused_before_and_by_the_server(
    server: ContractServer, client: Client, tmp_path: Path, text: str
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(text)
    server.received.clear()

    with pytest.raises(SpinError, match=r"expected a compiled pipeline, got .*broken\.yaml") as error:
        upload(client, broken, version=VERSION)
    refusal(error)
    assert server.received == []

    with pytest.raises(kfp_server_api.ApiException) as refused:
        client.upload_pipeline(str(broken), PIPELINE_NAME)
    assert refused.value.status == 400
    assert server.pipelines == {}


def test_a_missing_package(client: Client, tmp_path: Path) -> None:
    with pytest.raises(SpinError, match=r"No such file or directory .*none\.yaml"):
        upload(client, tmp_path / "none.yaml", version=VERSION)


def test_version_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_ROOT", tmp_path.resolve())
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert version_name() == f"v{__version__}"

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked = tmp_path / "tracked"
    tracked.write_text("1")
    git("init", "--quiet")
    assert version_name() == f"v{__version__}"
    git("add", "tracked")
    git("commit", "--quiet", "--message", "first")
    clean = f"v{__version__}-g{git('rev-parse', '--short=7', 'HEAD')}"
    (tmp_path / "untracked").touch()
    assert version_name() == clean
    tracked.write_text("2")
    assert version_name() == f"{clean}-dirty"

    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.setattr(uploads, "_ROOT", inner.resolve())
    assert version_name() == f"v{__version__}"
