"""Preflight on real S3 and MLflow servers and an API server over HTTP: one set-up in order, and broken ones."""

import io
import json
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

from spin import preflight as preflight_module
from spin import store as store_module
from spin.__main__ import app
from spin.errors import SpinError
from spin.preflight import Check, Report, preflight, refuse, try_scorers_keys
from spin.stages import Place
from tests import tiny
from tests.integration.conftest import Played
from tests.integration.world import World
from tests.kubernetes_api import A100, TAINT, Trainer, api_server, node, quota

pytestmark = pytest.mark.integration
TOLERATION = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
GPU_NODE = node("gpu-1", A100, gpus=8, taints=[TAINT])
CPU_NODE = node("cpu-1")


@pytest.fixture
def check(world: World) -> Callable[..., Report]:
    def run(**changes: Any) -> Report:
        tracking_uri = changes.pop("tracking_uri", world.servers.mlflow_uri)
        options = {
            "base_model": str(world.base),
            "data_source": str(world.images),
            "overrides": tiny.overrides(world.judge),
            "iterations": 2,
            "gpu_count": 1,
            "gpu_pool": {"node_selector": A100, "tolerations": TOLERATION},
        }
        return preflight(world.place("preflight", tracking_uri), "emoji-cpu", **(options | changes))

    return run


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KFP_NAMESPACE", "runs")
    quotas = [quota("requests.nvidia.com/gpu", "8", "6")]
    with api_server(tmp_path, [CPU_NODE, GPU_NODE], quotas) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield


def failed(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks if check.verdict == "failed"}


@pytest.mark.usefixtures("cluster")
def test_a_good_set_up(world: World, check: Callable[..., Report]) -> None:
    before = world.names()

    report = check()

    verdicts = {line.name: line.verdict for line in report.checks}
    assert verdicts.pop("disk") == "skipped"
    assert set(verdicts.values()) == {"ok"}, report.markdown
    assert len(verdicts) == 11
    assert report.faults == ""
    refuse(report.faults)
    assert report.markdown.startswith("# Preflight: ready\n")
    assert "| nodes | ✓ ok | 1 node(s) fit, e.g. gpu-1 |" in report.markdown
    assert "| quota | ✓ ok | 2 requests.nvidia.com/gpu left in runs |" in report.markdown
    assert world.names() == before


def test_outside_a_cluster_it_says_so(check: Callable[..., Report]) -> None:
    report = check(gpu_count=0)

    assert failed(report) == {}
    assert "| nodes | skipped | not in a cluster |" in report.markdown
    assert "| disk | ✓ ok |" in report.markdown


def test_several_nodes_need_a_cluster(check: Callable[..., Report]) -> None:
    said = only(check(gpu_count=0, train_nodes=2), "Kubeflow Trainer")

    assert said == "expected a cluster for train_nodes above 1, got none -> set train_nodes to 1, or KUBECONFIG"


def only(report: Report, name: str) -> str:
    """Return what the one failed check says; it also says what to do, and stops the run."""
    faults = failed(report)
    assert set(faults) == {name}, report.markdown
    assert faults[name].do
    assert "1 of " in report.markdown.splitlines()[0]
    with pytest.raises(SpinError, match=name):
        refuse(report.faults)
    return f"{faults[name].found} -> {faults[name].do}"


def test_wrong_keys(check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")

    assert "check AWS_ACCESS_KEY_ID" in only(check(gpu_count=0), "S3")


def test_no_server_at_the_endpoint(world: World) -> None:
    place = world.place("preflight")
    options = (str(world.base), str(world.images), tiny.overrides(world.judge))
    moved = type(place)(place.run_key, place.store_uri, "http://127.0.0.1:1", "")

    assert "check store_endpoint" in only(preflight(moved, "emoji-cpu", *options), "S3")


def test_clocks_apart(check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz or UTC) - timedelta(seconds=300)

    monkeypatch.setattr(store_module, "datetime", Late)

    said = only(check(gpu_count=0), "S3 clock")
    assert "got +300 s" in said or "got +299 s" in said
    assert "synchronise" in said


@pytest.mark.parametrize("version", ["3.9.0", "2.1.0"])
def test_mlflows_password_is_not_shown(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_module.tracking, "server_version", lambda _: version)
    try:
        said = preflight_module._mlflow(Place("run", "s3://any", "", "http://ann:secret@mlflow:5000"))
    except SpinError as error:
        said = str(error)
    assert f"{version} at http://mlflow:5000" in said


def test_no_mlflow(check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    assert "check tracking_uri" in only(check(gpu_count=0, tracking_uri="http://127.0.0.1:1"), "MLflow")


@pytest.mark.parametrize("uri", ["sqlite:////{}/x.db", "file://{}/runs"])
def test_mlflow_is_a_server(check: Callable[..., Report], tmp_path: Path, uri: str) -> None:
    report = check(gpu_count=0, tracking_uri=uri.format(tmp_path))
    assert "expected an MLflow server like http://host:5000" in only(report, "MLflow")
    assert "set tracking_uri" in only(report, "MLflow")
    assert list(tmp_path.iterdir()) == []


def test_a_host_name_that_mlflow_does_not_know(
    world: World, check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def resolved(host: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "mlflow.mlflow" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setenv("no_proxy", "127.0.0.1,mlflow.mlflow")
    uri = world.servers.mlflow_uri.replace("127.0.0.1", "mlflow.mlflow")

    said = only(check(gpu_count=0, tracking_uri=uri), "MLflow")
    assert "Invalid Host header" in said
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" in said


def test_a_base_model_with_a_pickle(world: World, check: Callable[..., Report], tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin").touch()

    assert "pickle unet/" in only(check(gpu_count=0, base_model=str(tmp_path / "base")), "base model")


def test_a_base_model_on_s3(world: World, check: Callable[..., Report]) -> None:
    client = world.minio()
    for path in (path for path in world.base.rglob("*") if path.is_file()):
        client.fput_object("spin", f"models/tiny/{path.relative_to(world.base).as_posix()}", str(path))

    report = check(gpu_count=0, base_model="s3://spin/models/tiny")
    assert failed(report) == {}
    assert "s3://spin/models/tiny: StableDiffusionPipeline" in report.markdown

    client.fput_object("spin", "models/tiny/unet/weights.bin", str(world.base / "model_index.json"))
    assert "pickle s3://spin/models/tiny/unet/weights.bin" in only(
        check(gpu_count=0, base_model="s3://spin/models/tiny"), "base model"
    )


def test_a_prepared_run_needs_its_sources_no_more(world: World, played: Played) -> None:
    options = ("emoji-cpu", "/gone/base", "/gone/images", tiny.overrides(world.judge))

    assert failed(preflight(played.place, *options)) == {}
    assert set(failed(preflight(world.place("new"), *options))) == {"base model", "data"}


def test_data_without_captions(world: World, check: Callable[..., Report], tmp_path: Path) -> None:
    shutil.copy(next(world.images.rglob("*.png")), tmp_path / "a.png")

    assert "expected images with captions" in only(check(gpu_count=0, data_source=str(tmp_path)), "data")


def test_a_scorer_without_weights(world: World, check: Callable[..., Report], tmp_path: Path) -> None:
    shutil.copy(world.judge / "config.json", tmp_path)
    overrides = tiny.overrides(world.judge)
    overrides["score"]["clip_model"] = str(tmp_path)

    assert "set score.clip_model" in only(check(gpu_count=0, overrides=overrides), "scorer")
    overrides["score"] |= {"clip_model": "emoji", "frechet_model": str(tmp_path)}
    assert "set score.frechet_model" in only(check(gpu_count=0, overrides=overrides), "scorer")


def test_options_that_make_no_run(check: Callable[..., Report]) -> None:
    assert "did you mean 'beta'?" in only(check(gpu_count=0, overrides={"train": {"betta": 1}}), "options")


@pytest.mark.usefixtures("cluster")
def test_no_such_node(check: Callable[..., Report]) -> None:
    h100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    said = only(check(gpu_pool={"node_selector": h100, "tolerations": TOLERATION}), "nodes")

    assert "nearest is gpu-1: has nvidia.com/gpu.product=NVIDIA-A100-SXM4-80GB, not NVIDIA-H100-80GB-HBM3" in said


@pytest.mark.usefixtures("cluster")
def test_taints_that_are_not_tolerated(check: Callable[..., Report]) -> None:
    said = only(check(gpu_pool={"node_selector": A100}), "nodes")

    assert "has the taint nvidia.com/gpu=present:NoSchedule" in said


@pytest.mark.usefixtures("cluster")
def test_no_node_to_sample_on(check: Callable[..., Report]) -> None:
    spot = {"node_selector": {"cloud.google.com/gke-spot": "true"}}
    said = only(check(draw_pool=spot), "nodes to sample on")

    assert "has no label cloud.google.com/gke-spot" in said
    assert "change draw_pool or gpu_count" in said


@pytest.mark.usefixtures("cluster")
def test_a_pod_that_samples_takes_one_accelerator(
    world: World, check: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spot = {"cloud.google.com/gke-spot": "true"}
    overrides = tiny.overrides(world.judge, micro_batch_size=2)
    with api_server(tmp_path, [GPU_NODE, node("spot-1", spot, gpus=1)]) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        report = check(gpu_count=2, overrides=overrides, draw_pool={"node_selector": spot})

    assert failed(report) == {}, report.markdown
    assert "| nodes to sample on | ✓ ok | 1 node(s) fit, e.g. spot-1 |" in report.markdown


def test_the_demo_needs_no_large_node(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = node("small", cpu="4", memory="7Gi")
    with api_server(tmp_path, [small]) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        demo = preflight(world.place("preflight"), "emoji-cpu", gpu_pool={})
        paper = preflight(world.place("preflight"), "emoji-cpu", base_model=str(world.base))

    assert failed(demo) == {}, demo.markdown
    assert "has 7 GiB memory, not 64 GiB" in failed(paper)["nodes"].found


@pytest.mark.usefixtures("cluster")
def test_a_quota_that_is_used_up(world: World, check: Callable[..., Report]) -> None:
    overrides = tiny.overrides(world.judge, micro_batch_size=2)
    assert "expected 4 requests.nvidia.com/gpu within the quota of runs, got 2 left" in only(
        check(gpu_count=2, train_nodes=2, overrides=overrides), "quota"
    )


@pytest.mark.usefixtures("cluster")
def test_several_nodes_with_room_for_them(check: Callable[..., Report]) -> None:
    report = check(train_nodes=2)

    assert failed(report) == {}, report.markdown
    assert "| Kubeflow Trainer | ✓ ok | there, with torch-distributed |" in report.markdown


@pytest.mark.usefixtures("cluster")
def test_too_few_nodes_to_train_on(world: World, check: Callable[..., Report]) -> None:
    # 16 CPUs and 128 GiB are room for two pods with a model of one's own.
    overrides = tiny.overrides(world.judge, batch_size=24, micro_batch_size=8)
    said = only(check(gpu_count=0, train_nodes=3, overrides=overrides), "nodes")

    assert "expected room for 3 pods of gpu_pool, got room for 2 on 1 node(s), e.g. gpu-1" in said


def test_a_batch_that_the_nodes_cannot_share(check: Callable[..., Report]) -> None:
    # Outside a cluster there are no nodes either, which is said too.
    faults = failed(check(gpu_count=0, train_nodes=5))
    assert set(faults) == {"options", "Kubeflow Trainer"}
    assert "micro_batch_size x processes" in f"{faults['options'].found} {faults['options'].do}"
    assert "set train_nodes" in only(check(gpu_count=0, train_nodes=0), "options")


def test_a_cluster_without_kubeflow_trainer(
    check: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api_server(tmp_path, [GPU_NODE], trainer=Trainer(installed=False)) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        assert "set train_nodes to 1" in only(check(train_nodes=2), "Kubeflow Trainer")


def test_an_account_that_may_not_look(
    check: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api_server(tmp_path, [], status=403) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        faults = failed(check())

    assert set(faults) == {"nodes", "quota"}
    assert "access.yaml" in faults["nodes"].do


def test_the_table_holds_no_markup() -> None:
    report = Report([Check("a", "failed", "<script>x|y</script>\nz", "do")])

    assert "| a | ✗ failed | &lt;script>x\\|y&lt;/script> z | do |" in report.markdown


def test_the_command(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = ["--store-uri", world.store_uri, "--store-endpoint", world.servers.s3_endpoint]
    good = CliRunner().invoke(app, ["preflight", *servers])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    bad = CliRunner().invoke(app, ["preflight", *servers])

    assert good.exit_code == 0, good.output
    assert "Preflight: ready" in good.output
    assert isinstance(bad.exception, SpinError)
    assert "Preflight: 1 of " in bad.output


@pytest.mark.parametrize(
    ("resource", "hard", "used", "expected"),
    [
        ("requests.cpu", "10", "3", "expected 8 requests.cpu within the quota of runs, got 7 left"),
        ("cpu", "10", "3", "expected 8 cpu within the quota of runs, got 7 left"),
        (
            "requests.memory",
            "100Gi",
            "50Gi",
            "expected 64 GiB requests.memory within the quota of runs, got 50 GiB left",
        ),
        ("limits.memory", "64Gi", "1Gi", "expected 64 GiB limits.memory within the quota of runs, got 63 GiB left"),
        ("pods", "5", "5", "expected 1 pods within the quota of runs, got 0 left"),
    ],
)
def test_a_quota_of_anything(
    check: Callable[..., Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resource: str,
    hard: str,
    used: str,
    expected: str,
) -> None:
    monkeypatch.setenv("KFP_NAMESPACE", "runs")
    with api_server(tmp_path, [CPU_NODE], [quota(resource, hard, used)]) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        assert expected in only(check(gpu_count=0, gpu_pool={}), "quota")


def test_a_check_that_breaks_is_a_row(check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise ValueError("of a kind\nnobody thought of")

    monkeypatch.setattr(preflight_module, "_mlflow", broken)
    monkeypatch.setattr(preflight_module, "_scratch_bytes", broken)

    assert "got ValueError: of a kind nobody thought of" in only(check(gpu_count=0), "MLflow")


def test_data_on_s3_is_looked_into(world: World, check: Callable[..., Report], tmp_path: Path) -> None:
    client = world.minio()
    for path in (path for path in world.images.rglob("*") if path.is_file()):
        client.fput_object("spin", f"data/images/{path.relative_to(world.images).as_posix()}", str(path))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name in ("000.png", "001.png"):
            archive.add(world.images / name, name)
    client.fput_object("spin", "data/bare.tar", str(tmp_path / "data.tar"))
    client.fput_object("spin", "data/images.zip", str(tmp_path / "data.tar"))

    assert "GiB: 8 of the first 8 rows are usable" in check(gpu_count=0, data_source="s3://spin/data/images").markdown
    assert "no caption" in only(check(gpu_count=0, data_source="s3://spin/data/bare.tar"), "data")
    # Names as JSON writes them, an image without a byte, and a slash too many.
    named = [{"file_name": "café.png", "text": "a"}, {"file_name": "0.png", "text": "b"}]
    for name, data in (
        ("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in named).encode()),
        ("café.png", (world.images / "000.png").read_bytes()),
        ("0.png", b""),
        ("café.png.png", b"nobody names it"),
    ):
        client.put_object("spin", f"data/named/{name}", io.BytesIO(data), len(data))
    assert "1 of the first 2 rows are usable" in check(gpu_count=0, data_source="s3://spin/data/named/").markdown
    said = only(check(gpu_count=0, data_source="s3://spin/data/images.zip"), "data")
    assert "expected a folder, a .tar or a .parquet file, got s3://spin/data/images.zip" in said


def test_scorers_of_the_hub_are_looked_up(
    world: World, check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def lookup(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lookup)
    overrides = tiny.overrides(world.judge)
    overrides["score"]["clip_model"] = "some/judge@abc"
    assert "expected some/judge at revision abc on the model hub" in only(
        check(gpu_count=0, overrides=overrides), "scorer"
    )
    overrides = tiny.overrides(world.judge)
    overrides["score"]["scorers"] = ["clip_score", "pickscore"]
    assert "yuvalkirstain/PickScore_v1" in only(check(gpu_count=0, overrides=overrides), "scorer")
    overrides["score"]["scorers"] = ["clip_score", "aesthetic"]
    assert "set score.weights.aesthetic.source" in only(check(gpu_count=0, overrides=overrides), "scorer")
    # Nothing of their weights is fetched.
    assert {(name, tuple(patterns)) for name, _, patterns in asked} == {
        ("some/judge", ("config.json",)),
        ("yuvalkirstain/PickScore_v1", ("config.json",)),
    }


def test_keys_that_cannot_score(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.names()
    try_scorers_keys(world.store_uri, world.servers.s3_endpoint)
    assert world.names() == before

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SpinError, match=r"^expected keys that may score in the secret score_secret, got: .*; "):
        try_scorers_keys(world.store_uri, world.servers.s3_endpoint)
