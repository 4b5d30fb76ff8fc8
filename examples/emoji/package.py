"""Put the trained base, judge and features into the package, in half precision, with a model card.

``python -m examples.emoji.package``
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPModel, ResNetModel

import spin.emoji
from examples.emoji.autoencoder import FOLDER as AUTOENCODER
from examples.emoji.autoencoder import figures as psnr_figures
from examples.emoji.base import FOLDER as BASE
from examples.emoji.base import SHEET, pipeline
from examples.emoji.classifier import FOLDER as CLASSIFIER
from examples.emoji.judge import FOLDER as JUDGE
from examples.emoji.loop import DEVICE
from examples.emoji.measure import BATCH, GUIDANCE, STEPS
from examples.emoji.world import STYLES, build

TARGET = Path(spin.emoji.__file__).parent

CARD = """# The small world's base, judge and features

Trained from random weights by the scripts in `examples/emoji/` on {devices}; no other weights went in.

![{sheet_prompts}, at seeds 0 to 9: unstyled, then by style ({styles})](sheet.png)

| part | parameters | steps | minutes |
| --- | --- | --- | --- |
| autoencoder (64 px, 16x16 latents of 8 channels) | {vae_parameters:.2f} M | {vae_steps} | {vae_minutes:.0f} |
| text encoder and UNet (v prediction) | {base_parameters:.2f} M | {base_steps} | {base_minutes:.0f} |
| teacher of the judge (ResNet, not in the package) | | {teacher_steps} | {teacher_minutes:.0f} |
| judge (CLIPModel) | {judge_parameters:.2f} M | {judge_steps} | {judge_minutes:.0f} |
| features of the Fréchet distance (ResNet) | {features_parameters:.2f} M | {features_steps} | {features_minutes:.0f} |

**Data.** Emoji drawings, 64 px on white: noto (Apache-2.0), twemoji (CC-BY-4.0), fluent-emoji-flat (MIT) from their
npm packages, OpenMoji (CC BY-SA 4.0) from PyPI; {concepts} concepts are asked for, a quarter of the base's training
drawings are of others. Autoencoder, judge and features also saw emojione (CC-BY-4.0) and noto-v1 (Apache-2.0).
400 (concept, style) pairs were seen by none of them: OpenMoji for all validation and test concepts, one of the other
styles for 250 training concepts. Each of these concepts was seen in other styles.

**Prompts.** `red apple` (any style may answer) or `red apple, openmoji style` (also noto, twemoji, fluent).

**Autoencoder.** PSNR in dB: known {psnr[known]}, held out {psnr[held_out]} ({psnr_styles}).

**Judge.** Among all {concepts} prompts, and among the four styles:

| drawings | R@1 | R@5 | style accuracy | both |
| --- | --- | --- | --- | --- |
{judge_rows}

**Base.** Drawings asked for by name and style at fixed seeds ({sampling}), named by the judge, beside real ones:

| pairs | drawings | R@1 | style accuracy | both |
| --- | --- | --- | --- | --- |
{base_rows}

Recited: of training drawings varied as in training, 95 % are at least {recited[threshold]} near to a training drawing
(cosine at 16 px, in the best of 225 alignments). So near are {known[recited_share]:.1%} of the base's drawings of known
pairs and {held_out[recited_share]:.1%} of held-out pairs, where {held_out_real[recited_share]:.1%} of the real drawings
are: some emoji look alike. Means: {known[nearest_training_cosine]}, {held_out[nearest_training_cosine]},
{held_out_real[nearest_training_cosine]}. Fréchet distance to the real drawings: {known[frechet_distance]} and
{held_out[frechet_distance]}. An image took {held_out[seconds_per_image]} s ({sampling}, batch {batch}).

**Losses** (mean over the last 100 steps).

{curves}

**Limits.** Toy images for testing the method and the pipeline. No people, flags or text.

**Licence.** The weights are derived from CC BY-SA 4.0 and CC BY 4.0 drawings and are given under CC BY-SA 4.0.
Attribution: OpenMoji (openmoji.org), Twemoji (Twitter and contributors), Noto Emoji (Google), Fluent Emoji (Microsoft),
EmojiOne.
"""


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


def main() -> None:
    trained = StableDiffusionPipeline.from_pretrained(BASE / "export", safety_checker=None)
    vae = AutoencoderKL.from_pretrained(AUTOENCODER / "export")
    judge = CLIPModel.from_pretrained(JUDGE / "export", dtype=torch.float32)
    features = ResNetModel.from_pretrained(CLASSIFIER / "seed-1" / "export")
    pipe = pipeline(vae, trained.text_encoder, trained.tokenizer, trained.unet).to(DEVICE)
    images, rows = build()
    named = json.loads((JUDGE / "figures.json").read_text())
    drawn = json.loads((BASE / "figures.json").read_text())
    training = {
        "vae": state(AUTOENCODER / "joint"),
        "base": state(BASE),
        "teacher": state(CLASSIFIER / "seed-0"),
        "judge": state(JUDGE),
        "features": state(CLASSIFIER / "seed-1"),
    }
    if (AUTOENCODER / "decoder" / "state.json").exists():
        decoder = state(AUTOENCODER / "decoder")
        training["vae"]["elapsed"] += decoder["elapsed"]
        training["vae"]["step"] += decoder["step"]
    psnr = psnr_figures(vae, images, rows)

    def cells(*values: float) -> str:
        return " | ".join(f"{value:.3f}" for value in values)

    def rows_of(name: str) -> list[str]:
        kinds = {"": "the base's", "_real": "real", "_real_autoencoded": "real, autoencoded"}
        shown = ("recall_at_1", "style_accuracy", "both")
        return [
            f"| {name.replace('_', '-')} | {title} | {cells(*(drawn[name + kind][figure] for figure in shown))} |"
            for kind, title in kinds.items()
        ]

    def curve(points: list[list[float]]) -> str:
        return ", ".join(f"step {step} {loss:.3f}" for step, _, loss in points[9 :: max(1, len(points) // 8)])

    card = CARD.format(
        devices=", ".join(sorted({found["device"] for found in training.values()})),
        sheet_prompts=", ".join(SHEET),
        styles=", ".join(STYLES),
        vae_parameters=millions(vae),
        base_parameters=millions(trained.unet) + millions(trained.text_encoder),
        judge_parameters=millions(judge),
        features_parameters=millions(features),
        **{f"{part}_steps": found["step"] for part, found in training.items()},
        **{f"{part}_minutes": found["elapsed"] / 60 for part, found in training.items()},
        concepts=len({row.codepoint for row in rows if row.player}),
        psnr=psnr,
        psnr_styles=", ".join(f"{style} {psnr[style]}" for style in STYLES),
        judge_rows="\n".join(f"| {name.replace('_', ' ')} | {cells(*row.values())} |" for name, row in named.items()),
        sampling=f"DPM-Solver++, {STEPS} steps, guidance {GUIDANCE}",
        batch=BATCH,
        base_rows="\n".join(row for name in ("known", "held_out") for row in rows_of(name)),
        **drawn,
        curves="\n".join(f"- {part}: {curve(found['curve'])}" for part, found in training.items()),
    )
    for name in ("base", "judge", "features"):
        shutil.rmtree(TARGET / name, ignore_errors=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(TARGET / "base")
    shutil.copytree(JUDGE / "export", TARGET / "judge")
    shutil.copytree(CLASSIFIER / "seed-1" / "export", TARGET / "features")
    for config in TARGET.glob("*/**/config.json"):
        value = json.loads(config.read_text())
        value.pop("_name_or_path", None)  # where the weights were trained is nobody's business
        if "dtype" in value:
            # transformers would load the text encoder in half precision, beside diffusers' UNet in single.
            value["dtype"] = "float32"
        config.write_text(json.dumps(value, indent=2) + "\n")
    (TARGET / "MODEL_CARD.md").write_text(card)
    shutil.copy(BASE / "sheet.png", TARGET)
    for name in ("base", "judge", "features"):
        size = sum(path.stat().st_size for path in (TARGET / name).rglob("*") if path.is_file())
        print(f"{name} {size / 1e6:.1f} MB in {TARGET / name}")


if __name__ == "__main__":
    main()
