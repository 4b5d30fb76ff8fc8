"""What MLflow serves: a player as a pyfunc, prompts in, PNG images out.

MLflow copies this file into the model (models from code) and runs it wherever the model is served, so it imports
nothing of spin: the stock diffusers pipeline draws, with the solver and guided in the steps that the player was scored
with. Heavy libraries are imported when the model is loaded.
"""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

IMAGES_AT_ONCE = 8
UNGUIDED = math.nextafter(1, 2)
"""Guidance of a step outside the interval: the prompt's own prediction, but for rounding. At 1 the pipeline would leave
out the half without a prompt, which its inputs have from the first step to the last."""


def number(params: dict[str, Any], name: str, lowest: float, highest: float) -> Any:
    """Return a parameter that lies between two bounds; a server answers others with status 400 and this line."""
    value = params[name]
    if not lowest <= value <= highest:
        raise MlflowException.invalid_parameter_value(
            f"expected {name} from {lowest} to {highest}, got {value}; change it"
        )
    return value


def guidance_at(call: int, calls: int, scale: float, interval: Sequence[float]) -> float:
    """Return the guidance of one of the denoiser's ``calls``: ``scale`` from the first to the second share of them."""
    first, last = interval
    return scale if scale == 1 or first <= call / calls < last else UNGUIDED


class Player(PythonModel):
    """A text-to-image model; the artifact ``player`` is its diffusers folder.

    ``model_config`` holds ``resolution`` (pixels) and ``solver``: ``class`` and ``options`` of a diffusers scheduler,
    ``guidance_interval`` and ``most_guidance``.
    """

    def load_context(self, context: Any) -> None:
        """Load the weights onto the accelerator, where there is one."""
        import diffusers
        import torch

        folder = Path(context.artifacts["player"])
        index = json.loads((folder / "model_index.json").read_text())
        # diffusers wants to be told of parts that a player does without, e.g. SD-1.5's safety checker.
        absent = {n: None for n, entry in index.items() if isinstance(entry, list) and not (folder / n).is_dir()}
        on_gpu = torch.cuda.is_available()
        bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            torch_dtype=torch.bfloat16 if bfloat16 else torch.float32,
            **absent,
        ).to("cuda" if on_gpu else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        solver = context.model_config["solver"]
        kind = getattr(diffusers, solver["class"])
        self.pipeline.scheduler = kind.from_config(self.pipeline.scheduler.config, **solver["options"])
        self.guidance_interval, self.most_guidance = solver["guidance_interval"], solver["most_guidance"]
        self.resolution = int(context.model_config["resolution"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Return ``image`` (PNG) for each ``prompt``; equal seeds draw equal images, whatever else is asked for."""
        import torch

        steps = number(params, "num_inference_steps", 1, self.pipeline.scheduler.config.num_train_timesteps)
        guidance = number(params, "guidance_scale", 1, self.most_guidance)
        seed = number(params, "seed", 0, 2**63 - 1)
        prompts, drawn = model_input["prompt"].tolist(), []

        def guide_next(pipeline: Any, call: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
            pipeline._guidance_scale = guidance_at(call + 1, pipeline.num_timesteps, guidance, self.guidance_interval)
            return {}

        for start in range(0, len(prompts), IMAGES_AT_ONCE):
            some = prompts[start : start + IMAGES_AT_ONCE]
            drawn += self.pipeline(
                some,
                num_inference_steps=steps,
                guidance_scale=guidance_at(0, 1, guidance, self.guidance_interval),
                callback_on_step_end=guide_next,
                height=self.resolution,
                width=self.resolution,
                generator=[torch.Generator().manual_seed(seed) for _ in some],
            ).images
        return pd.DataFrame({"image": [_png(image) for image in drawn]})


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


set_model(Player())
