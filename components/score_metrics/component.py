"""score-metrics: draw held-out prompts with a player, or gather what shards drew, score and report."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def score_metrics(
    run_key: str,
    iteration: int,
    shards: int,
    accelerators: int,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    metrics: dsl.Output[dsl.Metrics],
    contact_sheet: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
):
    """Score the player of an iteration (0: the base model) on held-out prompts, beside all earlier iterations.

    Args:
        run_key: Name of the run in the store.
        iteration: Self-play iteration; 0 is the base model.
        shards: Number of shards that were drawn before; 1: this task draws.
        accelerators: Accelerators that this task was given; it refuses to start with fewer.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        metrics: Means on the test prompts.
        contact_sheet: The report: the same prompts and seeds in every iteration, changes, curves.
        table: Every metric with its interval.
    """
    from pathlib import Path

    from spin import report
    from spin.stages import Place
    from spin.stages.score import score

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment, accelerators)
    scored = score(place, iteration, shards)
    for name, value in report.scalars(scored.index).items():
        metrics.log_metric(name, value)
    Path(contact_sheet.path).write_text(scored.html)
    Path(table.path).write_text(scored.markdown)
