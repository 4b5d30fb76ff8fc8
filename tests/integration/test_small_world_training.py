"""Every training script of the small world runs, goes on where it was, and exports what loads: on ten concepts."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from examples.emoji import autoencoder, base, classifier, judge, measure
from examples.emoji.world import BUILD, STYLES, Picture
from spin import emoji
from spin.scorers.clip import Clip
from spin.scorers.frechet import Features

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")
OTHERS = ("1F004", "1F0CF")
SECOND = 1 / 60


def tiny_world() -> tuple[np.ndarray, list[Picture]]:
    """OpenMoji drawings and, as the other styles, these in other colours; each style has one that is held out."""
    images, rows = [], []
    drawn = [(concept.codepoint, concept.prompt, True) for concept in emoji.concepts("train")[:8]]
    for k, (code, prompt, player) in enumerate(drawn + [(code, code.lower(), False) for code in OTHERS]):
        pixels = np.asarray(emoji.render_svg(emoji.openmoji_svg(code), 64))
        for s, style in enumerate(STYLES):
            images.append(np.roll(pixels, s, axis=2) if style != "openmoji" else pixels)
            rows.append(Picture(code, prompt, style, player and k == s, player))
    return np.stack(images), rows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the folder that the scripts build into, the world being tiny and little being drawn."""
    folder, threads = tmp_path_factory.mktemp("build"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for module in (autoencoder, base, classifier, judge, measure):
            patch.setattr(module, "build", tiny_world)
            for name, value in vars(module).copy().items():
                if isinstance(value, Path) and value.is_relative_to(BUILD):
                    patch.setattr(module, name, folder / value.relative_to(BUILD))
        patch.setattr(base, "VERSIONS", 2)
        patch.setattr(base, "SHEET", ("red apple",))
        patch.setattr(measure, "STEPS", 2)
        yield folder
    torch.set_num_threads(threads)


def goes_on(folder: Path, script: Callable[[float], None]) -> None:
    """Train twice; the second time from a step that a new start would not come to."""
    script(0.3 * SECOND)
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] >= 1
    assert state["elapsed"] >= 0.3
    (folder / "state.json").write_text(json.dumps(state | {"step": 10_000}))
    script(state["elapsed"] / 60 + 0.1 * SECOND)
    assert 10_000 < json.loads((folder / "state.json").read_text())["step"] < 10_100


def test_every_script_trains_goes_on_and_exports(built: Path) -> None:
    images, rows = tiny_world()
    pixels = autoencoder.tensor(images)

    goes_on(built / "autoencoder" / "joint", lambda minutes: autoencoder.main(minutes, batch=2, threads=1))
    goes_on(built / "autoencoder" / "decoder", lambda minutes: autoencoder.main(0, minutes, batch=2, threads=1))
    vae = AutoencoderKL.from_pretrained(built / "autoencoder" / "export")
    assert vae.encode(pixels[:2].cpu()).latent_dist.mean.shape == (2, *autoencoder.LATENTS)
    assert set(autoencoder.figures(vae.to(pixels.device), images, rows)) == {"known", "held_out", *STYLES}

    for seed in (0, 1):
        folder = built / "classifier" / f"seed-{seed}"
        goes_on(folder, lambda minutes, seed=seed: classifier.main(minutes, seed, batch=2, threads=1))
        assert set(json.loads((folder / "figures.json").read_text())) == {"known", "held_out"}
        assert Features(str(folder / "export"), CPU).of([emoji.render_svg(emoji.openmoji_svg("1F34E"), 64)]).shape[0]

    goes_on(built / "judge", lambda minutes: judge.main(minutes, batch=4, threads=1))
    for figures in json.loads((built / "judge" / "figures.json").read_text()).values():
        assert list(figures) == ["recall_at_1", "recall_at_5", "style_accuracy", "both"]
        assert figures["both"] <= min(figures["recall_at_1"], figures["style_accuracy"])
    assert len(Clip(str(built / "judge" / "export"), CPU).texts(["red apple", "owl, noto style"])) == 2

    goes_on(built / "base", lambda minutes: base.main(minutes, batch=4, threads=1))
    assert (built / "base" / "sheet.png").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(built / "base" / "export", safety_checker=None)
    assert pipe("red apple", num_inference_steps=1).images[0].size == (64, 64)

    measure.main(threads=1, chosen=4)
    figures = json.loads((built / "base" / "figures.json").read_text())
    assert all(math.isfinite(value) for row in figures.values() for value in row.values())
