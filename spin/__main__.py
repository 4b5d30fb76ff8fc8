"""Command line: preflight, the pipeline's stages without KFP, promotion; ``python -m spin --help`` lists them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from spin.errors import SpinError, brief, in_one_line, printable

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
Registry = Annotated[str, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="Address of MLflow.")]
ModelName = Annotated[str, typer.Option(help="Name in the MLflow registry.")]
Reason = Annotated[str, typer.Option(help="Why; others will read it.")]
Experiment = Annotated[str, typer.Option(help="MLflow experiment.")]
Iteration = Annotated[int, typer.Option(help="Self-play iteration, from 1.")]
Shards = Annotated[int, typer.Option(help="Number of shards that the losers are drawn in.")]
Preset = Annotated[str, typer.Option(help="emoji-cpu, sd15-paper or sd15-lora.")]
BaseModel = Annotated[str, typer.Option(help="Diffusers folder (also s3://) or hub name; empty: the preset's.")]
DataSource = Annotated[
    str, typer.Option(help="Folder, .tar or .parquet (also s3://), or hf:NAME; empty: the preset's.")
]
Overrides = Annotated[str, typer.Option(help="Nested options as YAML or JSON, or @FILE.")]
Gate = Annotated[str, typer.Option(help="The gate's policy as YAML or JSON, or @FILE; see docs/registry.md.")]


def _mapping(option: str, value: str, example: str = "{train: {beta: [3000]}}") -> dict[str, Any]:
    from spin.config import MAX_YAML, plain_yaml

    text = value
    try:
        if value.startswith("@"):
            with Path(value[1:]).open(encoding="utf-8") as file:
                text = file.read(MAX_YAML + 1)
        parsed = plain_yaml(text) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        fault = printable(f"{type(error).__name__}: {getattr(error, 'problem', None) or error}")
        raise SpinError(f"expected {option} as YAML, JSON or @FILE, got {brief(value)} ({fault}); correct it") from None
    if not isinstance(parsed, dict):
        raise SpinError(f"expected {option} as a mapping, got {brief(value)}; e.g. '{example}'")
    return parsed


def _pool(option: str, value: str) -> dict[str, Any]:
    return _mapping(option, value, "{node_selector: {pool: a100}}")


def _gate(value: str) -> dict[str, Any]:
    return _mapping("gate", value, "{win_rate: 0.6}")


@app.command()
def preflight(
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    run_key: Annotated[str, typer.Option(help="Name of the run, where it is to be resumed.")] = "preflight",
    tracking_uri: TrackingUri = "",
    preset: Preset = "emoji-cpu",
    base_model: BaseModel = "",
    data_source: DataSource = "",
    overrides: Overrides = "{}",
    iterations: Annotated[int, typer.Option(help="Self-play iterations.")] = 1,
    gpu_count: Annotated[int, typer.Option(help="Accelerators of each pod or node that trains; 0: none.")] = 0,
    gpu_pool: Annotated[str, typer.Option(help="node_selector and tolerations of the nodes to use, as YAML.")] = "{}",
    draw_pool: Annotated[str, typer.Option(help="The same for sampling and scoring; empty: as gpu_pool.")] = "{}",
    gate: Gate = "{}",
    train_nodes: Annotated[int, typer.Option(help="Nodes that train a player together.")] = 1,
) -> None:
    """Check a set-up before anything is computed; KUBECONFIG names the cluster that is looked at."""
    from spin.preflight import preflight as check
    from spin.preflight import refuse
    from spin.stages import Place

    place = Place(run_key, store_uri, store_endpoint, tracking_uri)
    options = (preset, base_model, data_source, _mapping("overrides", overrides), iterations)
    pool = (gpu_count, _pool("gpu_pool", gpu_pool), _pool("draw_pool", draw_pool))
    report = check(place, *options, *pool, _gate(gate), train_nodes)
    typer.echo(report.markdown)
    refuse(report.faults)


@app.command()
def prepare(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "spin-diffusion",
    preset: Preset = "emoji-cpu",
    base_model: BaseModel = "",
    data_source: DataSource = "",
    overrides: Overrides = "{}",
    iterations: Annotated[int, typer.Option(help="Self-play iterations that will follow; only checked.")] = 1,
) -> None:
    """Begin a run: check everything, store the base model, turn real images into latents."""
    from spin.stages import Place
    from spin.stages.prepare import prepare as stage

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    _say(stage(place, preset, base_model, data_source, _mapping("overrides", overrides), iterations).facts)


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
    processes: Annotated[
        int, typer.Option(help="Processes that share each batch; 0: one per accelerator that was promised.")
    ] = 0,
    accelerators: Annotated[
        int, typer.Option(help="Accelerators that this pod was promised; with fewer it stops.")
    ] = 0,
) -> None:
    """Train the player of one iteration."""
    from spin.stages import Place
    from spin.stages.train import train as stage

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment, accelerators)
    _say(stage(place, iteration, shards, processes).facts)


@app.command("score-shard")
def score_shard(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iteration: Annotated[int, typer.Option(help="Iteration to score; 0 is the base model.")],
    shard: Annotated[int, typer.Option(help="This shard, from 0.")],
    shards: Annotated[int, typer.Option(help="Number of shards that share the held-out prompts.")],
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "spin-diffusion",
) -> None:
    """Draw and score one shard of the held-out prompts; ``score`` with the same --shards gathers them."""
    from spin.stages import Place
    from spin.stages.score import score_shard as stage

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    _say({"images": stage(place, iteration, shard, shards)})


@app.command()
def score(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iteration: Annotated[int, typer.Option(help="Iteration to score; 0 is the base model.")],
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "spin-diffusion",
    shards: Annotated[int, typer.Option(help="Shards that score-shard has drawn; 1: draw here.")] = 1,
    report: Annotated[Path | None, typer.Option(help="Write the HTML report to this file.")] = None,
) -> None:
    """Score a player on the held-out prompts."""
    from spin.stages import Place
    from spin.stages.score import score as stage

    scored = stage(Place(run_key, store_uri, store_endpoint, tracking_uri, experiment), iteration, shards)
    if report:
        _write(report, scored.html)
    typer.echo(scored.markdown)


@app.command()
def report(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iteration: Annotated[
        int | None, typer.Option(help="Report up to this iteration; left out: the last one that is scored.")
    ] = None,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Make the report of a run again, from what the store holds of it."""
    from spin import page
    from spin.run import whole_iteration
    from spin.stages import Place

    asked = None if iteration is None else whole_iteration(iteration, 0)
    run = Place(run_key, store_uri, store_endpoint).open()
    pages = page.build(run, page.last_scored(run) if asked is None else asked)
    _write(output, pages.html)
    typer.echo(pages.markdown)
    typer.echo(f"written to {output}")


@app.command()
def register(
    run_key: RunKey,
    store_uri: StoreUri,
    store_endpoint: StoreEndpoint,
    iterations: Annotated[int, typer.Option(help="Number of finished iterations.")],
    tracking_uri: TrackingUri = "",
    model_name: Annotated[str, typer.Option(help="Name in the MLflow registry.")] = "spin-diffusion",
    experiment: Experiment = "spin-diffusion",
    gate: Gate = "{}",
) -> None:
    """Register every iteration's player, point the alias challenger at the best, judge it against the champion."""
    from spin.stages import Place
    from spin.stages.register import register as stage

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    _say(stage(place, model_name, iterations, _gate(gate)).facts)


@app.command()
def promote(
    tracking_uri: Registry,
    model_name: ModelName,
    reason: Reason,
    version: Annotated[str, typer.Option(help="Version to promote; empty: the challenger.")] = "",
) -> None:
    """Make a version champion by hand; the reason is kept with it."""
    from spin.stages.promote import promote as stage

    _say(stage(tracking_uri, model_name, reason, version))


@app.command()
def rollback(tracking_uri: Registry, model_name: ModelName, reason: Reason) -> None:
    """Return to the champion before the present one."""
    from spin.stages.promote import rollback as stage

    _say(stage(tracking_uri, model_name, reason))


def _write(path: Path, html: str) -> None:
    try:
        path.write_text(html)
    except OSError as error:
        raise SpinError(f"expected to write the report, got {error.strerror} ({path}); name another file") from None


@app.command()
def convert_weights(
    scorer: Annotated[str, typer.Argument(help="hpsv2_0, hpsv2_1, image_reward or aesthetic.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the weights, to be named in score.weights.")],
    original: Annotated[Path | None, typer.Option(help="The authors' .pt or .pth; without it, it is fetched.")] = None,
    digest: Annotated[str, typer.Option(help="SHA-256 that it must have; without it, the published one.")] = "",
    rest: Annotated[
        Path | None, typer.Option(help="Folder with what it lacks: a tokenizer, or OpenAI's CLIP ViT-L/14.")
    ] = None,
) -> None:
    """Turn the file of a scorer's authors into a folder of safetensors, once."""
    from spin.scorers.convert import convert

    _say({"source": str(folder.resolve()), "digest": convert(scorer, folder, original, digest, rest)})


@app.command()
def verify_scorers(
    only: Annotated[list[str] | None, typer.Option("--scorer", help="This one; repeat for several.")] = None,
    overrides: Annotated[str, typer.Option(help="Options with score.weights, as YAML or JSON, or @FILE.")] = "{}",
) -> None:
    """Score the authors' example images with their weights and compare with what they published."""
    from spin.config import override
    from spin.presets import preset
    from spin.scorers.verify import verify

    checks = verify(override(preset("sd15-paper"), _mapping("overrides", overrides)).score, only or [])
    table = Table("scorer", "example", "published", "here", "")
    for check in checks:
        wanted = "-" if check.published is None else f"{check.published:.4f}"
        table.add_row(check.scorer, check.example, wanted, f"{check.found:.4f}", check.word)
    Console().print(table)
    if failed := [check.scorer for check in checks if check.word == "differs"]:
        raise SpinError(
            f"expected the published values, got others from {', '.join(sorted({*failed}))}; check the weights' digest"
        )


def _say(facts: dict[str, object]) -> None:
    typer.echo(json.dumps(facts, indent=2))


def main() -> None:
    """Run the command line; a condition that the user can mend is one line on stderr and exit code 2."""
    with in_one_line():
        app()


if __name__ == "__main__":
    main()
