"""SPIN-Diffusion as a Kubeflow pipeline: ``python pipelines/spin.py`` compiles it, uploads it, runs it.

python pipelines/spin.py                       compile to build/spin-diffusion.yaml; upload where KFP_HOST is set
python pipelines/spin.py --run --params p.yaml upload and start a run
python pipelines/spin.py --local --params p.yaml   run the compiled file on this computer
python pipelines/spin.py --check --params p.yaml   only check the pipeline and the parameters

``--local`` needs S3 and MLflow servers that answer at the parameters store_endpoint and tracking_uri, keys in
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and, without accelerators, gpu_count 0 and gpu_pool {}.
"""

import sys
from pathlib import Path

# As a script, Python puts this folder first on the path, where ``spin`` would be this very file.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from kfp import dsl  # noqa: E402

from components.register_model.component import register_model  # noqa: E402
from pipelines.placement import A100_80GB, place_on_cpu, with_retries, with_secrets  # noqa: E402
from pipelines.play import prepare_and_score_base, self_play  # noqa: E402

CHOICES = {"preset": ["emoji-cpu", "sd15-paper", "sd15-lora"]}
"""Parameters that the form shows as a dropdown."""


@dsl.pipeline(
    name="spin-diffusion",
    display_name="SPIN-Diffusion",
    description="Self-play fine-tuning of a text-to-image diffusion model: no reward model, no human pairs.",
)
def spin_diffusion(
    preset: str = "emoji-cpu",
    iterations: int = 2,
    run_key: str = "",
    base_model: str = "",
    data_source: str = "",
    overrides: dict = {},  # noqa: B006
    shards: int = 1,
    model_name: str = "spin-diffusion",
    gate: dict = {},  # noqa: B006
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
    train_nodes: int = 1,
):
    """Self-play fine-tuning of a text-to-image diffusion model.

    Args:
        preset: A named full configuration. emoji-cpu runs in minutes without accelerators (set gpu_count 0 and
            gpu_pool {}); sd15-paper is the paper's SD-1.5 run (set iterations 3); sd15-lora fits one GPU.
        iterations: Rounds of self-play, at least 1, and 3 in the paper (sd15-paper); play ends sooner once a round no
            longer improves the player. The same run_key with a higher number goes on where it ended.
        run_key: Name of the run in the store. Empty: a new run. The name of an earlier run resumes it.
        base_model: Diffusers folder (on a disk or s3://) or hub name to start from. Empty: the preset's.
        data_source: Real images with captions: a folder, .tar or .parquet (on a disk or s3://), or hf:NAME. Empty: the
            preset's.
        overrides: Options laid over the preset, nested by stage, e.g. {"train": {"beta": [3000]}}.
        shards: Pods that draw images side by side, for the losers and for the scores; 1: scoring has no further pod.
        model_name: Name of the registered model in MLflow.
        gate: When the challenger may become champion, e.g. {"better": {"clip_score": 0.5}, "promote": "automatic"}.
            Empty: it must surely be better than the champion (or the base), and is then recommended.
        experiment: MLflow experiment.
        store_uri: Bucket and prefix of the run's objects, s3://bucket/prefix.
        store_endpoint: Address of the S3 server, e.g. MinIO or SeaweedFS; the default is that of the manifests' own.
        store_secret: Kubernetes secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_DEFAULT_REGION if it
            is not us-east-1.
        score_secret: Kubernetes secret for tasks that score, in store_secret's place; its keys need not be able to
            write models.
        tracking_uri: Address of the MLflow server. Empty: no tracking and no registration.
        tracking_secret: Kubernetes secret with MLFLOW_TRACKING_USERNAME and _PASSWORD; may be absent.
        gpu_count: Accelerators (nvidia.com/gpu) of each pod that trains; pods that prepare data, sample or score take
            one, however many these are. 0 runs everything on the CPU.
        gpu_pool: Nodes to use, {"node_selector": {LABEL: VALUE}, "tolerations": [...]}; the default asks for A100s with
            80 GB.
        draw_pool: Nodes for pods that sample and score, written as gpu_pool is; spot nodes will do, for these pods go
            on where they were. Empty: those of gpu_pool.
        train_nodes: Nodes that train a player together, each with gpu_count accelerators; above 1 they are a TrainJob
            of Kubeflow Trainer, which must be installed.
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
        "iterations": iterations,
        "preset": preset,
        "base_model": base_model,
        "data_source": data_source,
        "overrides": overrides,
    }
    key, base, pool = prepare_and_score_base(
        options, where, nodes, secrets, score_secret, shards, gate=gate, train_nodes=train_nodes
    )

    played = self_play(
        run_key=key,
        iterations=iterations,
        shards=shards,
        train_nodes=train_nodes,
        **where,
        **pool,
        **secrets,
        score_secret=score_secret,
    )
    played.after(base)

    registered = register_model(run_key=key, iterations=iterations, model_name=model_name, gate=gate, **where)
    registered.after(played).set_display_name("Register model")
    with_secrets(with_retries(place_on_cpu(registered, cpu="1", memory="4Gi")), **secrets)


if __name__ == "__main__":
    from pipelines.command import main

    main(spin_diffusion, CHOICES, ROOT / "build" / "spin-diffusion.yaml")
