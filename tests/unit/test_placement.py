"""Where every task of the compiled file runs, as one table."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.placement import A100_80GB
from pipelines.play import WORKS
from spin.__main__ import app
from spin.cluster import number
from spin.preflight import preflight
from spin.presets import PRESETS, ROOM, resolve, room
from spin.stages import Place

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "golden" / "spin-diffusion.yaml"
PAGE = ROOT / "docs" / "operations.md"
NOWHERE = Place("preflight", "", "")
# Of these two the optional part is the region.
STORE, SCORE = ({name, f"{name} (optional)"} for name in ("store_secret", "score_secret"))
TRACKING = {"tracking_secret (optional)"}
SHARED = "/dev/shm Memory 16Gi"
TRAIN = ("nvidia.com/gpu x train_gpus", "train_selector", "train_tolerations", SHARED)
DRAW = ("nvidia.com/gpu x draw_gpus", "draw_selector", "draw_tolerations", SHARED)
NONE = ("", "", "", "")

# task: cpu request, memory request, memory limit, (accelerator, node selector, tolerations, shared memory), retries,
# secrets. No task has a CPU limit, is cached or has an environment of its own; every one runs as the image's own user.
TABLE = {
    "Preflight": ("1", "2Gi", "2Gi", NONE, 0, STORE | TRACKING),
    "Require preflight": ("100m", "1Gi", "1Gi", NONE, 0, SCORE),
    # Not on nodes that may go at any time: it has no retries.
    "Prepare data": ("draw_cpu", "draw_memory", "draw_memory", (DRAW[0], *TRAIN[1:]), 0, STORE | TRACKING),
    "Plan score shards": ("100m", "256Mi", "256Mi", NONE, 0, set()),
    "Score shard": ("draw_cpu", "draw_memory", "draw_memory", DRAW, 3, SCORE | TRACKING),
    "Score metrics": ("draw_cpu", "draw_memory", "draw_memory", DRAW, 3, SCORE | TRACKING),
    "Plan iterations": ("100m", "256Mi", "256Mi", NONE, 0, set()),
    "Continue play": ("500m", "1Gi", "1Gi", NONE, 3, STORE),
    "Plan shards": ("100m", "256Mi", "256Mi", NONE, 0, set()),
    "Generate losers": ("draw_cpu", "draw_memory", "draw_memory", DRAW, 3, STORE | TRACKING),
    "Train player": ("train_cpu", "train_memory", "train_memory", TRAIN, 3, STORE | TRACKING),
    # The nodes' pods, not the task's own: see the test of what it passes on.
    "Train player on nodes": ("train_cpu", "train_memory", "train_memory", TRAIN, 3, STORE | TRACKING),
    "Register model": ("1", "4Gi", "4Gi", NONE, 3, STORE | TRACKING),
}
USER = {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
BACKOFF = {"maxRetryCount": 3, "backoffDuration": "10s", "backoffFactor": 2.0, "backoffMaxDuration": "600s"}


def plain(reference: dict[str, Any]) -> str:
    """Return the pipeline parameter's name that a setting is taken from."""
    ((kind, found),) = reference.items()
    assert kind in ("componentInputParameter", "taskOutputParameter")
    if kind == "taskOutputParameter":
        assert found["producerTask"] == "preflight"
        return str(found["outputParameterKey"])
    return str(found).removeprefix("pipelinechannel--")


def amount(setting: str) -> str:
    """Return a resource's amount, or the name of the parameter that it is taken from."""
    return re.sub(r"^\{\{\$\.inputs\.parameters\['pipelinechannel--(?:preflight-)?(.+)'\]\}\}$", r"\1", setting)


def table() -> dict[str, tuple[Any, ...]]:
    """Return where every task runs, from the compiled file; what is taken from a parameter is its name."""
    spec, platform = yaml.safe_load_all(PACKAGE.read_text())
    on_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = {}
    for dag in [spec["root"], *spec["components"].values()]:
        for task in dag.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if not label:
                continue
            name = task["taskInfo"]["name"]
            container, pod = spec["deploymentSpec"]["executors"][label]["container"], dict(on_kubernetes.get(label, {}))
            resources = container["resources"]
            accelerator = resources.get("accelerator", {})
            selector, tolerations = pod.pop("nodeSelector", None), pod.pop("tolerations", [])
            shared = [
                f"{mount['mountPath']} {mount['medium']} {mount['sizeLimit']}"
                for mount in pod.pop("emptyDirMounts", [])
            ]
            assert pod.pop("securityContext", None) == USER, f"{name}: the restricted Pod Security Standard refuses it"
            secrets = {
                plain(secret["secretNameParameter"]) + (" (optional)" if secret["optional"] else "")
                for secret in pod.pop("secretAsEnv", [])
            }
            assert pod == {}, f"{name}: a setting that the table does not show"
            assert task["cachingOptions"].get("enableCache", False) is False, name
            assert "resourceCpuLimit" not in resources, name
            assert "env" not in container, name
            policy = task.get("retryPolicy")
            assert policy in (None, BACKOFF), name
            found[name] = (
                *(amount(resources[f"resource{name}"]) for name in ("CpuRequest", "MemoryRequest", "MemoryLimit")),
                (
                    f"{accelerator['resourceType']} x {amount(accelerator['resourceCount'])}" if accelerator else "",
                    plain(selector["nodeSelectorJson"]) if selector else "",
                    ", ".join(plain(toleration["tolerationJson"]) for toleration in tolerations),
                    ", ".join(shared),
                ),
                policy["maxRetryCount"] if policy else 0,
                secrets,
            )

    return found


def test_placement() -> None:
    assert table() == TABLE


# preset: CPU and memory of pods that draw, and of those that train.
PLACES = {
    "emoji-cpu": (("1", "2Gi"), ("1", "2Gi")),
    "sd15-paper": (("4", "32Gi"), ("8", "64Gi")),
    "sd15-lora": (("4", "32Gi"), ("8", "64Gi")),
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spot", [False, True], ids=["one-pool", "spot"])
def test_every_task_of_every_preset(name: str, spot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Component x preset, as preflight hands it over: amounts, and what chooses the nodes."""
    for hub in ("_base", "_data", "_scorer"):
        monkeypatch.setattr(f"spin.preflight.{hub}", lambda *_: "not asked")
    own = {"node_selector": {"spot": "true"}, "tolerations": [{"key": "spot", "operator": "Exists"}]} if spot else {}
    fits = {"train": {"micro_batch_size": 4}}
    report = preflight(NOWHERE, name, "", "", fits, gpu_count=8, gpu_pool=A100_80GB, draw_pool=own)
    handed = {f"{work}_{what}": value for work in WORKS for what, value in vars(getattr(report, work)).items()}
    found = {}
    for task, (cpu, memory, limit, (accelerator, selector, tolerations, shared), _, _) in table().items():
        assert memory == limit
        amounts = (str(handed.get(cpu, cpu)), str(handed.get(memory, memory)))
        kind, _, count = accelerator.partition(" x ")
        gpus = f"{kind} x {handed[count]}" if kind else ""
        found[task] = (*amounts, gpus, handed.get(selector), handed.get(tolerations), shared)

    draw, train = PLACES[name]
    at = (A100_80GB["node_selector"], A100_80GB["tolerations"], SHARED)
    # Training alone uses more than one.
    one, all_of_them = "nvidia.com/gpu x 1", "nvidia.com/gpu x 8"
    drawing = (*draw, one, own["node_selector"], own["tolerations"], SHARED) if spot else (*draw, one, *at)
    small = {task: (cpu, memory, "", None, None, "") for task, (cpu, memory, _, at, *_) in TABLE.items() if at == NONE}
    assert found == small | {
        "Prepare data": (*draw, one, *at),
        "Generate losers": drawing,
        "Score shard": drawing,
        "Score metrics": drawing,
        "Train player": (*train, all_of_them, *at),
        "Train player on nodes": (*train, all_of_them, *at),
    }


@pytest.mark.parametrize(("count", "train", "draw"), [(0, 0, 0), (1, 1, 1), (8, 8, 1)])
def test_a_pod_is_given_the_accelerators_that_it_uses(count: int, train: int, draw: int) -> None:
    report = preflight(NOWHERE, "emoji-cpu", "", "", {"train": {"micro_batch_size": 4}}, gpu_count=count)

    assert (report.train.gpus, report.draw.gpus) == (train, draw)


def test_a_task_waits_for_the_accelerators_that_it_was_given() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    found = {}
    for dag in [spec["root"], *spec["components"].values()]:
        for task in dag.get("dag", {}).get("tasks", {}).values():
            given = task.get("inputs", {}).get("parameters", {})
            if "accelerators" in given:
                found[task["taskInfo"]["name"]] = plain(
                    {k: v for k, v in given["accelerators"].items() if k != "parameterType"}
                )

    assert found == {
        task: accelerator.removeprefix("nvidia.com/gpu x ")
        for task, (_, _, _, (accelerator, *_), _, _) in TABLE.items()
        if accelerator
    }


def test_the_page_knows_the_tasks() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    there = {
        (task["taskInfo"]["name"], task["componentRef"]["name"].removeprefix("comp-"))
        for dag in [spec["root"], *spec["components"].values()]
        for task in dag.get("dag", {}).get("tasks", {}).values()
    }
    rows = re.findall(r"^\| ([\w ]+) \| `([a-z-]+)` \| `([a-z-]+)` \|$", PAGE.read_text(), re.M)
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}

    assert {component for _, component, _ in rows} >= {"spin-train", "score-metrics", "register-model"}
    assert {(task, component) for task, component, _ in rows} <= there
    assert {command for *_, command in rows} <= commands


def test_the_demo_fits_a_small_node() -> None:
    """One with 4 CPUs and 8 GiB, half of it taken by Kubeflow and the servers."""
    handed = {f"{work}_{what}": value for work, at in ROOM["emoji-cpu"].items() for what, value in vars(at).items()}

    for task, (cpu, memory, *_) in table().items():
        assert number(handed.get(cpu, cpu)) <= 2, task
        assert number(handed.get(memory, memory)) <= 4 * 2**30, task


def test_a_model_of_ones_own_has_the_room_of_a_large_one() -> None:
    assert room(resolve("emoji-cpu", "", "", {"train": {"beta": [1000]}})) == ROOM["emoji-cpu"]
    # Data of one's own is scored by the general judge, which the demo's room does not hold.
    assert room(resolve("emoji-cpu", "", "/my/images", {})) == ROOM["sd15-paper"]
    assert room(resolve("emoji-cpu", "", "/my/images", {"score": {"clip_model": "emoji"}})) == ROOM["emoji-cpu"]
    assert room(resolve("emoji-cpu", "some/model", "", {})) == ROOM["sd15-paper"]
    assert room(resolve("emoji-cpu", "", "", {"base_model": "some/model"})) == ROOM["sd15-paper"]
    assert set(ROOM) == set(PRESETS)


def test_what_is_for_the_nodes_is_passed_on() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    passed = {
        name: component["taskConfigPassthroughs"]
        for name, component in spec["components"].items()
        if "taskConfigPassthroughs" in component
    }

    # The launching pod has the keys of its own accord, and neither accelerators nor a node of theirs.
    assert passed == {
        "comp-spin-train-nodes": [
            {"field": "RESOURCES"},
            {"field": "KUBERNETES_NODE_SELECTOR"},
            {"field": "KUBERNETES_TOLERATIONS"},
            {"applyToTask": True, "field": "ENV"},
        ]
    }
    pod = spec["components"]["comp-spin-train-nodes"]["inputDefinitions"]["parameters"]["pod"]
    assert (pod["parameterType"], pod["isOptional"]) == ("TASK_CONFIG", True)


def test_one_pod_trains_unless_there_are_more_nodes() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    conditions = {
        task["taskInfo"]["name"]: task["triggerPolicy"]["condition"]
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "triggerPolicy" in task and "train_nodes" in task["triggerPolicy"]["condition"]
    }

    several = "int(inputs.parameter_values['pipelinechannel--train_nodes']) > 1"
    assert conditions == {"on several nodes": several, "in one pod": f"!({several})"}
    assert spec["root"]["inputDefinitions"]["parameters"]["train_nodes"]["defaultValue"] == 1


def test_the_loop_over_iterations_is_in_order() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    loops = {
        task["taskInfo"]["name"]: task.get("iteratorPolicy", {}).get("parallelismLimit")
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "parameterIterator" in task
    }

    assert loops == {"iterations": 1, "shards": None, "score shards": None}


def test_the_defaults_ask_for_a100s() -> None:
    spec, _ = yaml.safe_load_all(PACKAGE.read_text())
    parameters: dict[str, Any] = spec["root"]["inputDefinitions"]["parameters"]

    assert parameters["gpu_count"]["defaultValue"] == 1
    assert parameters["gpu_pool"]["defaultValue"] == {
        "node_selector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    assert parameters["draw_pool"]["defaultValue"] == {}


@pytest.mark.parametrize("file", ["spin-diffusion.yaml", "spin-comparison.yaml"])
def test_every_task_runs_as_the_images_user(file: str) -> None:
    """KFP's server adds the rest of the restricted Pod Security Standard, but not that root is refused."""
    spec, platform = yaml.safe_load_all(PACKAGE.with_name(file).read_text())
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    assert set(pods) == set(spec["deploymentSpec"]["executors"])
    assert [label for label, pod in pods.items() if pod.get("securityContext") != USER] == []
    assert f"\nUSER {USER['runAsUser']}:{USER['runAsGroup']}\n" in (ROOT / "images/runtime/Dockerfile").read_text()
