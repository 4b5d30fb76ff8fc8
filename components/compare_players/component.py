"""compare-players: the tables over all arms of a comparison."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def compare_players(
    run_key: str,
    arms: dict,
    iterations: int,
    seeds: int,
    shards: int,
    split: str,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    metrics: dsl.Output[dsl.Metrics],
    table: dsl.Output[dsl.Markdown],
) -> str:
    """Gather scores and costs of all arms; return the best one on the validation prompts.

    Args:
        run_key: Name of the run that the arms began from.
        arms: As they were planned.
        iterations: As they were planned.
        seeds: As they were planned.
        shards: Number of shards that losers were drawn in.
        split: Prompts that the table is on, validation or test.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        metrics: The primary score of every row.
        table: Scores with intervals, standing against base and SFT, costs.
    """
    from pathlib import Path

    from spin.stages import Place
    from spin.stages.compare import gather

    place = Place(run_key, store_uri, store_endpoint, tracking_uri, experiment)
    compared = gather(place, arms, iterations, seeds, shards, split)
    facts = compared.index.facts
    for title, row in facts["rows"].items():
        metrics.log_metric(title, row[facts["primary"]]["value"])
    Path(table.path).write_text(compared.markdown)
    return facts["best_on_validation"]
