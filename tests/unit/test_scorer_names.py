"""Scorers by name, from this package and others; what goes in and comes out is looked at; the check of real weights."""

import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from typer.testing import CliRunner

from spin import preflight, scorers
from spin.__main__ import app
from spin.config import ScoreConfig
from spin.errors import SpinError
from spin.presets import preset, resolve
from spin.scorers import BUILT_IN, Setting, load, load_all, names, scored
from spin.scorers import verify as module
from spin.weights import Part, Weights
from tests import reference

CPU = torch.device("cpu")
PICTURES = [reference.picture(40, 40, i) for i in range(3)]


class Fixed:
    """Gives what it was told to."""

    name = "fixed"

    def __init__(self, values: torch.Tensor):
        self.values = values

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:  # noqa: ARG002
        return self.values


def setting(**options: object) -> Setting:
    return Setting(ScoreConfig(clip_model="emoji", **options), CPU, Weights())


def test_the_small_worlds_scorers_are_what_they_were() -> None:
    config = preset("emoji-cpu").score
    loaded = load_all(Setting(config, CPU, Weights()))
    assert [scorer.name for scorer in loaded] == ["clip_score", "style_share"]
    assert loaded[0].clip is loaded[1].clip
    assert loaded[0].template == "{prompt}, openmoji style"
    assert resolve("emoji-cpu", "", "./mine", {}).score.scorers == ("clip_score",)


def test_a_general_judge_that_is_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    config = resolve("emoji-cpu", "", "./mine", {}).score
    line = (
        r"^expected openai/clip-vit-large-patch14 at revision \w+ on the model hub, got LocalEntryNotFoundError; check "
        r"score\.clip_model and the network, or give a folder with these files$"
    )
    with pytest.raises(SpinError, match=line):  # before a run
        preflight._scorer(config, None)
    with pytest.raises(SpinError, match=line):  # and as it begins
        load("clip_score", Setting(config, CPU, Weights()))


@pytest.mark.parametrize("name", sorted({*BUILT_IN} - {"clip_score", "style_share"}))
def test_each_name_leads_to_its_scorer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without weights, which is what it says."""

    def fetch(part: Part) -> Path:
        raise SpinError(f"asked for {part.repo}")

    monkeypatch.setattr(Part, "fetch", fetch)
    wanted = f"expected weights for the scorer {name}, got none"
    if name == "pickscore":
        wanted = "asked for yuvalkirstain/PickScore_v1"
    with pytest.raises(SpinError, match=f"^{wanted}"):
        load(name, setting())


def test_an_outside_package_adds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside.py").write_text(
        "class Bright:\n    name = 'bright'\n    def score(self, images, prompts):\n        import torch\n"
        "        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])\n"
        "def load(setting):\n    return Bright()\n"
        "def split(setting):\n    one = Bright()\n    one.name = 'split'\n    return one\n"
    )
    info = tmp_path / "outside-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1\n")
    entries = "bright = outside:load\nlight = outside:load\nsplit = outside:split\n"
    (info / "entry_points.txt").write_text(f"[{scorers.GROUP}]\n{entries}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "bright" in names()
    with pytest.raises(SpinError, match=r"^expected a scorer whose name is 'light', as .+, got 'bright'; mend its"):
        load("light", setting())
    with pytest.raises(SpinError, match=r"^expected a scorer by another name than 'split'"):
        load("split", setting())
    found = load("bright", setting(scorers=("clip_score", "bright")))
    assert scored(found, PICTURES, ["a"] * 3).tolist() == [image.getpixel((0, 0))[0] for image in PICTURES]
    sys.modules.pop("outside", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorers": ["clip_score", "pickscor"]}, "expected a scorer, got 'pickscor'; did you mean 'pickscore'?"),
        ({"scorers": ["clip_score", "clip_score"]}, "expected each scorer once"),
        ({"scorers": ["clip_score", "style_share"], "styles": []}, "expected score.styles for style_share"),
        ({"scorers": []}, "expected score.scorers to have at least 1 item"),
        ({"weights": {"pickscor": {"source": "x"}}}, "expected a scorer, got 'pickscor'"),
        ({"weights": {"pickscore": {"source": "x", "digests": "y"}}}, "did you mean 'digest'?"),
        ({"precision": "fp8"}, "score.precision"),
    ],
)
def test_options_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpinError) as caught:
        resolve("sd15-lora", "", "", {"score": options})
    assert message in str(caught.value).replace("Tuple should", "expected score.scorers to").replace("to to", "to")
    assert "\n" not in str(caught.value)


def test_the_first_scorer_is_the_primary_one() -> None:
    assert resolve("emoji-cpu", "", "", {}).score.primary == "clip_score"
    scorers = ["style_share", "clip_score"]
    assert resolve("emoji-cpu", "", "", {"score": {"scorers": scorers}}).score.primary == "style_share"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1.0, float("nan"), 2.0]), "expected finite scores from fixed, got nan for 'b'"),
        (torch.tensor([1.0, 2.0, float("-inf")]), "got -inf for 'c'"),
        (torch.zeros(2), r"expected 3 float32 scores from fixed, got (2,) torch.float32"),
        (torch.zeros(3, 1), "got (3, 1)"),
        (torch.zeros(3, dtype=torch.float64), "got (3,) torch.float64"),
    ],
)
def test_scores_that_are_refused(values: torch.Tensor, message: str) -> None:
    with pytest.raises(SpinError) as caught:
        scored(Fixed(values), PICTURES, ["a", "b", "c"])
    assert message in str(caught.value)


def test_images_that_are_refused() -> None:
    with pytest.raises(SpinError, match="expected one image for each prompt, got 2 images for 3 prompts"):
        scored(Fixed(torch.zeros(3)), PICTURES[:2], ["a", "b", "c"])
    with pytest.raises(SpinError, match="expected an image for 'b', got bytes"):
        scored(Fixed(torch.zeros(3)), [PICTURES[0], b"png", PICTURES[2]], ["a", "b", "c"])  # type: ignore[list-item]


def test_verifying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' images and numbers, with the network between them stood in for."""
    PICTURES[0].save(tmp_path / "1.png")
    asked: list[str] = []

    def fetch(url: str) -> Path:
        asked.append(url.rsplit("/", 1)[-1])
        return tmp_path / "1.png"

    given = {"image_reward": torch.tensor([0.58, 0.28, -1.41, -2.03]), "pickscore": torch.tensor([20.0, 21, 22, 0.2])}
    monkeypatch.setattr(module, "download", fetch)
    monkeypatch.setattr(module, "load", lambda name, _: Fixed(given[name]))
    run = CliRunner()
    found = run.invoke(app, ["verify-scorers", "--scorer", "image_reward"], catch_exceptions=False)
    assert found.exit_code == 0
    assert found.stdout.count("agrees") == 4
    assert asked == ["1.webp", "2.webp", "3.webp", "4.webp"]
    # A lost scale is seen even where no number is published.
    with pytest.raises(SpinError, match="expected the published values, got others from pickscore"):
        run.invoke(app, ["verify-scorers", "--scorer", "pickscore"], catch_exceptions=False)
    given["image_reward"][2] += 0.1
    with pytest.raises(SpinError, match="got others from image_reward"):
        run.invoke(app, ["verify-scorers", "--scorer", "image_reward"], catch_exceptions=False)
    with pytest.raises(SpinError, match="nothing is published of others"):
        run.invoke(app, ["verify-scorers", "--scorer", "style_share"], catch_exceptions=False)
