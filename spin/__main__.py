"""Command line: the pipeline's stages without KFP, ``python -m spin preflight|prepare|generate|train|score|...``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from spin.errors import SpinError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Self-play fine-tuning of diffusion models: the pipeline's stages, one by one.",
)

RunKey = Annotated[str, typer.Option(help="Name of the run in the store; the same key resumes.")]
StoreUri = Annotated[str, typer.Option(envvar="SPIN_STORE_URI", help="s3://bucket/prefix of runs and objects.")]
StoreEndpoint = Annotated[str, typer.Option(envvar="MLFLOW_S3_ENDPOINT_URL", help="Address of the S3 server.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Address of the MLflow server.")]
Experiment = Annotated[str, typer.Option(help="MLflow experiment.")]
Iteration = Annotated[int, typer.Option(help="Self-play iteration, from 1.")]
Shards = Annotated[int, typer.Option(help="Number of shards that the losers are drawn in.")]


def _overrides(value: str) -> dict[str, Any]:
    try:
        text = Path(value[1:]).read_text() if value.startswith("@") else value
        parsed = yaml.safe_load(text) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SpinError(
            f"expected overrides as YAML, JSON or @FILE, got {value!r} ({type(error).__name__}); correct it"
        ) from None
    if not isinstance(parsed, dict):
        raise SpinError(f"expected overrides as a mapping, got {value!r}; e.g. '{{train: {{beta: [3000]}}}}'")
    return parsed


def _tolerations(value: str) -> list[dict[str, str]]:
    try:
        parsed = yaml.safe_load(value) or []
    except yaml.YAMLError:
        parsed = None
    if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
        raise SpinError(f"expected tolerations as a list of mappings, got {value!r}; e.g. '[{{operator: Exists}}]'")
    return parsed


@app.command()
def preflight(
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    run_key: Annotated[str, typer.Option(help="Name of the run, where it is to be resumed.")] = "preflight",
    tracking_uri: TrackingUri = "",
    preset: Annotated[str, typer.Option(help="emoji-cpu, sd15-paper or sd15-lora.")] = "emoji-cpu",
    base_model: Annotated[str, typer.Option(help="Diffusers folder or hub name; empty: the preset's.")] = "",
    data_source: Annotated[str, typer.Option(help="Folder, .tar, .parquet or hf:NAME; empty: the preset's.")] = "",
    overrides: Annotated[str, typer.Option(help="Nested options as YAML or JSON, or @FILE.")] = "{}",
    iterations: Annotated[int, typer.Option(help="Self-play iterations.")] = 1,
    gpu_count: Annotated[int, typer.Option(help="Accelerators per pod; 0: none.")] = 0,
    gpu_node_selector: Annotated[str, typer.Option(help="Labels of the nodes to use, as YAML or JSON.")] = "{}",
    gpu_tolerations: Annotated[str, typer.Option(help="Taints to tolerate there, as YAML or JSON.")] = "[]",
) -> None:
    """Check a set-up before anything is computed; KUBECONFIG names the cluster that is looked at."""
    from spin.preflight import preflight as check
    from spin.preflight import refuse
    from spin.stages import Place

    place = Place(run_key, store_uri, store_endpoint, tracking_uri)
    options = (preset, base_model, data_source, _overrides(overrides), iterations)
    report = check(place, *options, gpu_count, _overrides(gpu_node_selector), _tolerations(gpu_tolerations))
    typer.echo(report.markdown)
    refuse(report.faults)


@app.command()
def prepare(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "spin-diffusion",
    preset: Annotated[str, typer.Option(help="emoji-cpu, sd15-paper or sd15-lora.")] = "emoji-cpu",
    base_model: Annotated[str, typer.Option(help="Diffusers folder or hub name; empty: the preset's.")] = "",
    data_source: Annotated[str, typer.Option(help="Folder, .tar, .parquet or hf:NAME; empty: the preset's.")] = "",
    overrides: Annotated[str, typer.Option(help="Nested options as YAML or JSON, or @FILE.")] = "{}",
    iterations: Annotated[int, typer.Option(help="Self-play iterations that will follow; only checked.")] = 1,
) -> None:
    """Begin a run: check everything, store the base model, turn real images into latents."""
    from spin.stages import Place
    from spin.stages.prepare import prepare as stage

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    _say(stage(place, preset, base_model, data_source, _overrides(overrides), iterations).facts)


@app.command()
def generate(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iteration: Iteration,
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "spin-diffusion",
    shard: Annotated[int, typer.Option(help="This shard, from 0.")] = 0,
    shards: Shards = 1,
) -> None:
    """Let the opponent draw the losers of one shard."""
    from spin.stages import Place
    from spin.stages.generate import generate as stage

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    _say(stage(place, iteration, shard, shards).facts)


@app.command()
def train(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iteration: Iteration,
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "spin-diffusion",
    shards: Shards = 1,
    processes: Annotated[int, typer.Option(help="Processes that share each batch, one per accelerator.")] = 1,
) -> None:
    """Train the player of one iteration."""
    from spin.stages import Place
    from spin.stages.train import train as stage

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    _say(stage(place, iteration, shards, processes).facts)


@app.command()
def score(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iteration: Annotated[int, typer.Option(help="Iteration to score; 0 is the base model.")],
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "spin-diffusion",
    report: Annotated[Path | None, typer.Option(help="Write the HTML report to this file.")] = None,
) -> None:
    """Score a player on the held-out prompts."""
    from spin.stages import Place
    from spin.stages.score import score as stage

    scored = stage(Place(run_key, store_uri, store_endpoint, tracking_uri, experiment), iteration)
    if report:
        try:
            report.write_text(scored.html)
        except OSError as error:
            raise SpinError(
                f"expected to write the report, got {error.strerror} ({report}); name another file"
            ) from None
    typer.echo(scored.markdown)


@app.command()
def register(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iterations: Annotated[int, typer.Option(help="Number of finished iterations.")],
    tracking_uri: TrackingUri = "",
    model_name: Annotated[str, typer.Option(help="Name in the MLflow registry.")] = "spin-diffusion",
    experiment: Experiment = "spin-diffusion",
) -> None:
    """Register every iteration's player and point the alias challenger at the best."""
    from spin.stages import Place
    from spin.stages.register import register as stage

    _say(stage(Place(run_key, store_uri, store_endpoint, tracking_uri, experiment), model_name, iterations).facts)


def _say(facts: dict[str, object]) -> None:
    typer.echo(json.dumps(facts, indent=2))


def main() -> None:
    """Run the command line; a condition that the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except SpinError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False, style="red")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
