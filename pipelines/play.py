"""The game as parts of pipelines: what it begins with, one iteration, and the loop over iterations."""

from typing import Any

from kfp import dsl

from components.continue_play.component import continue_play
from components.generate_synthetic.component import generate_synthetic
from components.plan.component import plan
from components.preflight.component import preflight
from components.prepare_data.component import prepare_data
from components.require_preflight.component import require_preflight
from components.score_metrics.component import score_metrics
from components.score_shard.component import score_shard
from components.spin_train.component import spin_train
from components.spin_train_nodes.component import spin_train_nodes
from pipelines.placement import of_work, place_on_cpu, place_on_gpu, with_retries, with_secrets, with_store

WORKS = ("train", "draw")
"""Kinds of work that pods have room and nodes for; the second is to prepare data, to sample and to score."""


@dsl.pipeline(name="score-in-shards", display_name="Score in shards")
def score_in_shards(
    run_key: str,
    iteration: int,
    shards: int,
    store_uri: str,
    store_endpoint: str,
    score_secret: str,
    tracking_uri: str,
    tracking_secret: str,
    experiment: str,
    draw_cpu: str,
    draw_memory: str,
    draw_gpus: int,
    draw_selector: dict,
    draw_tolerations: list,
):
    """Draw and score held-out prompts side by side; a single shard is left to score-metrics, which saves its pods.

    A pipeline of its own: a task can wait for one, but not for a condition.
    """
    pool = {
        "draw_cpu": draw_cpu,
        "draw_memory": draw_memory,
        "draw_gpus": draw_gpus,
        "draw_selector": draw_selector,
        "draw_tolerations": draw_tolerations,
    }
    with dsl.If(shards > 1, name="several shards"):
        numbers = place_on_cpu(plan(count=shards, first=0), cpu="100m", memory="256Mi")
        numbers.set_display_name("Plan score shards")
        with dsl.ParallelFor(numbers.output, name="score shards") as shard:
            drawn = score_shard(
                run_key=run_key,
                iteration=iteration,
                shard=shard,
                shards=shards,
                accelerators=draw_gpus,
                store_uri=store_uri,
                store_endpoint=store_endpoint,
                tracking_uri=tracking_uri,
                experiment=experiment,
            )
            place_on_gpu(with_retries(drawn), "draw", pool)
            with_secrets(drawn, score_secret, tracking_secret).set_display_name("Score shard")


@dsl.pipeline(name="score", display_name="Score")
def score(
    run_key: str,
    iteration: int,
    shards: int,
    store_uri: str,
    store_endpoint: str,
    score_secret: str,
    tracking_uri: str,
    tracking_secret: str,
    experiment: str,
    draw_cpu: str,
    draw_memory: str,
    draw_gpus: int,
    draw_selector: dict,
    draw_tolerations: list,
):
    """Score base or player.

    One pipeline for both: the compiler lets one copy's pod have the other's settings, and only plain parameters have
    the same names in both.
    """
    pool = {
        "draw_cpu": draw_cpu,
        "draw_memory": draw_memory,
        "draw_gpus": draw_gpus,
        "draw_selector": draw_selector,
        "draw_tolerations": draw_tolerations,
    }
    asked = {
        "run_key": run_key,
        "iteration": iteration,
        "shards": shards,
        "store_uri": store_uri,
        "store_endpoint": store_endpoint,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
    }
    drawn = score_in_shards(score_secret=score_secret, tracking_secret=tracking_secret, **asked, **pool)
    scored = score_metrics(accelerators=draw_gpus, **asked).after(drawn).set_display_name("Score metrics")
    with_secrets(with_retries(place_on_gpu(scored, "draw", pool)), score_secret, tracking_secret)


def prepare_and_score_base(
    options: dict[str, Any],
    where: dict[str, Any],
    nodes: dict[str, Any],
    secrets: dict[str, Any],
    score_secret: Any,
    shards: Any,
    **checked_alone: Any,
) -> tuple[Any, dsl.PipelineTask, dict[str, Any]]:
    """Add the first tasks of a pipeline; return the run's key, the task that ends them, and where the others go.

    Args:
        options: prepare-data's own arguments.
        where: store_uri, store_endpoint, tracking_uri and experiment.
        nodes: gpu_count, gpu_pool and draw_pool.
        secrets: store_secret and tracking_secret.
        checked_alone: what preflight looks at beside these.
        score_secret: what the scoring tasks have in store_secret's place.
        shards: pods that share the held-out prompts.
    """
    servers = {name: value for name, value in where.items() if name != "experiment"}
    checked = preflight(**options, **checked_alone, **servers, **nodes).set_display_name("Preflight")
    with_secrets(place_on_cpu(checked, cpu="1", memory="2Gi"), **secrets)
    store = {name: where[name] for name in ("store_uri", "store_endpoint")}
    passed = require_preflight(faults=checked.outputs["faults"], **store).set_display_name("Require preflight")
    with_store(place_on_cpu(passed, cpu="100m", memory="1Gi"), score_secret)

    asked = ("cpu", "memory", "gpus", "selector", "tolerations")
    pool = {name: checked.outputs[name] for name in (f"{work}_{what}" for work in WORKS for what in asked)}
    prepared = prepare_data(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, accelerators=pool["draw_gpus"], **options, **where)
    prepared.after(passed).set_display_name("Prepare data")
    # Not on the nodes for sampling, which may go at any time: it has no retries.
    prepared_on = pool | {f"draw_{what}": pool[f"train_{what}"] for what in ("selector", "tolerations")}
    with_secrets(place_on_gpu(prepared, "draw", prepared_on), **secrets)
    key = prepared.outputs["key"]
    base = score(
        run_key=key,
        iteration=0,
        shards=shards,
        score_secret=score_secret,
        tracking_secret=secrets["tracking_secret"],
        **where,
        **of_work(pool, "draw"),
    ).set_display_name("Score base")
    return key, base, pool


@dsl.pipeline(name="train-player", display_name="Train player")
def train_player(
    run_key: str,
    iteration: int,
    shards: int,
    train_nodes: int,
    losers: dsl.Input[list[dsl.Dataset]],
    store_uri: str,
    store_endpoint: str,
    store_secret: str,
    tracking_uri: str,
    tracking_secret: str,
    experiment: str,
    train_cpu: str,
    train_memory: str,
    train_gpus: int,
    train_selector: dict,
    train_tolerations: list,
):
    """Training in a pod of its own, or on several nodes; other tasks can't wait for one branch of two."""
    place = {
        "store_uri": store_uri,
        "store_endpoint": store_endpoint,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        "run_key": run_key,
        "iteration": iteration,
        "accelerators": train_gpus,
        "shards": shards,
        "losers": losers,
    }

    pool = {
        "train_cpu": train_cpu,
        "train_memory": train_memory,
        "train_gpus": train_gpus,
        "train_selector": train_selector,
        "train_tolerations": train_tolerations,
    }

    def placed(task: dsl.PipelineTask) -> dsl.PipelineTask:
        with_secrets(with_retries(task), store_secret, tracking_secret)
        return place_on_gpu(task, "train", pool)

    with dsl.If(train_nodes > 1, name="on several nodes"):
        placed(spin_train_nodes(nodes=train_nodes, **place)).set_display_name("Train player on nodes")
    with dsl.Else(name="in one pod"):
        placed(spin_train(**place)).set_display_name("Train player")


@dsl.pipeline(name="spin-iteration", display_name="Iteration")
def spin_iteration(
    run_key: str,
    iteration: int,
    shards: int,
    train_nodes: int,
    store_uri: str,
    store_endpoint: str,
    store_secret: str,
    score_secret: str,
    tracking_uri: str,
    tracking_secret: str,
    experiment: str,
    train_cpu: str,
    train_memory: str,
    train_gpus: int,
    train_selector: dict,
    train_tolerations: list,
    draw_cpu: str,
    draw_memory: str,
    draw_gpus: int,
    draw_selector: dict,
    draw_tolerations: list,
):
    """One round of self-play: the opponent draws, the player trains, the player is scored."""
    where = {
        "store_uri": store_uri,
        "store_endpoint": store_endpoint,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        "run_key": run_key,
        "iteration": iteration,
    }
    pool = {
        "train_cpu": train_cpu,
        "train_memory": train_memory,
        "train_gpus": train_gpus,
        "train_selector": train_selector,
        "train_tolerations": train_tolerations,
        "draw_cpu": draw_cpu,
        "draw_memory": draw_memory,
        "draw_gpus": draw_gpus,
        "draw_selector": draw_selector,
        "draw_tolerations": draw_tolerations,
    }

    numbers = place_on_cpu(plan(count=shards, first=0), cpu="100m", memory="256Mi").set_display_name("Plan shards")
    with dsl.ParallelFor(numbers.output, name="shards") as shard:
        drawn = generate_synthetic(shard=shard, shards=shards, accelerators=draw_gpus, **where)
        with_secrets(with_retries(place_on_gpu(drawn, "draw", pool)), store_secret, tracking_secret)
        drawn.set_display_name("Generate losers")
    trained = train_player(
        shards=shards,
        train_nodes=train_nodes,
        losers=dsl.Collected(drawn.outputs["losers"]),
        store_secret=store_secret,
        tracking_secret=tracking_secret,
        **where,
        **of_work(pool, "train"),
    ).set_display_name("Train player")
    scored = score(
        shards=shards,
        score_secret=score_secret,
        tracking_secret=tracking_secret,
        **where,
        **of_work(pool, "draw"),
    )
    scored.after(trained).set_display_name("Score player")


@dsl.pipeline(name="self-play", display_name="Self-play")
def self_play(
    run_key: str,
    iterations: int,
    shards: int,
    train_nodes: int,
    store_uri: str,
    store_endpoint: str,
    store_secret: str,
    score_secret: str,
    tracking_uri: str,
    tracking_secret: str,
    experiment: str,
    train_cpu: str,
    train_memory: str,
    train_gpus: int,
    train_selector: dict,
    train_tolerations: list,
    draw_cpu: str,
    draw_memory: str,
    draw_gpus: int,
    draw_selector: dict,
    draw_tolerations: list,
):
    """The loop over iterations, one after another, while they are worth playing.

    A pipeline of its own, so that its inputs are plain parameters: kfp.local hands a loop's item to every input of the
    loop that is another task's output.
    """
    where = {
        "run_key": run_key,
        "store_uri": store_uri,
        "store_endpoint": store_endpoint,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
    }
    pool = {
        "train_cpu": train_cpu,
        "train_memory": train_memory,
        "train_gpus": train_gpus,
        "train_selector": train_selector,
        "train_tolerations": train_tolerations,
        "draw_cpu": draw_cpu,
        "draw_memory": draw_memory,
        "draw_gpus": draw_gpus,
        "draw_selector": draw_selector,
        "draw_tolerations": draw_tolerations,
    }
    numbers = place_on_cpu(plan(count=iterations, first=1), cpu="100m", memory="256Mi")
    numbers.set_display_name("Plan iterations")
    with dsl.ParallelFor(numbers.output, parallelism=1, name="iterations") as iteration:
        asked = continue_play(iteration=iteration, run_key=run_key, store_uri=store_uri, store_endpoint=store_endpoint)
        place_on_cpu(asked, cpu="500m", memory="1Gi")
        with_store(with_retries(asked), store_secret).set_display_name("Continue play")
        with dsl.If(asked.output == True, name="worth playing"):  # noqa: E712
            spin_iteration(
                iteration=iteration,
                shards=shards,
                train_nodes=train_nodes,
                store_secret=store_secret,
                score_secret=score_secret,
                tracking_secret=tracking_secret,
                **where,
                **pool,
            )
