"""Self-play and its rivals on equal terms, as a Kubeflow pipeline: ``python pipelines/compare.py`` (as ``spin.py``).

One data set, one base, equal budgets; every arm at every training seed is a run of its own. The same file searches:
arms that differ in beta alone, played side by side, and a table on the validation prompts.
"""

import sys
from pathlib import Path

# As a script, Python puts this folder first on the path, where ``spin`` would be the other pipeline's file.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from kfp import dsl  # noqa: E402

from components.compare_players.component import compare_players  # noqa: E402
from components.plan_comparison.component import plan_comparison  # noqa: E402
from pipelines.placement import A100_80GB, place_on_cpu, with_retries, with_secrets  # noqa: E402
from pipelines.play import prepare_and_score_base, self_play  # noqa: E402
from pipelines.spin import CHOICES  # noqa: E402


@dsl.pipeline(name="play-arms", display_name="Play arms")
def play_arms(
    run_keys: list,
    iterations: int,
    shards: int,
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
    """Play every arm, at most four at a time; a pipeline of its own for the reason that ``self_play`` is one."""
    with dsl.ParallelFor(run_keys, parallelism=4, name="arms") as run_key:
        self_play(
            run_key=run_key,
            iterations=iterations,
            shards=shards,
            # Arms train side by side; one pod each is as fair and needs less.
            train_nodes=1,
            store_uri=store_uri,
            store_endpoint=store_endpoint,
            store_secret=store_secret,
            score_secret=score_secret,
            tracking_uri=tracking_uri,
            tracking_secret=tracking_secret,
            experiment=experiment,
            train_cpu=train_cpu,
            train_memory=train_memory,
            train_gpus=train_gpus,
            train_selector=train_selector,
            train_tolerations=train_tolerations,
            draw_cpu=draw_cpu,
            draw_memory=draw_memory,
            draw_gpus=draw_gpus,
            draw_selector=draw_selector,
            draw_tolerations=draw_tolerations,
        )


@dsl.pipeline(
    name="spin-comparison",
    display_name="SPIN-Diffusion and its rivals",
    description="Self-play, SFT and Diffusion-DPO on one data set, from one base, with equal budgets.",
)
def spin_comparison(
    preset: str = "emoji-cpu",
    iterations: int = 3,
    arms: dict = {},  # noqa: B006
    seeds: int = 1,
    split: str = "test",
    run_key: str = "",
    base_model: str = "",
    data_source: str = "",
    overrides: dict = {},  # noqa: B006
    shards: int = 1,
    experiment: str = "spin-diffusion",
    store_uri: str = "s3://spin",
    store_endpoint: str = "http://s3.mlflow:9000",
    store_secret: str = "spin-s3",
    score_secret: str = "spin-s3",
    tracking_uri: str = "http://mlflow.mlflow:5000",
    tracking_secret: str = "spin-mlflow",
    gpu_count: int = 1,
    gpu_pool: dict = A100_80GB,
    draw_pool: dict = {},  # noqa: B006
):
    """Self-play and its rivals on equal terms.

    Args:
        preset: A named full configuration; what the arms do not change is the same for all of them. emoji-cpu runs
            without accelerators if gpu_count is 0 and gpu_pool {}.
        iterations: Rounds of the arms that are self-play; 3 in the paper (sd15-paper).
        arms: Overrides by the arm's name, of train and of how losers are drawn, e.g. {"sft": {"train": {"objective":
            "sft"}}, "spin-2000": {"train": {"beta": [2000]}}}. Empty: SFT, SFT with LoRA, Diffusion-DPO (on the
            data's pairs where it was prepared with them, else on pairs that the judge ranks), and SPIN. A rival of
            self-play without steps gets as many as take the passes through the denoiser that the arm spin takes.
        seeds: Training seeds of every arm.
        split: Prompts that the table is on: test, or validation to search without touching the test prompts.
        run_key: Name of the run in the store. Empty: a new one. The name of an earlier run resumes it.
        base_model: Diffusers folder (on a disk or s3://) or hub name to start from. Empty: the preset's.
        data_source: Real images with captions: a folder, .tar or .parquet (on a disk or s3://), or hf:NAME. Empty: the
            preset's.
        overrides: Options laid over the preset for all arms, nested by stage.
        shards: Pods per arm that draw images side by side, for the losers and for the scores; 1: scoring has
            no further pod.
        experiment: MLflow experiment.
        store_uri: Bucket and prefix of the run's objects, s3://bucket/prefix.
        store_endpoint: Address of the S3 server, e.g. MinIO or SeaweedFS; the default is that of the manifests' own.
        store_secret: Kubernetes secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_DEFAULT_REGION if it
            is not us-east-1.
        score_secret: Kubernetes secret for tasks that score, in store_secret's place; its keys need not be able to
            write models.
        tracking_uri: Address of the MLflow server. Empty: no tracking.
        tracking_secret: Kubernetes secret with MLFLOW_TRACKING_USERNAME and _PASSWORD; may be absent.
        gpu_count: Accelerators (nvidia.com/gpu) of each pod that trains; pods that prepare data, sample or score take
            one, however many these are. 0 runs everything on the CPU.
        gpu_pool: Nodes to use, {"node_selector": {LABEL: VALUE}, "tolerations": [...]}; the default asks for A100s with
            80 GB.
        draw_pool: Nodes for pods that sample and score, written as gpu_pool is; spot nodes will do, for these pods go
            on where they were. Empty: those of gpu_pool.
    """
    where = {
        "store_uri": store_uri,
        "store_endpoint": store_endpoint,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
    }
    nodes = {"gpu_count": gpu_count, "gpu_pool": gpu_pool, "draw_pool": draw_pool}
    secrets = {"store_secret": store_secret, "tracking_secret": tracking_secret}

    options = {
        "run_key": run_key,
        "iterations": 1,
        "preset": preset,
        "base_model": base_model,
        "data_source": data_source,
        "overrides": overrides,
    }
    key, base, pool = prepare_and_score_base(options, where, nodes, secrets, score_secret, shards)

    planned = plan_comparison(run_key=key, arms=arms, iterations=iterations, seeds=seeds, **where).after(base)
    with_secrets(with_retries(place_on_cpu(planned, cpu="500m", memory="1Gi")), **secrets).set_display_name(
        "Plan comparison"
    )

    rivals = play_arms(
        run_keys=planned.outputs["rivals"],
        iterations=1,
        shards=shards,
        score_secret=score_secret,
        **where,
        **pool,
        **secrets,
    ).set_display_name("Rivals")
    players = play_arms(
        run_keys=planned.outputs["players"],
        iterations=iterations,
        shards=shards,
        score_secret=score_secret,
        **where,
        **pool,
        **secrets,
    ).set_display_name("Self-play")

    compared = compare_players(
        run_key=key,
        arms=arms,
        iterations=iterations,
        seeds=seeds,
        shards=shards,
        split=split,
        **where,
    ).after(rivals, players)
    with_secrets(with_retries(place_on_cpu(compared, cpu="1", memory="4Gi")), **secrets).set_display_name(
        "Compare players"
    )


if __name__ == "__main__":
    from pipelines.command import main

    main(spin_comparison, {**CHOICES, "split": ["test", "validation"]}, ROOT / "build" / "spin-comparison.yaml")
