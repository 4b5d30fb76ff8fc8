"""Scores against transformers' CLIPModel, and against cases whose answer is plain."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from spin import models
from spin.errors import SpinError
from spin.scorers import clip as module
from spin.scorers.clip import Clip, ClipScore, StyleShare, Towers
from spin.scoring import best_and_worst
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = ["cat", "a red hat", "dog.", "x", "0123456789 abc"]
TOLERANCE = 1e-4
"""Of 100 x cosine in float32, whose rounding is about 1e-5."""


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.judge(tmp_path_factory.mktemp("judge") / "clip")


@pytest.fixture(scope="module")
def clip(judge: Path) -> Clip:
    return Clip(str(judge), CPU)


def pictures(count: int) -> list[Image.Image]:
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 40, 40, 3), generator=draws, dtype=torch.uint8)
    return [Image.fromarray(image) for image in pixels.numpy()]


def logits(judge: Path, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """Return 100 * cosine of every image with every text, by the library's own forward pass."""
    model = CLIPModel.from_pretrained(judge).eval()
    words = CLIPTokenizer.from_pretrained(judge)(
        texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil.from_pretrained(judge)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(input_ids=words.input_ids, pixel_values=pixels)
        return 100 * out.logits_per_image / model.logit_scale.exp()


def test_clip_score_is_100_times_the_cosine_of_transformers(clip: Clip, judge: Path) -> None:
    images = pictures(5)
    ours = ClipScore(clip, "{prompt}").score(images, PROMPTS)
    theirs = logits(judge, images, PROMPTS)
    assert (ours.dtype, ours.shape, ours.device) == (torch.float32, (5,), CPU)
    torch.testing.assert_close(ours, theirs.diagonal(), rtol=0, atol=TOLERANCE)
    # The pairing matters: shifted prompts score differently.
    assert (ours - ClipScore(clip, "{prompt}").score(images, PROMPTS[1:] + PROMPTS[:1])).abs().min() > 10 * TOLERANCE


def test_the_template_is_filled_with_the_prompt_as_it_stands(clip: Clip, judge: Path) -> None:
    images, prompts = pictures(2), ["{0}", "a"]
    ours = ClipScore(clip, "{prompt}, hat").score(images, prompts)
    theirs = logits(judge, images, ["{0}, hat", "a, hat"])
    torch.testing.assert_close(ours, theirs.diagonal(), rtol=0, atol=TOLERANCE)


def test_style_share_is_the_share_of_best_fits(clip: Clip, judge: Path) -> None:
    images, styles = pictures(5), ("ink", "oil", "wax")
    ours = StyleShare(clip, styles).score(images, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        fit = logits(judge, [images[i]], [f"{prompt}, {style} style" for style in styles])[0]
        assert ours[i] == float(fit.argmax() == 0)


class Plane(Towers):
    """Stands for a CLIP whose texts and images are directions in the plane, named by their degrees."""

    def __init__(self) -> None:
        """It has no network."""

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        degrees = {
            "a, ink style": 0.0, "a, oil style": 90.0,
            "b, ink style": 180.0, "b, oil style": 270.0,
            "c, ink style": 45.0, "c, oil style": 45.0,
        }  # fmt: skip
        return self.directions([degrees[text] for text in texts])

    def images(self, images: Sequence[float]) -> torch.Tensor:
        return self.directions(images)

    @staticmethod
    def directions(degrees: Sequence[float]) -> torch.Tensor:
        radians = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([radians.cos(), radians.sin()], dim=-1)


def test_style_share_in_the_plane() -> None:
    scorer = StyleShare(Plane(), ("ink", "oil"))
    # a: ink at 0, oil at 90 degrees: 10 is ink, 80 is oil. b: ink at 180, oil at 270: 190 is ink, 260 is oil.
    # c: both at 45, a tie goes to the wanted style.
    scores = scorer.score([10, 80, 190, 260, 45], ["a", "a", "b", "b", "c"])  # type: ignore[list-item]
    assert scores.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert scores.dtype == torch.float32


def test_clip_score_in_the_plane() -> None:
    scorer = ClipScore(Plane(), "{prompt}, ink style")
    # cosines of 0, 60 and 180 degrees
    assert scorer.score([0, 60, 0], ["a", "a", "b"]).tolist() == pytest.approx([100.0, 50.0, -100.0], abs=1e-4)  # type: ignore[list-item]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_scores_do_not_depend_on_the_batch(clip: Clip, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    images = pictures(5)
    scorers = ClipScore(clip, "{prompt}"), StyleShare(clip, ("ink", "oil"))
    whole = [scorer.score(images, PROMPTS) for scorer in scorers]
    monkeypatch.setattr(module, "BATCH", batch)
    for scorer, wanted in zip(scorers, whole, strict=True):
        torch.testing.assert_close(scorer.score(images, PROMPTS), wanted, rtol=0, atol=TOLERANCE)


def test_scores_do_not_depend_on_neighbours_or_position(clip: Clip) -> None:
    images = pictures(5)
    scorer = ClipScore(clip, "{prompt}")
    whole = scorer.score(images, PROMPTS)
    torch.testing.assert_close(scorer.score(images[::-1], PROMPTS[::-1]), whole.flip(0), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(scorer.score(images[3:4], PROMPTS[3:4]), whole[3:4], rtol=0, atol=TOLERANCE)


def test_too_long_texts_are_cut(clip: Clip) -> None:
    # The tokenizer gives a token per letter, and 12 with start and end: ten letters are heard.
    long, heard, other = clip.texts(["a b c d e f g h i j k l", "a b c d e f g h i j", "a b c d e f g h i z"])
    torch.testing.assert_close(long, heard, rtol=0, atol=1e-6)
    assert not torch.allclose(long, other, atol=1e-4)


@pytest.mark.parametrize("content", [None, "pytorch_model.bin"])
def test_a_folder_without_safetensors_is_refused(judge: Path, tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_bytes((judge / "config.json").read_bytes())
    if content:
        (tmp_path / content).write_bytes(b"\x80\x04.")
    with pytest.raises(SpinError) as caught:
        Clip(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"expected a CLIP model with safetensors, got '{tmp_path}'")
    assert str(caught.value).endswith("set score.clip_model")


def test_damaged_weights_are_refused(judge: Path, tmp_path: Path) -> None:
    for path in judge.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(SpinError, match="expected a CLIP model with safetensors"):
        Clip(str(tmp_path), CPU)


class Brightness:
    """Likes bright images."""

    name = "brightness"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        assert len(images) == len(prompts)
        return torch.tensor([float(np.asarray(image).mean()) for image in images])


def test_the_best_and_the_worst_of_several_draws(made: Callable[[str], Path]) -> None:
    model = models.load(made("sd1"), CPU)
    draws = torch.stack([tiny.random_latents(5, seed=seed) for seed in (1, 2, 3)])
    best, worst = best_and_worst(draws, model, Brightness(), PROMPTS, "fp32")
    bright = torch.stack([model.decode(draw).float().mean(dim=(1, 2, 3)) for draw in draws])
    for row in range(5):
        assert torch.equal(best[row], draws[bright[:, row].argmax(), row])
        assert torch.equal(worst[row], draws[bright[:, row].argmin(), row])
    assert len(set(bright.argmax(0).tolist())) > 1


def test_pairs_are_not_ranked_by_what_is_no_number(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Brightness, "score", lambda *_: torch.full((2,), torch.nan))
    draws = tiny.random_latents(4, seed=1).view(2, 2, *tiny.LATENTS)
    with pytest.raises(SpinError, match=r"^expected finite scores from brightness, got nan for 'a'; "):
        best_and_worst(draws, models.load(made("sd1"), CPU), Brightness(), ["a", "b"], "fp32")
