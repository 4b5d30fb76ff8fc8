"""preflight: check what can be checked before an accelerator is taken."""

from typing import NamedTuple

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def preflight(
    run_key: str,
    preset: str,
    base_model: str,
    data_source: str,
    overrides: dict,
    iterations: int,
    gpu_count: int,
    gpu_pool: dict,
    draw_pool: dict,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    table: dsl.Output[dsl.Markdown],
    gate: dict = {},  # noqa: B006
    train_nodes: int = 1,
) -> NamedTuple(
    "Checked",
    [
        ("faults", str),
        ("train_cpu", str),
        ("train_memory", str),
        ("train_gpus", int),
        ("train_selector", dict),
        ("train_tolerations", list),
        ("draw_cpu", str),
        ("draw_memory", str),
        ("draw_gpus", int),
        ("draw_selector", dict),
        ("draw_tolerations", list),
    ],
):
    """Write every check into a table; return the failed ones, which the next task refuses, and where pods go.

    The table of a task that fails is not shown, so this one does not.

    Args:
        run_key: Name of the run in the store; empty: a new one.
        preset: emoji-cpu, sd15-paper or sd15-lora.
        base_model: Diffusers folder (also s3://) or hub name; empty: the preset's.
        data_source: Folder, .tar or .parquet (also s3://), or hf:NAME; empty: the preset's.
        overrides: Nested options laid over the preset.
        iterations: Number of self-play iterations.
        gpu_count: Accelerators of each pod or node that trains; one that prepares, samples or scores takes one at most.
        gpu_pool: Nodes to use.
        draw_pool: Nodes for pods that sample and score; empty: those of gpu_pool.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        gate: Options of register-model's gate.
        train_nodes: Nodes that train a player together.
        table: Every check, what was found, and what to do.
    """
    from pathlib import Path

    from spin.preflight import preflight
    from spin.stages import Place

    place = Place(run_key or "preflight", store_uri, store_endpoint, tracking_uri)
    pool = (gpu_count, gpu_pool, draw_pool)
    options = (preset, base_model, data_source, overrides, iterations)
    report = preflight(place, *options, *pool, gate=gate, train_nodes=train_nodes)
    print(report.markdown)
    Path(table.path).write_text(report.markdown)
    places = [
        [at.cpu, at.memory, at.gpus, dict(at.selector), list(at.tolerations)] for at in (report.train, report.draw)
    ]
    return (report.faults, *places[0], *places[1])
