"""The command line of a pipeline file: compile, check, upload, run."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.compiled import SERVERS, check_parameters, compile_pipeline, read_parameters
from spin.errors import SpinError, in_one_line

LOCAL = """Run the compiled file on this computer. Needs S3 and MLflow servers whose addresses --params has, with
gpu_count 0 and gpu_pool {} where there is no accelerator, and the keys in AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY."""


def main(pipeline: Callable[..., Any], choices: Mapping[str, Sequence[str]], default: Path) -> None:
    """Run the command line for ``pipeline``; a fault of the user's is one line and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help="Compile the pipeline; upload it where a KFP endpoint is configured; run it if asked to.")
    def command(
        output: Annotated[Path, typer.Option(help="Compiled file.")] = default,
        host: Annotated[str, typer.Option(envvar="KFP_HOST", help="KFP endpoint; empty: compile only.")] = "",
        namespace: Annotated[str, typer.Option(envvar="KFP_NAMESPACE", help="Profile namespace.")] = "",
        run: Annotated[bool, typer.Option("--run", help="Start a run after the upload.")] = False,
        local: Annotated[bool, typer.Option("--local", help=LOCAL)] = False,
        check: Annotated[bool, typer.Option("--check", help="Only check the pipeline and the parameters.")] = False,
        server: Annotated[str, typer.Option(help=f"Version of the KFP server: {', '.join(SERVERS)}.")] = SERVERS[-1],
        params: Annotated[Path | None, typer.Option(help="YAML file with pipeline parameters.")] = None,
    ) -> None:
        asked = [flag for flag, given in {"--run": run, "--local": local, "--check": check}.items() if given]
        if len(asked) > 1:
            raise SpinError(f"expected one of --run, --local and --check, got {' and '.join(asked)}; choose one")
        if params and not asked:
            raise SpinError(
                "expected --run, --local or --check beside --params, got none; add one: an upload has no parameters"
            )
        values = read_parameters(params) if params else {}
        compile_pipeline(pipeline, choices, output, server)
        check_parameters(output, values)
        typer.echo(f"compiled {output} ({output.stat().st_size / 1024:.0f} KiB)")
        if check:
            typer.echo("the pipeline and its parameters are in order")
        elif local:
            _local(output, values)
        elif _endpoint(host):
            _upload(output, host, namespace, values if run else None)
        elif run:
            raise SpinError("expected a KFP endpoint for --run, got none; set --host or KFP_HOST, or use --local")
        else:
            typer.echo(
                "no KFP endpoint is configured: set --host or KFP_HOST (and KFP_TOKEN) to upload, or use --local"
            )

    with in_one_line():
        app()


def _endpoint(host: str) -> bool:
    return bool(host or os.environ.get("KF_PIPELINES_ENDPOINT"))


def _local(package: Path, values: dict[str, Any]) -> None:
    from pipelines.local import run_local

    run_local(package, values, package.parent / "local")
    typer.echo("the pipeline has finished")


def _upload(package: Path, host: str, namespace: str, values: dict[str, Any] | None) -> None:
    from pipelines import upload

    client = upload.connect(host or None, namespace=namespace or None)
    uploaded = upload.upload(client, package, reuse=values is not None)
    made = "reused" if uploaded.reused else "created the pipeline with" if uploaded.created else "added"
    typer.echo(f"{made} version {uploaded.version_name}: {uploaded.url}")
    if values is not None:
        started = upload.run(
            client, uploaded, experiment="spin-diffusion", job_name=uploaded.version_name, params=values
        )
        typer.echo(f"started a run: {started.url}")
