"""Put the trained base and judge into the package, in half precision, with a model card.

``python -m examples.emoji.package``
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPModel

import spin.emoji
from examples.emoji.autoencoder import FOLDER as AUTOENCODER
from examples.emoji.autoencoder import psnr, tensor
from examples.emoji.base import FOLDER as BASE
from examples.emoji.base import pipeline, sheet
from examples.emoji.judge import FOLDER as JUDGE
from examples.emoji.world import build

TARGET = Path(spin.emoji.__file__).parent

CARD = """# The small world's base and judge

Trained from random weights by the scripts in `examples/emoji/` on {device}; no other weights went in.

| part | parameters | steps | minutes |
| --- | --- | --- | --- |
| autoencoder (64 px, 8x8 latents of 16 channels) | {vae_parameters:.2f} M | {vae_steps} | {vae_minutes:.0f} |
| text encoder and UNet (epsilon prediction) | {base_parameters:.2f} M | {base_steps} | {base_minutes:.0f} |
| judge (CLIPModel) | {judge_parameters:.2f} M | {judge_steps} | {judge_minutes:.0f} |

**Data.** Emoji drawings, 64 px on white: noto (Apache-2.0), twemoji (CC-BY-4.0), fluent-emoji-flat (MIT) from their
npm packages, OpenMoji (CC BY-SA 4.0) from PyPI; {concepts} concepts are drawn by the base. The OpenMoji drawings of the
validation and test concepts were never seen by any of the three; those concepts in the other styles were.

**Prompts.** `red apple` (any style may answer) or `red apple, openmoji style` (also noto, twemoji, fluent).

**Autoencoder.** PSNR on held-out OpenMoji drawings {psnr_held_out:.1f} dB, on drawings it knows {psnr_known:.1f} dB.

**Judge.** Among all {concepts} prompts, and among the four styles:

| drawings | R@1 | R@5 | style accuracy |
| --- | --- | --- | --- |
{judge_rows}

**Loss of the base** (mean over the last 100 steps): {curve}.

**Limits.** Toy images for testing the method and the pipeline; the autoencoder is soft, faces smear, and the base
partly recites what it has seen. No people, flags or text.

**Licence.** The weights are derived from CC BY-SA 4.0 and CC BY 4.0 drawings and are given under CC BY-SA 4.0.
Attribution: OpenMoji (openmoji.org), Twemoji (Twitter and contributors), Noto Emoji (Google), Fluent Emoji (Microsoft).
"""


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


def main() -> None:
    trained = StableDiffusionPipeline.from_pretrained(BASE / "export", safety_checker=None)
    vae = AutoencoderKL.from_pretrained(AUTOENCODER / "export")
    parts = {"base": trained, "vae": vae, "judge": CLIPModel.from_pretrained(JUDGE / "export", dtype=torch.float32)}
    pipe = pipeline(vae, trained.text_encoder, trained.tokenizer, trained.unet)
    sheet(pipe, BASE / "sheet.png")
    images, rows = build()
    figures = json.loads((JUDGE / "figures.json").read_text())
    names = {"known": "known", "held_out": "held-out OpenMoji", "held_out_autoencoded": "the same, autoencoded"}
    training = {"vae": state(AUTOENCODER / "joint"), "base": state(BASE), "judge": state(JUDGE)}
    if (AUTOENCODER / "decoder" / "state.json").exists():
        decoder = state(AUTOENCODER / "decoder")
        training["vae"]["elapsed"] += decoder["elapsed"]
        training["vae"]["step"] += decoder["step"]
    curve = training["base"]["curve"]
    card = CARD.format(
        device=f"{torch.get_num_threads()} CPU cores",
        vae_parameters=millions(vae),
        base_parameters=millions(trained.unet) + millions(trained.text_encoder),
        judge_parameters=millions(parts["judge"]),
        **{f"{part}_steps": found["step"] for part, found in training.items()},
        **{f"{part}_minutes": found["elapsed"] / 60 for part, found in training.items()},
        concepts=len({row.codepoint for row in rows if row.player}),
        psnr_held_out=psnr(vae, tensor(images[[i for i, row in enumerate(rows) if row.held_out]])),
        psnr_known=psnr(vae, tensor(images[[i for i, row in enumerate(rows) if not row.held_out][::9]])),
        judge_rows="\n".join(
            f"| {names[name]} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |"
            for name, row in figures.items()
        ),
        curve=", ".join(f"step {step} {loss:.3f}" for step, _, loss in curve[9 :: max(1, len(curve) // 8)]),
    )
    for name in ("base", "judge"):
        shutil.rmtree(TARGET / name, ignore_errors=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(TARGET / "base")
    # Where the weights were trained is nobody's business.
    for config in (TARGET / "base").rglob("*.json"):
        value = json.loads(config.read_text())
        if isinstance(value, dict) and value.pop("_name_or_path", None):
            config.write_text(json.dumps(value, indent=2) + "\n")
    shutil.copytree(JUDGE / "export", TARGET / "judge")
    (TARGET / "MODEL_CARD.md").write_text(card)
    size = sum(
        path.stat().st_size for name in ("base", "judge") for path in (TARGET / name).rglob("*") if path.is_file()
    )
    print(f"{size / 1e6:.1f} MB in {TARGET}")


if __name__ == "__main__":
    main()
