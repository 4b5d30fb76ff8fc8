"""Every overlay: renders as expected, is valid, and keeps the rules."""

import copy
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from mlflow.server.security_utils import should_block_cors_request

from pipelines.compiled import check_parameters
from tests import custom_resources, policy

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
GOLDEN = ROOT / "tests" / "golden"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
KUBECTL = Path(sys.executable).with_name("kubectl")
# Servers that keep data in the cluster are part of an overlay, or made by the administrator as the page says.
EXTERNAL = {"production": {"postgres", "s3-root", "s3-users"}}

RULES = [policy.pod_security, policy.resources, policy.probes, policy.labels, policy.images, policy.secrets]
RULES += [policy.queue]


def render(folder: Path) -> str:
    return subprocess.run([KUBECTL, "kustomize", folder], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def text(overlay: str) -> str:
    return render(MANIFESTS / "overlays" / overlay)


@pytest.fixture(scope="module")
def objects(text: str) -> list[policy.Object]:
    return list(yaml.safe_load_all(text))


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> list[policy.Object]:
    """Return the secrets that the generator and kustomize make of each other's work."""
    folder = tmp_path_factory.mktemp("manifests") / "secrets"
    shutil.copytree(MANIFESTS / "secrets", folder, ignore=shutil.ignore_patterns("*.env", "*.json"))
    for _ in range(2):
        subprocess.run([sys.executable, folder / "generate.py"], check=True)
    return [item for part in ("platform", "workspace") for item in yaml.safe_load_all(render(folder / part))]


def test_the_secrets_of_outside_servers_are_made_as_the_page_says(tmp_path: Path) -> None:
    """The page's own commands, with a kubectl that renders what it would apply: what `production` needs, no more."""
    shutil.copytree(MANIFESTS, tmp_path / "manifests", ignore=shutil.ignore_patterns("*.env", "*.json"))
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\necho "---"\nexec {KUBECTL} kustomize "$3"\n')
    (tmp_path / "kubectl").chmod(0o755)
    (block,) = re.findall(r"```sh\n( +cd manifests/secrets .*?)```", (ROOT / "docs/operations.md").read_text(), re.S)

    done = subprocess.run(
        ["sh", "-ec", block],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )

    made = [item for item in yaml.safe_load_all(done.stdout) if item]
    assert {item["metadata"]["name"] for item in made} == {"mlflow-database", "mlflow-s3", "spin-s3", "spin-s3-scorer"}
    assert list(policy.references(_golden("production"), made)) == []
    files = list((tmp_path / "manifests" / "secrets").rglob("*.env"))
    assert len(files) == 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_there_is_an_overlay_for_each_place() -> None:
    assert OVERLAYS == ["gke-a100", "kind", "kubeflow", "production"]


def test_it_renders_as_expected(overlay: str, text: str) -> None:
    golden = GOLDEN / f"manifests-{overlay}.yaml"
    assert text == golden.read_text(), "if that is what you want: make manifests"


def test_every_object_is_valid(objects: list[policy.Object]) -> None:
    for item in objects:
        if custom_resources.is_custom(item):
            custom_resources.validate(item)
        else:
            kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def test_an_unknown_field_is_not_valid(objects: list[policy.Object]) -> None:
    item = copy.deepcopy(next(item for item in objects if item["kind"] == "Deployment"))
    item["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


# A mistake in each kind of custom resource: the path to what is changed, its new value.
MISTAKES = [
    ("VirtualService", ["spec", "http", 0, "matches"], []),
    ("VirtualService", ["spec", "http", 1, "match", 0, "uri"], {"prefx": "/mlflow/"}),
    ("VirtualService", ["spec", "http", 1, "route", 0, "destination", "port"], 5000),
    ("VirtualService", ["apiVersion"], "networking.istio.io/v1alpha3"),
    ("ClusterQueue", ["spec", "resourceGroups", 0, "flavors", 0, "quota"], 8),
    ("ClusterQueue", ["spec", "resourceGroups", 0, "flavors", 0, "resources", 2, "name"], "nvidia.com/gpus"),
    ("ClusterQueue", ["spec", "queueingStrategy"], "FIFO"),
    # The name that the field had in v1beta1.
    ("ClusterQueue", ["spec", "cohort"], "all"),
    ("ClusterQueue", ["apiVersion"], "kueue.x-k8s.io/v1beta1"),
    ("ResourceFlavor", ["spec", "nodeLabel"], {}),
    ("LocalQueue", ["spec", "clusterqueue"], "spin-runs"),
    ("LocalQueue", ["metadata", "name"], 1),
]


@pytest.mark.parametrize(("kind", "path", "value"), MISTAKES)
def test_a_mistake_in_a_custom_resource_is_seen(kind: str, path: list[Any], value: Any) -> None:
    item = next(item for item in _golden("production") if item["kind"] == kind)
    node: Any = item
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.SchemaNotFoundError)):
        test_every_object_is_valid([item])


def test_names_are_unique(objects: list[policy.Object]) -> None:
    names = [(policy.name_of(item), policy.namespace_of(item)) for item in objects]
    assert len(names) == len(set(names))


def test_namespaced_objects_have_their_namespace(objects: list[policy.Object]) -> None:
    for item in objects:
        assert bool(item["metadata"].get("namespace")) != (item["kind"] in policy.CLUSTER_WIDE), policy.name_of(item)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_it_keeps_the_rule(rule: Any, objects: list[policy.Object]) -> None:
    assert list(rule(objects)) == []


def test_whatever_is_named_is_there(overlay: str, objects: list[policy.Object], secrets: list[policy.Object]) -> None:
    made = [item for item in secrets if item["metadata"]["name"] not in EXTERNAL.get(overlay, set())]
    assert list(policy.references(objects, made)) == []


def test_connections_are_allowed_at_both_ends(objects: list[policy.Object]) -> None:
    assert list(policy.network(objects)) == []


def test_the_page_behind_the_gateway_may_ask_for_runs(overlay: str, objects: list[policy.Object]) -> None:
    """By MLflow's own rule: its page asks by POST, from the gateway's origin; nobody else may."""
    settings = next(i["data"] for i in objects if i["kind"] == "ConfigMap" and "MLFLOW_S3_ENDPOINT_URL" in i["data"])
    gateways = [item for item in objects if item["kind"] == "VirtualService"]
    assert bool(gateways) == (overlay in ("kubeflow", "production"))
    origins = settings.get("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "").split(",") if gateways else None
    assert should_block_cors_request("https://kubeflow.example", "POST", origins) == (not gateways)
    assert should_block_cors_request("https://elsewhere.example", "POST", origins)
    for item in gateways:
        assert [rule["match"] for rule in item["spec"]["http"]] == [
            [{"uri": {"exact": "/mlflow"}}],
            [{"uri": {"prefix": "/mlflow/"}}],
        ]
        assert item["spec"]["http"][0]["redirect"]["uri"] == "/mlflow/"


def test_a_setting_that_changes_restarts_the_server(objects: list[policy.Object]) -> None:
    """The config map is named after its content."""
    server = next(item for item in objects if policy.name_of(item) == "Deployment/mlflow")
    (source,) = policy.template_of(server)["spec"]["containers"][0]["envFrom"]
    assert re.fullmatch(r"mlflow-[a-z0-9]{10}", source["configMapRef"]["name"])


def test_names_are_looked_up_where_gke_answers(overlay: str, objects: list[policy.Object]) -> None:
    """Its DNS cache has an address of the node, which no selector of pods chooses."""
    cache = {"ipBlock": {"cidr": "169.254.20.10/32"}}
    rules = [rule for item in objects if item["kind"] == "NetworkPolicy" for rule in item["spec"].get("egress", [])]
    names = [rule for rule in rules if 53 in [port["port"] for port in rule.get("ports", [])]]
    assert len(names) == 2
    for rule in names:
        assert (cache in rule["to"]) == (overlay == "gke-a100")
        assert {port["protocol"] for port in rule["ports"]} == {"TCP", "UDP"}


def test_no_limit_is_below_what_a_pod_asks_for(objects: list[policy.Object]) -> None:
    """A default limit would be given to a notebook that asks for more, which is then refused."""
    for item in objects:
        if item["kind"] == "LimitRange":
            assert all("default" not in limit for limit in item["spec"]["limits"])


def test_the_gpu_pools_are_values_of_the_form(overlay: str, objects: list[policy.Object]) -> None:
    pools = next(item for item in objects if item["metadata"]["name"] == "spin-gpu-pools")["data"]
    spot = {"a100-80gb-spot"} if overlay == "gke-a100" else set()
    assert {"a100-80gb", "a100-40gb", "h100", "cpu"} | spot == set(pools)
    for name, text in pools.items():
        # Pasted as it is; a field of the form is one line.
        assert "\n" not in text
        value = json.loads(text)
        assert bool(value) == (name != "cpu")
        for parameter in ("gpu_pool", "draw_pool"):
            check_parameters(GOLDEN / "spin-diffusion.yaml", {parameter: value})


# What each rule must see: the kind of object, the path to what is changed, its new value (None: removed).
BROKEN = [
    (policy.pod_security, "Deployment", ["securityContext", "runAsNonRoot"], False),
    (policy.pod_security, "Deployment", ["securityContext", "runAsUser"], 0),
    (policy.pod_security, "Deployment", ["securityContext", "seccompProfile"], None),
    (policy.pod_security, "Deployment", ["hostNetwork"], True),
    (policy.pod_security, "Deployment", ["automountServiceAccountToken"], None),
    (policy.pod_security, "Deployment", ["volumes", 0], {"name": "scratch", "hostPath": {"path": "/"}}),
    (policy.pod_security, "Deployment", ["volumes", 0], {"name": "scratch", "emptyDir": {}}),
    (policy.pod_security, "Deployment", ["containers", 0, "securityContext", "allowPrivilegeEscalation"], None),
    (policy.pod_security, "Deployment", ["containers", 0, "securityContext", "capabilities"], {"drop": ["NET_RAW"]}),
    (policy.pod_security, "Deployment", ["containers", 0, "securityContext", "readOnlyRootFilesystem"], False),
    (policy.resources, "Job", ["containers", 0, "resources", "limits"], None),
    (policy.resources, "Job", ["containers", 0, "resources", "requests", "cpu"], None),
    (policy.probes, "Deployment", ["containers", 0, "livenessProbe"], None),
    (policy.images, "Deployment", ["containers", 0, "image"], "spin-diffusion/mlflow"),
    (policy.images, "Deployment", ["containers", 0, "image"], "spin-diffusion/mlflow:latest"),
    (policy.images, "Deployment", ["containers", 0, "image"], "spin-diffusion/mlflow:3"),
    (policy.secrets, "Deployment", ["containers", 0, "env", 0], {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
    (policy.secrets, "Job", ["containers", 0, "args"], ["mlflow", "db", "upgrade", "$(MLFLOW_BACKEND_STORE_URI)"]),
]


def test_no_strangers_image_gets_the_keys(overlay: str, objects: list[policy.Object]) -> None:
    """Our images are in no public registry: where nodes would look for them, as shipped, there is none."""
    images = {c["image"] for _, pod in policy.workloads(objects) for c in policy.containers(pod)}
    own = {image for image in images if "spin-diffusion/" in image}
    assert own
    # What is loaded into kind's node is not looked for.
    assert overlay == "kind" or all(image.startswith("registry.invalid/") for image in own), own


@pytest.mark.parametrize(("rule", "kind", "path", "value"), BROKEN)
def test_the_rules_see_what_they_forbid(rule: Any, kind: str, path: list[Any], value: Any) -> None:
    objects = _golden("kind")
    node: Any = policy.template_of(next(item for item in objects if item["kind"] == kind))["spec"]
    for part in path[:-1]:
        node = node[part]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    assert list(rule(objects))


def test_missing_references_are_seen(secrets: list[policy.Object]) -> None:
    objects = _golden("kind")
    for left_out in ("ConfigMap/mlflow-", "ServiceAccount/s3", "PriorityClass/spin-platform", "Service/postgres"):
        kept = [item for item in objects if not policy.name_of(item).startswith(left_out)]
        assert len(kept) < len(objects)
        assert list(policy.references(kept, secrets)), left_out
    for name in ("mlflow-s3", "postgres", "s3-users"):
        assert list(policy.references(objects, [i for i in secrets if i["metadata"]["name"] != name])), name


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("VirtualService", ["http", 1, "route", 0, "destination", "host"], "mlflow.mlflw.svc.cluster.local"),
        ("VirtualService", ["http", 1, "route", 0, "destination", "port", "number"], 500),
        ("LocalQueue", ["clusterQueue"], "spin"),
        ("ClusterQueue", ["resourceGroups", 0, "flavors", 0, "name"], "spin-a100"),
        ("ClusterQueue", ["namespaceSelector", "matchLabels", "kubernetes.io/metadata.name"], "another"),
    ],
)
def test_missing_ends_of_routes_and_queues_are_seen(
    kind: str, path: list[Any], value: Any, secrets: list[policy.Object]
) -> None:
    objects = _golden("production")
    node: Any = next(item for item in objects if item["kind"] == kind)["spec"]
    assert not list(policy.references(objects, secrets))
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert list(policy.references(objects, secrets))


def test_a_quota_that_refuses_what_should_wait_is_seen() -> None:
    objects = _golden("production")
    assert not list(policy.queue(objects))
    quota = next(item for item in objects if item["kind"] == "ResourceQuota")
    quota["spec"]["hard"]["requests.nvidia.com/gpu"] = "8"
    assert list(policy.queue(objects))


@pytest.mark.parametrize(
    "left_out",
    ["default-deny", "postgres", "postgres-clients", "s3", "s3-clients", "mlflow", "spin-runs", "spin-train-nodes"],
)
def test_a_missing_end_is_seen(left_out: str) -> None:
    broken = [i for i in _golden("kind") if i["kind"] != "NetworkPolicy" or i["metadata"]["name"] != left_out]
    assert list(policy.network(broken))


def test_running_the_generator_again_changes_nothing(tmp_path: Path) -> None:
    def run() -> dict[str, str]:
        subprocess.run([sys.executable, MANIFESTS / "secrets" / "generate.py", tmp_path], check=True)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
        return {path.name: path.read_text() for path in files}

    first = run()
    assert run() == first
    (tmp_path / "workspace" / "spin-s3-scorer.env").unlink()
    rotated = run()
    assert {name for name in first if rotated[name] != first[name]} == {
        "spin-s3-scorer.env",
        "s3.json",
        "s3-users.env",
    }


def test_both_object_stores_allow_their_users_the_same() -> None:
    """SeaweedFS's actions and MinIO's policies are two spellings of one table."""
    words = {"s3:GetObject": "Read", "s3:ListBucket": "List", "s3:PutObject": "Write"}
    for role, actions in runpy.run_path(str(MANIFESTS / "secrets" / "generate.py"))["ROLES"].items():
        document = json.loads((MANIFESTS / "components" / "minio" / "policies" / f"{role}.json").read_text())
        spelt = set()
        for statement in document["Statement"]:
            for action in statement["Action"]:
                for resource in statement["Resource"]:
                    if action in words:
                        path = resource.removeprefix("arn:aws:s3:::")
                        spelt.add(f"{words[action]}:{path.removesuffix('/*') if path.count('/') == 1 else path}")
        assert spelt == set(actions), role


def _golden(overlay: str) -> list[policy.Object]:
    return list(yaml.safe_load_all((GOLDEN / f"manifests-{overlay}.yaml").read_text()))
