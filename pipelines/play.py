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
from pipelines.placement import place_on_cpu, place_on_gpu, with_retries, with_secrets, with_store


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
    gpu_count: int,
    gpu_node_selector: dict,
    gpu_tolerations: list,
):
    """Draw and score held-out prompts side by side; a single shard is left to score-metrics, which saves its pods.

    A pipeline of its own: a task can wait for one, but not for a condition.
    """
    with dsl.If(shards > 1, name="several shards"):
        numbers = place_on_cpu(plan(count=shards, first=0), cpu="100m", memory="256Mi")
        numbers.set_display_name("Plan score shards")
        with dsl.ParallelFor(numbers.output, name="score shards") as shard:
            drawn = score_shard(
                run_key=run_key,
                iteration=iteration,
                shard=shard,
                shards=shards,
                accelerators=gpu_count,
                store_uri=store_uri,
                store_endpoint=store_endpoint,
                tracking_uri=tracking_uri,
                experiment=experiment,
            )
            place_on_gpu(with_retries(drawn), "4", "32Gi", gpu_count, gpu_node_selector, gpu_tolerations)
            with_secrets(drawn, score_secret, tracking_secret).set_display_name("Score shard")


def prepare_and_score_base(
    options: dict[str, Any],
    where: dict[str, Any],
    pool: dict[str, Any],
    secrets: dict[str, Any],
    score_secret: Any,
    shards: Any,
    **checked_alone: Any,
) -> tuple[Any, dsl.PipelineTask]:
    """Add the first tasks of a pipeline; return the run's key and the task that ends them.

    Args:
        options: prepare-data's own arguments.
        where: store_uri, store_endpoint, tracking_uri and experiment.
        pool: gpu_count, gpu_node_selector and gpu_tolerations.
        secrets: store_secret and tracking_secret.
        checked_alone: what preflight looks at beside these.
        score_secret: what the scoring tasks have in store_secret's place.
        shards: pods that share the held-out prompts.
    """
    servers = {name: value for name, value in where.items() if name != "experiment"}
    checked = preflight(**options, **checked_alone, **servers, **pool).set_display_name("Preflight")
    with_secrets(place_on_cpu(checked, cpu="1", memory="4Gi"), **secrets)
    passed = place_on_cpu(require_preflight(faults=checked.outputs["Output"]), cpu="100m", memory="1Gi")
    passed.set_display_name("Require preflight")

    prepared = prepare_data(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **options, **where)
    prepared.after(passed).set_display_name("Prepare data")
    with_secrets(place_on_gpu(prepared, "4", "32Gi", *pool.values()), **secrets)
    key = prepared.outputs["key"]
    tracking = secrets["tracking_secret"]
    asked = {"run_key": key, "iteration": 0, "shards": shards, **where}
    drawn = score_in_shards(score_secret=score_secret, tracking_secret=tracking, **asked, **pool)
    base = score_metrics(accelerators=pool["gpu_count"], **asked).after(drawn)
    base.set_display_name("Score base")
    with_secrets(with_retries(place_on_gpu(base, "4", "32Gi", *pool.values())), score_secret, tracking)
    return key, base


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
    gpu_count: int,
    gpu_node_selector: dict,
    gpu_tolerations: list,
):
    """Training in a pod of its own, or on several nodes; other tasks can't wait for one branch of two."""
    place = {
        "store_uri": store_uri,
        "store_endpoint": store_endpoint,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        "run_key": run_key,
        "iteration": iteration,
        "accelerators": gpu_count,
        "shards": shards,
        "losers": losers,
    }

    def placed(task: dsl.PipelineTask) -> dsl.PipelineTask:
        with_secrets(with_retries(task), store_secret, tracking_secret)
        return place_on_gpu(task, "8", "64Gi", gpu_count, gpu_node_selector, gpu_tolerations)

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
    gpu_count: int,
    gpu_node_selector: dict,
    gpu_tolerations: list,
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
    place = {**where, "accelerators": gpu_count}
    pool = {"gpu_count": gpu_count, "gpu_node_selector": gpu_node_selector, "gpu_tolerations": gpu_tolerations}

    def on_gpu(task: dsl.PipelineTask, cpu: str, memory: str, keys: Any = store_secret) -> dsl.PipelineTask:
        with_secrets(with_retries(task), keys, tracking_secret)
        return place_on_gpu(task, cpu, memory, *pool.values())

    numbers = place_on_cpu(plan(count=shards, first=0), cpu="100m", memory="256Mi").set_display_name("Plan shards")
    with dsl.ParallelFor(numbers.output, name="shards") as shard:
        drawn = on_gpu(generate_synthetic(shard=shard, shards=shards, **place), cpu="4", memory="32Gi")
        drawn.set_display_name("Generate losers")
    trained = train_player(
        shards=shards,
        train_nodes=train_nodes,
        losers=dsl.Collected(drawn.outputs["losers"]),
        store_secret=store_secret,
        tracking_secret=tracking_secret,
        **where,
        **pool,
    ).set_display_name("Train player")
    judged = score_in_shards(
        shards=shards,
        score_secret=score_secret,
        tracking_secret=tracking_secret,
        **where,
        **pool,
    ).after(trained)
    scored = on_gpu(score_metrics(shards=shards, **place), cpu="4", memory="32Gi", keys=score_secret)
    scored.after(judged).set_display_name("Score player")


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
    gpu_count: int,
    gpu_node_selector: dict,
    gpu_tolerations: list,
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
    numbers = place_on_cpu(plan(count=iterations, first=1), cpu="100m", memory="256Mi")
    numbers.set_display_name("Plan iterations")
    with dsl.ParallelFor(numbers.output, parallelism=1, name="iterations") as iteration:
        asked = continue_play(iteration=iteration, run_key=run_key, store_uri=store_uri, store_endpoint=store_endpoint)
        place_on_cpu(asked, cpu="500m", memory="1Gi")
        with_store(with_retries(asked), store_secret).set_display_name("Continue play")
        with dsl.If(asked.output == True, name="worth playing"):  # noqa: E712
            # A pipeline of its own again: the compiler lets a pod's settings of the inner score-metrics overwrite
            # those of the outer one, and only plain parameters have the same names in both.
            spin_iteration(
                iteration=iteration,
                shards=shards,
                train_nodes=train_nodes,
                store_secret=store_secret,
                score_secret=score_secret,
                tracking_secret=tracking_secret,
                gpu_count=gpu_count,
                gpu_node_selector=gpu_node_selector,
                gpu_tolerations=gpu_tolerations,
                **where,
            )
