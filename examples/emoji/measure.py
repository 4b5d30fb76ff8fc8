"""Measure the trained base with the judge: ``python -m examples.emoji.measure``; with ``--shipped``, the package's.

Writes ``figures.json`` and a sheet to ``build/emoji/base``, or ``build/emoji/shipped``: whether drawings asked for by
name show what was asked, in the style asked, beside the real drawings as the ceiling; whether the base recites; and the
Fréchet distance to the real drawings.

A training drawing that was learnt by heart comes back shifted, turned or scaled, as the base saw it, so a drawing is
compared with the training drawings in 225 alignments. What counts as recited is measured: 95 % of training drawings
that were varied as in training and went through the autoencoder are at least as near to their originals.
"""

import json
import math
import time
from itertools import product
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from examples.emoji.autoencoder import reconstruct, tensor
from examples.emoji.base import FOLDER, sheet, varied
from examples.emoji.classifier import FOLDER as CLASSIFIER
from examples.emoji.judge import FOLDER as JUDGE
from examples.emoji.loop import DEVICE
from examples.emoji.text import style_prompt
from examples.emoji.world import BUILD, STYLES, Picture, build, run
from spin.models import find
from spin.scorers.clip import Clip
from spin.scorers.frechet import Features, frechet_distance

SHIPPED = BUILD / "shipped"
"""Where the figures of the package's models go: the card of newly trained ones must not tell of them."""
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


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return [N, 225, C, H, W]: ``x`` turned by -4, 0 and 4 degrees, scaled by 7 %, shifted by up to 2.6 pixels."""
    shifts = (-0.08, -0.04, 0.0, 0.04, 0.08)
    moved = []
    for angle, scale, dx, dy in product((-0.07, 0.0, 0.07), (0.93, 1.0, 1.07), shifts, shifts):
        c, d = scale * math.cos(angle), scale * math.sin(angle)
        theta = torch.tensor([[c, -d, dx], [d, c, dy]], device=x.device).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        moved.append(F.grid_sample(x - 1, grid, align_corners=False) + 1)
    return torch.stack(moved, 1)


def likeness(x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Cosine of each image to the nearest known one, in its best alignment, float32 [N]; at 16 pixels, less the mean.

    ``x`` and ``known`` are float32 [N, 3, 64, 64] in [-1, 1].
    """

    def flat(x: torch.Tensor) -> torch.Tensor:
        small = F.avg_pool2d(x, 4).flatten(1)
        return F.normalize(small - small.mean(1, keepdim=True), dim=-1)

    among = flat(known).T
    best = [(flat(aligned(part).flatten(0, 1)) @ among).amax(1).view(len(part), -1).amax(1) for part in x.split(16)]
    return torch.cat(best).cpu()


def main(
    threads: int = 2,
    chosen: Annotated[int, typer.Option(help="pairs of each kind")] = 400,
    shipped: Annotated[bool, typer.Option("--shipped", help="measure what the package has")] = False,
) -> None:
    torch.set_num_threads(threads)
    images, rows = build()
    judge = Clip("emoji" if shipped else str(JUDGE / "export"), DEVICE)
    features = Features("emoji" if shipped else str(CLASSIFIER / "seed-1" / "export"), DEVICE)
    pipe = StableDiffusionPipeline.from_pretrained(find("emoji") if shipped else FOLDER / "export", safety_checker=None)
    pipe.to(DEVICE).set_progress_bar_config(disable=True)
    vae: AutoencoderKL = pipe.vae
    own = list(dict.fromkeys(row.prompt for row in rows if row.player))
    texts = judge.texts(own)

    def judged(pictures: np.ndarray, pairs: list[Picture]) -> dict[str, float]:
        embedded = judge.images([Image.fromarray(x) for x in pictures])
        named = (embedded @ texts.T).argmax(1)
        right = np.array([own[k] == row.prompt for k, row in zip(named.tolist(), pairs, strict=True)])
        four = judge.texts([style_prompt(row.prompt, style) for row in pairs for style in STYLES])
        fits = (four.view(len(pairs), len(STYLES), -1) @ embedded[:, :, None]).squeeze(-1).argmax(1).tolist()
        styles = np.array([STYLES[k] == row.style for k, row in zip(fits, pairs, strict=True)])
        found = {"recall_at_1": right, "style_accuracy": styles, "both": right & styles}
        return {name: round(float(share.mean()), 3) for name, share in found.items()}

    learnt = np.array([i for i, row in enumerate(rows) if row.style in STYLES and not row.held_out])
    known = tensor(images[learnt])
    torch.manual_seed(0)
    recited = reconstruct(vae, varied(tensor(images[np.random.RandomState(1).permutation(learnt)[:chosen]])))
    threshold = float(likeness(recited, known).quantile(0.05))

    def near(x: torch.Tensor) -> dict[str, float]:
        found = likeness(x, known)
        share = float((found >= threshold).float().mean())
        return {"nearest_training_cosine": round(float(found.mean()), 3), "recited_share": round(share, 3)}

    order = np.random.RandomState(0).permutation(len(rows))
    figures: dict[str, dict[str, float]] = {"recited": {"threshold": round(threshold, 3)}}
    for name, held_out in (("known", False), ("held_out", True)):
        index = [i for i in order if rows[i].player and rows[i].held_out == held_out][:chosen]
        pairs, real = [rows[i] for i in index], tensor(images[index])
        started = time.monotonic()
        drawn = draw(pipe, [style_prompt(row.prompt, row.style) for row in pairs])
        seconds = (time.monotonic() - started) / len(drawn)
        soft = ((reconstruct(vae, real).permute(0, 2, 3, 1) + 1) * 127.5).round().byte().cpu().numpy()
        pictures, drawings = ([Image.fromarray(x) for x in array] for array in (drawn, images[index]))
        figures[name] = (
            judged(drawn, pairs)
            | near(tensor(drawn))
            | {
                "frechet_distance": round(frechet_distance(features.of(pictures), features.of(drawings)), 2),
                "seconds_per_image": round(seconds, 3),
            }
        )
        # A drawing that was learnt is its own nearest.
        figures[f"{name}_real"] = judged(images[index], pairs) | (near(real) if held_out else {})
        figures[f"{name}_real_autoencoded"] = judged(soft, pairs)
    folder = SHIPPED if shipped else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2))
    sheet(pipe, folder / "sheet.png")
    for name, row in figures.items():
        print(f"{name:28} {row}")


if __name__ == "__main__":
    run(main)
