"""The small world's promises: what no model saw, how training resumes, and what the packaged models can do."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss

from examples.emoji import loop, world
from examples.emoji.loop import TimedTraining
from examples.emoji.text import STYLES, style_prompt
from examples.emoji.world import held_out_pairs, shows_held_out
from spin import emoji
from spin.errors import SpinError
from spin.models import find
from spin.scorers.clip import Clip
from spin.scorers.frechet import Features, frechet_distance

CPU = torch.device("cpu")


def test_splits_are_disjoint_in_concepts_and_prompts() -> None:
    concepts = emoji.concepts()
    assert len({concept.codepoint for concept in concepts}) == len({c.prompt for c in concepts}) == len(concepts)
    assert Counter(concept.split for concept in concepts) == {"train": 322, "validation": 50, "test": 100}


def test_400_pairs_are_held_out_one_style_a_concept() -> None:
    pairs = held_out_pairs()
    assert len(pairs) == 400 == len({codepoint for codepoint, _ in pairs})
    openmoji = {codepoint for codepoint, style in pairs if style == "openmoji"}
    assert openmoji == {concept.codepoint for concept in emoji.concepts() if concept.split != "train"}
    assert pairs == held_out_pairs()


def test_compositions_and_older_drawings_of_a_held_out_pair_are_held_out_too() -> None:
    pairs = {("1F408", "openmoji"), ("1F34E", "noto")}
    assert shows_held_out("1F408-200D-2B1B", "openmoji", pairs)
    assert shows_held_out("1F34E", "noto-v1", pairs)
    assert not shows_held_out("1F408", "noto", pairs)
    assert not shows_held_out("1F34E", "twemoji", pairs)


def line(folder: Path, seconds: float) -> tuple[TimedTraining, nn.Linear]:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    return TimedTraining(module, folder, seconds / 60, lr=1e-2, ema=0.9), module


def test_training_stops_at_its_time_and_goes_on_from_where_it_was(tmp_path: Path) -> None:
    x = torch.randn(64, 4)
    training, module = line(tmp_path, 0.5)
    for _ in training.run(lambda: mse_loss(module(x), x[:, :1]), every=10):
        break
    assert training.step == 10
    assert 0 < training.progress < 1
    kept = load_file(tmp_path / "weights.safetensors")
    again, other = line(tmp_path, 0.5)
    assert (again.step, again.elapsed) == (10, training.elapsed)
    assert torch.equal(other.weight, kept["weight"])
    assert sum(1 for _ in again.run(lambda: mse_loss(other(x), x[:, :1]), every=10)) > 1
    assert again.progress >= 1
    assert again.rate() == pytest.approx(0, abs=1e-9)
    # Nothing is left to do: a third start trains no step.
    done, third = line(tmp_path, 0.5)
    assert list(done.run(lambda: mse_loss(third(x), x[:, :1]))) == []


def test_training_that_goes_on_sees_other_batches_and_begins_with_the_same_weights(tmp_path: Path) -> None:
    def batches(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
        training, module = line(folder, 0.5)
        first, seen = module.weight.detach().clone(), []

        def loss() -> torch.Tensor:
            seen.append(torch.randn(8, 4))
            return mse_loss(module(seen[-1]), seen[-1][:, :1])

        next(training.run(loss, every=5))
        return first, seen

    (start, seen), (later, after) = batches(tmp_path / "one"), batches(tmp_path / "one")
    fresh, same = batches(tmp_path / "two")
    assert torch.equal(start, fresh)
    assert not torch.equal(start, later)
    assert all(torch.equal(a, b) for a, b in zip(seen, same, strict=True))
    assert not any(torch.equal(a, b) for a in seen for b in after)


def test_weights_and_state_are_kept_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when the state is written leaves what was kept before, the weights too."""
    training, module = line(tmp_path, 60)
    training.save()
    kept = module.weight.detach().clone()
    nn.init.ones_(module.weight)
    training.step = 100

    def full(_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", full)
        with pytest.raises(OSError, match="No space"):
            training.save()
    again, other = line(tmp_path, 60)
    assert again.step == 0
    assert torch.equal(other.weight, kept)


@pytest.mark.parametrize(("kind", "name"), [("cpu", "CPU"), ("cuda", "Some GPU")])
def test_the_state_names_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    monkeypatch.setattr(loop, "DEVICE", torch.device(kind))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    line(tmp_path, 60)[0].save()
    assert json.loads((tmp_path / "state.json").read_text())["device"] == name


def test_time_counts_what_is_queued_and_not_what_the_caller_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's steps are only queued; the mean of their losses waits for them."""
    clock = 0.0
    stack = torch.stack

    def spend(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    def waited(losses: list[torch.Tensor]) -> torch.Tensor:
        spend(5 if len(losses) == 10 else 0)  # gradients are stacked too
        return stack(losses)

    def loss() -> torch.Tensor:
        spend(1)
        return module(torch.ones(1, 4)).sum()

    monkeypatch.setattr(loop.time, "monotonic", lambda: clock)
    monkeypatch.setattr(torch, "stack", waited)
    training, module = line(tmp_path, 45)
    for _ in training.run(loss, every=10):
        assert training.elapsed == 1.5 * training.step
        spend(1000)  # an evaluation
    assert training.step == 30


def test_drawings_need_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "BUILD", tmp_path / "build")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpinError, match=r"^expected npm on the PATH, got none \(to fetch the drawings\); install"):
        world.fetch()
    (tmp_path / "npm").write_text(f"#!{sys.executable}\nraise SystemExit(7)\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(SpinError, match="got exit code 7"):
        world.fetch()


def test_the_lack_of_npm_is_said_in_one_line(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from examples.emoji import world; "
        "world.BUILD = pathlib.Path(sys.argv.pop()); world.run(world.main)"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "build")]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected npm")
    assert done.stderr.count("\n") == 1


def test_a_world_half_written_is_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index comes last: where it is, all is there."""
    drawing = {"left": 0, "body": '<rect width="8" height="8"/>'}
    names = {style: ({"1F34E": "red-apple"}, {"icons": {"red-apple": drawing}}) for style in world.ICONIFY}
    monkeypatch.setattr(world, "BUILD", tmp_path)
    monkeypatch.setattr(world, "fetch", lambda: tmp_path)
    monkeypatch.setattr(world, "iconify", lambda _, style: names[style])
    monkeypatch.setattr(world, "older", lambda *_: ({}, {"icons": {}}))
    replace: Callable[[Path, Path], Path] = Path.replace

    def killed(part: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        return replace(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            world.build()
    assert not (tmp_path / "world.json").exists()
    images, rows = world.build()
    again, same = world.build()
    assert images.shape == (4, 64, 64, 3)
    assert [row.style for row in rows] == list(world.STYLES)
    assert np.array_equal(images, again)
    assert rows == same
    assert {path.name for path in tmp_path.iterdir()} == {"world.npy", "world.json"}


def test_the_base_is_a_plain_pipeline_of_at_most_32_mb() -> None:
    folder = find("emoji")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 32e6
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


@pytest.fixture(scope="module")
def judge() -> Clip:
    return Clip("emoji", CPU)


def test_the_judge_names_drawings_that_it_never_saw(judge: Clip) -> None:
    """OpenMoji for the test concepts: content among all 472 prompts, style among the four."""
    known, unseen = [concept.prompt for concept in emoji.concepts()], emoji.concepts("test")
    images = [emoji.render_svg(emoji.openmoji_svg(concept.codepoint), 64) for concept in unseen]
    embedded = judge.images(images)
    named = [known[k] for k in (embedded @ judge.texts(known).T).argmax(1).tolist()]
    right = sum(name == concept.prompt for name, concept in zip(named, unseen, strict=True)) / len(unseen)
    styled = judge.texts([style_prompt(concept.prompt, style) for concept in unseen for style in STYLES])
    fit = (styled.view(len(unseen), len(STYLES), -1) @ embedded[:, :, None]).squeeze(-1).argmax(1)
    assert right >= 0.15
    assert float((fit == STYLES.index("openmoji")).float().mean()) >= 0.9


def test_the_features_tell_drawings_from_blots() -> None:
    folder = str(find("emoji").parent / "features")
    features = Features(folder, CPU)
    drawings = [emoji.render_svg(emoji.openmoji_svg(c.codepoint), 64) for c in emoji.concepts("validation")]
    one, other = features.of(drawings[:25]), features.of(drawings[25:])
    blots = features.of([image.resize((4, 4)).resize((64, 64)) for image in drawings[:25]])
    assert 0 < frechet_distance(one, other) < frechet_distance(blots, other)
