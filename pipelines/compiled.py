"""The compiled pipeline file: make it, read it back, check parameters against it."""

import difflib
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp import compiler
from kfp.pipeline_spec import pipeline_spec_pb2

from spin.config import MAX_YAML, plain_yaml
from spin.errors import SpinError, printable

KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "STRING": ("text", (str,)),
    "NUMBER_INTEGER": ("a whole number", (int,)),
    "NUMBER_DOUBLE": ("a number", (int, float)),
    "BOOLEAN": ("true or false", (bool,)),
    "STRUCT": ("a mapping", (dict,)),
    "LIST": ("a list", (list,)),
}


SERVERS = ("2.15", "2.16", "2.17")
"""Versions of Kubeflow Pipelines that a file can be compiled for; the last two read the same one."""


def compile_pipeline(
    pipeline: Callable[..., Any], choices: Mapping[str, Sequence[str]], output: Path, server: str = SERVERS[-1]
) -> Path:
    """Compile ``pipeline`` to ``output``, whole or not at all, and return the path.

    Args:
        choices: parameters with a fixed set of values; the server checks them and the UI shows a dropdown. The SDK
            cannot express this yet (kubeflow/pipelines#12601), the pipeline specification since KFP 2.16 can.
        server: version of the server, one of ``SERVERS``; a file for 2.15 has neither these values nor the tasks' user,
            fields that its parsers refuse.

    Raises:
        SpinError: ``output`` cannot be written, or ``server`` is none of these.
    """
    if server not in SERVERS:
        raise SpinError(f"expected a server of {', '.join(SERVERS)}, got {server!r}; change --server")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".compile-") as scratch:
            package = Path(scratch) / "pipeline.yaml"
            compiler.Compiler().compile(pipeline, str(package))
            text = package.read_text()
            # Name and description. The inputs that follow show mappings in an order that differs from run to run.
            header = text[: text.index("# Inputs:\n")]
            documents = list(yaml.safe_load_all(text))
            number_by_place(*documents)
            if server == "2.15":
                for pod in documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
                    del pod["securityContext"]
            else:
                for name, values in choices.items():
                    documents[0]["root"]["inputDefinitions"]["parameters"][name]["literals"] = list(values)
            _declare_settings_as_text(documents[0])
            json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
            package.write_text(header + yaml.safe_dump_all(documents, sort_keys=True))
            package.replace(output)
    except OSError as error:
        raise SpinError(f"expected a file to write to, got {output} ({error.strerror}); change --output") from None
    return output


def number_by_place(spec: dict[str, Any], *platforms: dict[str, Any]) -> None:
    """Name components and executors after the tasks that use them, numbered from the outermost pipeline inwards.

    The compiler numbers those of nested pipelines in an order that changes from one compilation to the next, and mixes
    up executors that are alike: those become one.
    """
    deployments = [
        spec["deploymentSpec"],
        *(part["deploymentSpec"] for platform in platforms for part in platform["platforms"].values()),
    ]
    alike = {
        label: json.dumps([deployment["executors"].get(label) for deployment in deployments], sort_keys=True)
        for label in spec["deploymentSpec"]["executors"]
    }
    names: dict[str, str] = {}
    labels: dict[str, str] = {}
    waiting = [spec["root"]]
    for outer in waiting:
        for task, body in sorted(outer.get("dag", {}).get("tasks", {}).items()):
            old = body["componentRef"]["name"]
            if old not in names:
                free = (f"{task}-{i}" if i > 1 else task for i in itertools.count(1))
                name = next(name for name in free if f"comp-{name}" not in names.values())
                names[old] = f"comp-{name}"
                waiting.append(spec["components"][old])
                if label := spec["components"][old].get("executorLabel"):
                    spec["components"][old]["executorLabel"] = labels.setdefault(alike[label], f"exec-{name}")
            body["componentRef"]["name"] = names[old]
    spec["components"] = {names[old]: component for old, component in spec["components"].items()}
    for deployment in deployments:
        deployment["executors"] = {
            labels[alike[old]]: executor for old, executor in deployment["executors"].items() if alike[old] in labels
        }


def _declare_settings_as_text(spec: dict[str, Any]) -> None:
    """Make the server hand over as text what a task's resources take from parameters, such as the accelerator limit.

    Its driver reads nothing but text there and takes a number for "not set", without a word. Numbers become text on
    their way into an input that is declared as text; the compiler passes these inputs on but does not declare them.
    """
    components = spec["components"]
    for dag in (part["dag"] for part in (spec["root"], *components.values()) if "dag" in part):
        for task in dag["tasks"].values():
            component = components[task["componentRef"]["name"]]
            for name in task.get("inputs", {}).get("parameters", {}):
                if "executorLabel" in component and name.startswith("pipelinechannel--"):
                    component["inputDefinitions"]["parameters"][name] = {"parameterType": "STRING"}


def parameters_of(package: Path) -> dict[str, dict[str, Any]]:
    """Return the pipeline's parameters as the specification describes them."""
    spec = next(yaml.safe_load_all(package.read_text()))
    found: dict[str, dict[str, Any]] = spec["root"]["inputDefinitions"]["parameters"]
    return found


def check_parameters(package: Path, params: Mapping[str, Any]) -> None:
    """Refuse unknown parameters, wrong types, values outside a dropdown, and whatever every stage would refuse.

    Raises:
        SpinError: the first fault, in one line.
    """
    known = parameters_of(package)
    for name, value in params.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise SpinError(f"expected a pipeline parameter, got {name!r}; {hint}")
        kind = known[name]["parameterType"]
        word, types = KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "BOOLEAN"):
            raise SpinError(f"expected {word} for parameter {name!r}, got {value!r}; change it in the parameters")
        if (choices := known[name].get("literals")) and value not in choices:
            raise SpinError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}; choose one")
    full: dict[str, Any] = {name: value.get("defaultValue") for name, value in known.items()} | dict(params)
    for name, least in (("iterations", 1), ("shards", 1), ("gpu_count", 0), ("train_nodes", 1)):
        if name in full and full[name] < least:
            raise SpinError(f"expected {name} of at least {least}, got {full[name]}; raise it")
    from spin.cluster import pool_of
    from spin.data.sources import check_source
    from spin.presets import resolve
    from spin.run import check_key
    from spin.stages import Place

    key = full["run_key"] or "run"
    Place(key, full["store_uri"], full["store_endpoint"], full["tracking_uri"]).check()
    for name in ("gpu_pool", "draw_pool"):
        pool_of(full[name], name)
    config = resolve(full["preset"], full["base_model"], full["data_source"], full["overrides"])
    check_source(config.data.source)
    if "model_name" in known:
        from spin.stages.register import check_name

        check_name(full["model_name"])
    if "gate" in known:
        from spin.gate import policy

        policy(full["gate"], config.score)
    if "arms" in known:
        from spin.comparison import arms_of, default_arms

        # The number of pairs is known only when they are prepared; any number shows what is wrong with an arm.
        arms, seeds = full["arms"] or default_arms(config), int(full["seeds"])
        for arm in arms_of(key, config, arms, int(full["iterations"]), seeds, config.train.batch_size):
            check_key(arm.run_key)


def read_parameters(path: Path) -> dict[str, Any]:
    """Return the parameters in a YAML file (a mapping of names to values)."""
    try:
        with path.open("rb") as file:
            params = plain_yaml(file.read(MAX_YAML + 1))
    except OSError as error:
        raise SpinError(f"expected a parameter file, got {path} ({error.strerror}); check --params") from None
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise SpinError(f"expected YAML in {path}, got {error.problem}{line}; mend the file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpinError(f"expected YAML in {path}, got {printable(str(error))}; mend the file") from None
    if params is None:
        return {}
    if not isinstance(params, dict):
        raise SpinError(f"expected a mapping of parameters in {path}, got {type(params).__name__}; use 'name: value'")
    return params
