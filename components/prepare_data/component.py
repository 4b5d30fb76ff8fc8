"""prepare-data: begin the run, store its base model and its data set."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def prepare_data(
    run_key: str,
    job_id: str,
    iterations: int,
    preset: str,
    base_model: str,
    data_source: str,
    overrides: dict,
    accelerators: int,
    store_uri: str,
    store_endpoint: str,
    tracking_uri: str,
    experiment: str,
    dataset: dsl.Output[dsl.Dataset],
    base: dsl.Output[dsl.Model],
    key: dsl.OutputPath(str),
):
    """Check everything that can be checked, then turn real images into latents.

    Args:
        run_key: Name of the run in the store; empty: made from the KFP run id. The same key resumes.
        job_id: KFP run id.
        iterations: Number of self-play iterations that will follow.
        preset: emoji-cpu, sd15-paper or sd15-lora.
        base_model: Diffusers folder (also s3://) or hub name; empty: the preset's.
        data_source: Folder, .tar or .parquet (also s3://), or hf:NAME; empty: the preset's.
        overrides: Nested options laid over the preset, e.g. {"train": {"beta": [3000]}}.
        accelerators: Accelerators that this task was given; it refuses to start with fewer.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
        tracking_uri: Address of the MLflow server.
        experiment: MLflow experiment.
        dataset: The data set's index.
        base: The base model's index.
        key: The run key. Not the return value: outputs called "Output" are mixed up by loops in kfp.local.
    """
    import os
    from pathlib import Path

    from spin.stages import Place
    from spin.stages.prepare import prepare

    os.environ["KFP_RUN_ID"] = job_id
    place = Place(run_key or f"run-{job_id}", store_uri, store_endpoint, tracking_uri, experiment, accelerators)
    index = prepare(place, preset, base_model, data_source, overrides, iterations)
    for artifact, name in ((dataset, "dataset"), (base, "base")):
        artifact.metadata.update(index.outputs[name].model_dump())
        Path(artifact.path).write_text(index.model_dump_json())
    dataset.metadata.update({key: value for key, value in index.facts.items() if key.endswith("rows")})
    Path(key).write_text(place.run_key)
