"""The compiled pipeline: what is in the file that a server gets, and that nothing in it leads nowhere."""

import copy
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    json_format,
    message_factory,
    struct_pb2,
)
from google.rpc import status_pb2
from kfp import compiler, components
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines.compiled import compile_pipeline, number_by_place, parameters_of
from pipelines.spin import CHOICES, spin_diffusion
from spin.errors import SpinError
from spin.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = {"spin.py": "tests/golden/spin-diffusion.yaml", "compare.py": "tests/golden/spin-comparison.yaml"}
OTHER_IMAGE = "registry.example/team/spin@sha256:" + "0" * 64

Spec = dict[str, Any]


def compiled_elsewhere(output: Path, hash_seed: str, script: str = "spin.py", **environment: str) -> Path:
    """Compile in a process of its own: modules that are loaded here have read this process's environment."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPIN_", "KFP_", "KF_", "PYTHON"))}
    subprocess.run(
        [sys.executable, ROOT / "pipelines" / script, "--check", "--output", output],
        check=True,
        capture_output=True,
        env=kept | {"PYTHONHASHSEED": hash_seed} | environment,
    )
    return output


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_elsewhere(tmp_path_factory.mktemp("compiled") / "spin-diffusion.yaml", hash_seed="1")


@pytest.fixture(scope="module")
def documents(package: Path) -> list[Spec]:
    return list(yaml.safe_load_all(package.read_text()))


@pytest.fixture(scope="module")
def parameters(documents: list[Spec]) -> dict[str, Spec]:
    found: dict[str, Spec] = documents[0]["root"]["inputDefinitions"]["parameters"]
    return found


def without_sdk_version(text: str) -> str:
    """Leave out what a patch release of the SDK changes."""
    return re.sub(r"^sdkVersion: .*$", "sdkVersion: any", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_elsewhere(tmp_path_factory.mktemp("compiled") / "comparison.yaml", "1", "compare.py")


@pytest.mark.parametrize("script", GOLDEN)
def test_the_golden_file_is_what_compiles(package: Path, comparison: Path, script: str) -> None:
    paths = ROOT / GOLDEN[script], package if script == "spin.py" else comparison
    golden, compiled = (without_sdk_version(path.read_text()).splitlines() for path in paths)

    renew = f"env -u SPIN_RUNTIME_IMAGE python pipelines/{script} --check --output {GOLDEN[script]}"
    if difference := "\n".join(difflib.unified_diff(golden, compiled, "golden", "compiled", lineterm="")):
        pytest.fail(f"{difference}\n\nIf that is what you want, renew the golden file:\n    {renew}", pytrace=False)


def test_compiling_again_gives_the_same_bytes(package: Path, tmp_path: Path) -> None:
    """Not by the order of a set or a mapping, and not by the image: it is the one thing that the environment sets."""
    again = compiled_elsewhere(tmp_path / "again.yaml", hash_seed="2", SPIN_RUNTIME_IMAGE=OTHER_IMAGE)

    (image,) = set(re.findall(r"^ +image: (.+)$", package.read_text(), re.MULTILINE))
    told = re.compile(rf"^ +env:\n +- name: SPIN_IMAGE\n +value: {re.escape(OTHER_IMAGE)}\n", re.MULTILINE)
    # Beside the image itself, each task is told its digest.
    bare, count = told.subn("", again.read_text())
    assert bare == package.read_text().replace(f"image: {image}", f"image: {OTHER_IMAGE}")
    assert bare.count(OTHER_IMAGE) == count == len(executors(again))
    here = [compile_pipeline(spin_diffusion, CHOICES, tmp_path / name).read_bytes() for name in ("one", "two")]
    assert here[0] == here[1]


@pytest.mark.parametrize("numbers", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_names_do_not_depend_on_the_compilers_numbers(comparison: Path, numbers: tuple[int, ...]) -> None:
    """The compiler numbers the parts of nested pipelines in an order that changes; here it is changed on purpose."""
    spec, platform = yaml.safe_load_all(comparison.read_text())
    shuffled = comparison.read_text()
    loops = ["comp-for-loop-1", "comp-for-loop-1-2", "comp-for-loop-1-3"]
    for old, number in zip(loops, numbers, strict=True):
        shuffled = re.sub(rf"\b{old}(?=:|$)", f"comp-loop-{number}", shuffled, flags=re.MULTILINE)
    for old, number in zip(["exec-score-metrics", "exec-score-shard", "exec-spin-train"], numbers, strict=True):
        shuffled = re.sub(rf"\b{old}(?=:|$)", f"exec-other-{number}", shuffled, flags=re.MULTILINE)
    other = list(yaml.safe_load_all(shuffled))
    assert other != [spec, platform]
    # Of executors that are alike it may also take another, and leave one that nothing uses.
    for document in (other[0], other[1]["platforms"]["kubernetes"]):
        executors = document["deploymentSpec"]["executors"]
        executors["exec-plan-9"] = executors["exec-plan-10"] = executors["exec-plan"]
    other[0]["components"]["comp-plan-2"]["executorLabel"] = "exec-plan-9"
    number_by_place(*other)
    assert other == [spec, platform]


def test_a_valid_specification(package: Path, documents: list[Spec]) -> None:
    spec, platform = documents
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())

    assert parsed.pipeline_info.name == "spin-diffusion"
    loaded = components.load_component_from_file(str(package))
    assert loaded.name == "spin-diffusion"
    assert set(loaded.component_spec.inputs) == set(spec["root"]["inputDefinitions"]["parameters"])


def test_an_unwritable_output_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(SpinError, match=r"^expected a file to write to, got .*; change --output$"):
        compile_pipeline(spin_diffusion, CHOICES, file / "spin.yaml")
    with pytest.raises(SpinError, match=r"\(Is a directory\); change --output$"):
        compile_pipeline(spin_diffusion, CHOICES, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("file", GOLDEN.values())
def test_the_form(file: str) -> None:
    parameters = parameters_of(ROOT / file)
    assert len(parameters) <= 20
    for name, parameter in parameters.items():
        assert parameter.get("description", "").strip(), name
        assert "defaultValue" in parameter, name
        # The UI lists parameters by name: none may lean on the one that is written before it.
        assert not parameter["description"].startswith("The same"), name
    assert parameters["preset"]["literals"] == list(PRESETS)
    assert parameters["preset"]["defaultValue"] in PRESETS
    assert all(word in parameters["preset"]["description"] for word in ("gpu_count", "gpu_pool {}"))
    assert "sd15-paper" in parameters["iterations"]["description"]


@pytest.mark.parametrize("file", GOLDEN.values())
def test_the_form_names_the_servers_that_the_overlays_install(file: str) -> None:
    parameters = parameters_of(ROOT / file)
    for overlay in ("kind", "kubeflow", "gke-a100"):
        services = {
            f"http://{item['metadata']['name']}.{item['metadata']['namespace']}:{port['port']}"
            for item in yaml.safe_load_all((ROOT / f"tests/golden/manifests-{overlay}.yaml").read_text())
            if item["kind"] == "Service"
            for port in item["spec"]["ports"]
        }
        assert {parameters[name]["defaultValue"] for name in ("store_endpoint", "tracking_uri")} <= services, overlay


def test_no_parameter_holds_a_credential(parameters: dict[str, Spec]) -> None:
    secrets = {name for name in parameters if name.endswith("_secret")}

    assert secrets == {"store_secret", "score_secret", "tracking_secret"}
    for name in secrets:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", parameters[name]["defaultValue"]), name
    for name in set(parameters) - secrets:
        assert not re.search(r"secret|password|passwd|token|credential|cookie|(^|_)key_?id|access_key", name)
    for name, parameter in parameters.items():
        text = json.dumps(parameter["defaultValue"])
        assert not re.search(r"://[^/\s]*@|[A-Za-z0-9+/_-]{32,}|AKIA|Bearer", text), (name, text)


def executors(package: Path) -> dict[str, Spec]:
    spec, platform = yaml.safe_load_all(package.read_text())
    on_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        label: executor["container"] | {"kubernetes": on_kubernetes.get(label, {})}
        for label, executor in spec["deploymentSpec"]["executors"].items()
    }


def test_secrets_reach_tasks_by_name_only(package: Path) -> None:
    found = set()
    for label, executor in executors(package).items():
        assert "env" not in executor, label
        assert "secretAsVolume" not in executor["kubernetes"], label
        for secret in executor["kubernetes"].get("secretAsEnv", []):
            assert set(secret) == {"keyToEnv", "optional", "secretNameParameter"}, label
            name = secret["secretNameParameter"]["componentInputParameter"].removeprefix("pipelinechannel--")
            found |= {(name, key["envVar"], secret["optional"]) for key in secret["keyToEnv"]}
    assert found == {
        ("store_secret", "AWS_ACCESS_KEY_ID", False),
        ("store_secret", "AWS_SECRET_ACCESS_KEY", False),
        ("store_secret", "AWS_DEFAULT_REGION", True),
        ("score_secret", "AWS_DEFAULT_REGION", True),
        ("score_secret", "AWS_ACCESS_KEY_ID", False),
        ("score_secret", "AWS_SECRET_ACCESS_KEY", False),
        ("tracking_secret", "MLFLOW_TRACKING_USERNAME", True),
        ("tracking_secret", "MLFLOW_TRACKING_PASSWORD", True),
    }


def test_nothing_is_installed_when_a_task_starts(package: Path) -> None:
    for label, executor in executors(package).items():
        assert not re.search(r"\bpip3?\b|packages_to_install|apt-get", " ".join(executor["command"])), label


def test_the_size_does_not_depend_on_iterations(package: Path, tmp_path: Path) -> None:
    assert package.stat().st_size < 200_000
    sizes = []
    for iterations in (1, 9):
        path = tmp_path / f"{iterations}.yaml"
        compiler.Compiler().compile(spin_diffusion, str(path), pipeline_parameters={"iterations": iterations})
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1]


# What follows walks the specification as the server's drivers do, from the root down.


def dags(spec: Spec, component: Spec | None = None, where: str = "root") -> Iterator[tuple[str, Spec]]:
    """Yield every dag below a component with its path; a component used twice is visited twice."""
    component = component or spec["root"]
    if "dag" in component:
        yield where, component
        for name, task in component["dag"]["tasks"].items():
            yield from dags(spec, spec["components"][task["componentRef"]["name"]], f"{where}/{name}")


def declared(component: Spec, side: str = "inputDefinitions", kind: str = "parameters") -> dict[str, Spec]:
    found: dict[str, Spec] = component.get(side, {}).get(kind, {})
    return found


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string in a JSON value, with the name that it stands under."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, key)
    elif isinstance(value, str):
        yield key, value


def faults(spec: Spec, platform: Spec) -> list[str]:
    """Return every reference of a task that its parent, its siblings or its component do not answer."""
    found = []
    on_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for where, dag in dags(spec):
        offered, tasks = declared(dag), dag["dag"]["tasks"]
        for task_name, task in tasks.items():
            component = spec["components"][task["componentRef"]["name"]]
            wanted = declared(component)
            given = task.get("inputs", {}).get("parameters", {})
            types: dict[str, str] = {}

            def fault(text: str, at: str = f"{where}/{task_name}") -> None:
                found.append(f"{at}: {text}")

            for name, source in given.items():
                if origin := source.get("componentInputParameter"):
                    if origin not in offered:
                        fault(f"{name} comes from {origin}, which its parent does not have")
                    else:
                        types[name] = offered[origin]["parameterType"]
                elif output := source.get("taskOutputParameter"):
                    producer = tasks.get(output["producerTask"])
                    outputs = declared(spec["components"][producer["componentRef"]["name"]], "outputDefinitions") if (
                        producer
                    ) else {}  # fmt: skip
                    if output["outputParameterKey"] not in outputs:
                        fault(f"{name} comes from {output}, which is not there")
                    else:
                        types[name] = outputs[output["outputParameterKey"]]["parameterType"]
                        if output["producerTask"] not in task.get("dependentTasks", []):
                            fault(f"does not wait for {output['producerTask']}")
                elif "runtimeValue" not in source:
                    fault(f"{name} comes from {source}, which is unknown here")

            loop = task.get("parameterIterator", {})
            if loop and "raw" not in loop["items"] and loop["items"].get("inputParameter") not in given:
                fault(f"loops over {loop['items']}, which it is not given")
            for name, definition in wanted.items():
                if name not in given and name != loop.get("itemInput") and not definition.get("isOptional"):
                    fault(f"is not given {name}")
                # Everything may become text on its way in; nothing else changes its type.
                if name in types and definition["parameterType"] not in (types[name], "STRING"):
                    fault(f"{name} is {types[name]}, expected {definition['parameterType']}")
            for name in declared(component, kind="artifacts"):
                given_artifact = task.get("inputs", {}).get("artifacts", {}).get(name, {})
                if given_artifact.get("componentInputArtifact") in declared(dag, kind="artifacts"):
                    continue
                source = given_artifact.get("taskOutputArtifact", {})
                producer = tasks.get(source.get("producerTask"))
                if not producer or source["outputArtifactKey"] not in declared(
                    spec["components"][producer["componentRef"]["name"]], "outputDefinitions", "artifacts"
                ):
                    fault(f"artifact {name} comes from {source}, which is not there")
            for name in task.get("dependentTasks", []):
                if name not in tasks:
                    fault(f"waits for {name}, which is not there")

            if label := component.get("executorLabel"):
                container = spec["deploymentSpec"]["executors"][label]["container"]
                for setting, text in strings(container["resources"]):
                    for name in re.findall(r"\{\{\$\.inputs\.parameters\['(.+?)'\]\}\}", text):
                        if name not in given:
                            fault(f"{setting} needs {name}, which it is not given")
                        # Drivers read text here, and a number as "not set".
                        elif wanted.get(name, {}).get("parameterType") != "STRING":
                            fault(f"{setting} needs {name} as text")
                for setting, text in strings(on_kubernetes.get(label, {})):
                    if setting == "componentInputParameter" and text not in offered:
                        fault(f"its pod needs {text}, which its parent does not have")
                    if setting == "producerTask" and text not in task.get("dependentTasks", []):
                        fault(f"its pod needs an output of {text}, which it does not wait for")
    return found


def test_every_input_of_every_task_is_supplied(documents: list[Spec]) -> None:
    spec, platform = documents

    assert faults(spec, platform) == []
    places = [where for where, _ in dags(spec)]
    train = "/condition-branches-1"
    branches = ["", train, f"{train}/condition-2", f"{train}/condition-3"]

    def score(where: str) -> list[str]:
        inner = ("", *(f"/score-in-shards{part}" for part in ("", "/condition-1", "/condition-1/for-loop-2")))
        return [f"{where}/score{part}" for part in inner]

    assert places == [
        "root",
        *score("root"),
        "root/self-play",
        "root/self-play/for-loop-1",
        "root/self-play/for-loop-1/condition-2",
        "root/self-play/for-loop-1/condition-2/spin-iteration",
        "root/self-play/for-loop-1/condition-2/spin-iteration/for-loop-1",
        *score("root/self-play/for-loop-1/condition-2/spin-iteration"),
        *(f"root/self-play/for-loop-1/condition-2/spin-iteration/train-player{branch}" for branch in branches),
    ]
    reached = {task["componentRef"]["name"] for _, dag in dags(spec) for task in dag["dag"]["tasks"].values()}
    assert reached == set(spec["components"])


def test_every_input_of_the_comparison_is_supplied_too(comparison: Path) -> None:
    """Both copies of the game in it, rivals' and players', and the two places that score."""
    spec, platform = yaml.safe_load_all(comparison.read_text())
    assert faults(spec, platform) == []
    prepare = spec["root"]["dag"]["tasks"]["prepare-data"]["inputs"]["parameters"]
    assert prepare["iterations"] == {"runtimeValue": {"constant": 1.0}}, "a data set with pairs may be prepared"


def _shards(spec: Spec) -> Spec:
    found: Spec = spec["components"]["comp-for-loop-1-2"]
    return found


def _not_in_the_loop(spec: Spec) -> None:
    del declared(_shards(spec))["pipelinechannel--draw_gpus"]


def _not_handed_to_the_loop(spec: Spec) -> None:
    loop = spec["components"]["comp-spin-iteration"]["dag"]["tasks"]["for-loop-1"]
    del loop["inputs"]["parameters"]["pipelinechannel--store_secret"]


def _not_handed_to_the_task(spec: Spec) -> None:
    del _shards(spec)["dag"]["tasks"]["generate-synthetic"]["inputs"]["parameters"]["pipelinechannel--draw_gpus"]


def _a_number_where_text_is_read(spec: Spec) -> None:
    del declared(spec["components"]["comp-spin-train"])["pipelinechannel--train_gpus"]


def _no_amount_for_the_task(spec: Spec) -> None:
    train = spec["components"]["comp-condition-3"]["dag"]["tasks"]["spin-train"]
    del train["inputs"]["parameters"]["pipelinechannel--train_memory"]


def _not_waited_for(spec: Spec) -> None:
    prepare = spec["root"]["dag"]["tasks"]["prepare-data"]
    prepare["dependentTasks"].remove("preflight")


def _no_such_output(spec: Spec) -> None:
    del declared(spec["components"]["comp-prepare-data"], "outputDefinitions")["key"]


def _no_losers(spec: Spec) -> None:
    del declared(spec["components"]["comp-train-player"], kind="artifacts")["losers"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_no_losers, "train-player/condition-branches-1: artifact pipelinechannel--losers comes from"),
        (_not_in_the_loop, "generate-synthetic: accelerators comes from pipelinechannel--draw_gpus, which its parent"),
        (_not_handed_to_the_loop, "spin-iteration/for-loop-1: is not given pipelinechannel--store_secret"),
        (_not_handed_to_the_task, "generate-synthetic: resourceCount needs pipelinechannel--draw_gpus, which it is"),
        (_a_number_where_text_is_read, "spin-train: resourceCount needs pipelinechannel--train_gpus as text"),
        (_no_amount_for_the_task, "resourceMemoryLimit needs pipelinechannel--train_memory, which it is not given"),
        (_not_waited_for, "root/prepare-data: its pod needs an output of preflight, which it does not wait for"),
        (_no_such_output, "root/score: run_key comes from"),
    ],
)
def test_the_walk_sees_what_is_missing(documents: list[Spec], damage: Callable[[Spec], None], expected: str) -> None:
    spec, platform = copy.deepcopy(documents)
    damage(spec)

    assert any(expected in fault for fault in faults(spec, platform)), faults(spec, platform)


def faults_by(version: str, documents: list[Spec]) -> list[str]:
    """Return what the parsers of a server refuse, by the formats that its version publishes.

    ``kfp-<version>.binpb`` is the FileDescriptorSet of kfp-pipeline-spec and kfp-kubernetes of that version.
    """
    published = descriptor_pb2.FileDescriptorSet.FromString((ROOT / f"tests/golden/kfp-{version}.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for module in (duration_pb2, struct_pb2, any_pb2, status_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    for file in published.file:
        pool.Add(file)

    def parser(name: str) -> Any:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))

    spec, platform = documents
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    parts = [(spec, "ml_pipelines.PipelineSpec"), (platform, "ml_pipelines.PlatformSpec")]
    # The deployment is a free-form field, which a server parses once more.
    parts.append((spec["deploymentSpec"], "ml_pipelines.PipelineDeploymentConfig"))
    found = []
    for part, name in [*parts, *((pod, "kfp_kubernetes.KubernetesExecutorConfig") for pod in pods)]:
        try:
            json_format.ParseDict(part, parser(name)())
        except json_format.ParseError as error:
            found.append(str(error))
    return found


@pytest.fixture(scope="module")
def for_2_15(tmp_path_factory: pytest.TempPathFactory) -> list[Spec]:
    path = tmp_path_factory.mktemp("compiled") / "2.15.yaml"
    return list(yaml.safe_load_all(compile_pipeline(spin_diffusion, CHOICES, path, "2.15").read_text()))


def test_servers_of_2_16_read_the_file(documents: list[Spec]) -> None:
    assert faults_by("2.16", documents) == []


def test_servers_of_2_15_read_a_file_of_their_own(documents: list[Spec], for_2_15: list[Spec]) -> None:
    refused = faults_by("2.15", documents)
    assert 'no field named "literals"' in refused[0]
    assert all('no field named "securityContext"' in fault for fault in refused[1:])
    assert len(refused) == 1 + len(documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"])

    assert faults_by("2.15", for_2_15) == []
    # Nothing else is another.
    spec, platform = copy.deepcopy(documents)
    del spec["root"]["inputDefinitions"]["parameters"]["preset"]["literals"]
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        del pod["securityContext"]
    assert for_2_15[0]["root"] == spec["root"]
    assert for_2_15[1] == platform


def test_no_file_for_a_server_that_cannot_read_one(tmp_path: Path) -> None:
    with pytest.raises(SpinError, match=r"^expected a server of 2\.15, 2\.16, 2\.17, got '2\.14'; change --server$"):
        compile_pipeline(spin_diffusion, CHOICES, tmp_path / "spin.yaml", "2.14")
