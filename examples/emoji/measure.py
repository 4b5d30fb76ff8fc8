"""Measure the trained base with the judge: ``python -m examples.emoji.measure``.

Writes ``build/emoji/base/figures.json``: whether drawings asked for by name show what was asked, in the style asked,
beside the real drawings as the ceiling; whether the base recites; and the Fréchet distance to the real drawings.
"""

import json
import time
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from examples.emoji.autoencoder import reconstruct, tensor
from examples.emoji.base import FOLDER
from examples.emoji.classifier import FOLDER as CLASSIFIER
from examples.emoji.judge import FOLDER as JUDGE
from examples.emoji.text import style_prompt
from examples.emoji.world import STYLES, Picture, build
from spin.scorers.clip import Clip
from spin.scorers.frechet import Features, frechet_distance

STEPS, GUIDANCE, BATCH = 20, 3.5, 64


def draw(pipe: StableDiffusionPipeline, prompts: list[str]) -> np.ndarray:
    """Return uint8 [N, 64, 64, 3]; image i has seed i."""
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        drawn = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise).images
        images += [np.asarray(image) for image in drawn]
    return np.stack(images)


def likeness(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Cosine of each image to the nearest known one, float32 [N]; images at 32 pixels, their mean subtracted."""

    def flat(x: np.ndarray) -> torch.Tensor:
        small = F.avg_pool2d(tensor(x).float(), 2).flatten(1)
        return F.normalize(small - small.mean(1, keepdim=True), dim=-1)

    return (flat(images) @ flat(known).T).amax(1).cpu().numpy()


def main(threads: int = 2, chosen: Annotated[int, typer.Option(help="pairs of each kind")] = 400) -> None:
    torch.set_num_threads(threads)
    images, rows = build()
    judge = Clip(str(JUDGE / "export"), torch.device("cpu"))
    features = Features(str(CLASSIFIER / "seed-1" / "export"), torch.device("cpu"))
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER / "export", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    own = list(dict.fromkeys(row.prompt for row in rows if row.player))
    texts = judge.texts(own)

    def judged(pictures: np.ndarray, pairs: list[Picture]) -> dict[str, float]:
        embedded = judge.images([Image.fromarray(x) for x in pictures])
        named = (embedded @ texts.T).argmax(1)
        right = np.array([own[k] == row.prompt for k, row in zip(named.tolist(), pairs, strict=True)])
        four = judge.texts([style_prompt(row.prompt, style) for row in pairs for style in STYLES])
        fits = (four.view(len(pairs), len(STYLES), -1) @ embedded[:, :, None]).squeeze(-1).argmax(1).tolist()
        styles = np.array([STYLES[k] == row.style for k, row in zip(fits, pairs, strict=True)])
        return {"recall_at_1": round(float(right.mean()), 3), "style_accuracy": round(float(styles.mean()), 3)}

    trained = np.array([row.player and not row.held_out for row in rows])
    order = np.random.RandomState(0).permutation(len(rows))
    figures: dict[str, dict[str, float]] = {}
    for name, held_out in (("known", False), ("held_out", True)):
        index = [i for i in order if rows[i].player and rows[i].held_out == held_out][:chosen]
        pairs = [rows[i] for i in index]
        started = time.monotonic()
        drawn = draw(pipe, [style_prompt(row.prompt, row.style) for row in pairs])
        seconds = (time.monotonic() - started) / len(drawn)
        near = likeness(drawn, images[trained])
        vae: AutoencoderKL = pipe.vae
        soft = ((reconstruct(vae, tensor(images[index])).permute(0, 2, 3, 1) + 1) * 127.5).round().byte().cpu().numpy()
        real = features.of([Image.fromarray(x) for x in images[index]])
        figures[name] = judged(drawn, pairs) | {
            "nearest_training_cosine": round(float(near.mean()), 3),
            "recited_share": round(float((near > 0.95).mean()), 3),
            "frechet_distance": round(frechet_distance(features.of([Image.fromarray(x) for x in drawn]), real), 2),
            "seconds_per_image": round(seconds, 3),
        }
        figures[f"{name}_real"] = judged(images[index], pairs) | (
            {"nearest_training_cosine": round(float(likeness(images[index], images[trained]).mean()), 3)}
            if held_out
            else {}
        )
        figures[f"{name}_real_autoencoded"] = judged(soft, pairs)
    (FOLDER / "figures.json").write_text(json.dumps(figures, indent=2))
    for name, row in figures.items():
        print(f"{name:28} {row}")


if __name__ == "__main__":
    typer.run(main)
