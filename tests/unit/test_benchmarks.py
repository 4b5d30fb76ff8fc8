"""The benchmarks measure what they say: rounds, ratios, differences, and a plain step that is ours done slowly."""

import copy
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from benchmarks import sampling, scaling, tables, training
from benchmarks.measure import answer, interleaved, memory, rates, speed_up
from benchmarks.overhead import accounted
from benchmarks.sampling import difference
from benchmarks.training import Plain, config_of, data_of, trainer_of
from benchmarks.world import World
from spin import models
from spin.data.dataset import Dataset
from spin.families import Conditioning
from spin.models import Model
from tests import tiny

CPU = torch.device("cpu")


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    said: list[str] = []
    told = interleaved({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, CPU, repeats=2)
    assert said == ["a", "b"] * 3
    assert {name: len(found["seconds"]) for name, found in told.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_round_by_round() -> None:
    # A neighbour that makes the second round ten times slower changes neither ratio.
    fast, slow = {"seconds": [1.0, 10.0, 1.0]}, {"seconds": [3.0, 30.0, 3.0]}
    assert speed_up(fast, slow, 4, 4) == 3
    assert speed_up(fast, slow, 4, 2) == 6
    told = {"way": {"median": 2.0}}
    rates(told, {"way": 4}, {"way": 1e9}, 1e10)
    assert told == {"way": {"median": 2.0, "items_per_second": 2.0, "mfu": 0.2}}


def test_images_apart() -> None:
    one, other = np.zeros((2, 1, 1, 4), np.uint8), np.array([0, 0, 4, 20], np.uint8).reshape(1, 1, 1, 4)
    assert difference(one, other) == {"mean": 6.0, "share_above_8": 0.25}


@pytest.fixture
def place(tmp_path: Path) -> World:
    return World("tiny", models.load(tiny.base(tmp_path / "base"), CPU), tiny.RESOLUTION, 3.5)


@pytest.fixture
def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    one, other = (torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (1, 2))
    return one, other


@pytest.fixture
def data(tmp_path: Path, place: World, pixels: tuple[torch.Tensor, torch.Tensor]) -> Dataset:
    (tmp_path / "data").mkdir()
    ids = [f"p{i}" for i in range(8)]
    return data_of(tmp_path / "data", ids, place.prompts(8), *(place.model.encode(side) for side in pixels))


SIZES = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 2e-5}


def test_the_plain_step_learns_what_ours_does(
    place: World, data: Dataset, pixels: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 and with the autoencoder's mean, both lose the same in every step: they do the same work."""
    ours = trainer_of(copy.deepcopy(place.model), data, "fp32", False, **SIZES)
    plain = Plain(place.model, data, config_of(**SIZES), pixels, half=False)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", DiagonalGaussianDistribution.mode)
    for _ in range(2):
        # Ours reads latents that were kept in float16.
        assert plain() == pytest.approx(ours.train_step()["loss"], rel=2e-3)


def test_the_plain_gradient_is_ours(
    place: World, data: Dataset, pixels: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer_of(copy.deepcopy(place.model), data, "fp32", False, **SIZES)
    plain = Plain(place.model, data, config_of(**SIZES), pixels, half=False)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", DiagonalGaussianDistribution.mode)
    micro = [(0, row) for row in (3, 1, 6, 4)]
    plain.micro(micro, 1)
    ours.objective(ours.batch(micro)).loss.backward()
    wanted, found = (
        {name: weight.grad for name, weight in network.named_parameters()}
        for network in (ours.model.denoiser, plain.unet)
    )
    assert wanted.keys() == found.keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # Latents in float16 keep 2^-11 of each number.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-3 * scale, msg=name)
    assert any(float(gradient.abs().max()) > 0.1 * scale for gradient in found.values())


def test_the_plain_step_pays_for_its_own_work_alone(
    place: World, data: Dataset, pixels: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads none of our latents, and hears every prompt once a step, in the frozen parts' precision."""
    heard: list[tuple[int, torch.dtype]] = []
    encode = Model.encode_prompts

    def told(model: Model, prompts: list[str]) -> Conditioning:
        found = encode(model, prompts)
        heard.append((len(prompts), found.text.dtype))
        return found

    monkeypatch.setattr(Model, "encode_prompts", told)
    monkeypatch.setattr(Dataset, "winners", lambda *_: pytest.fail("a script has no latents"))
    plain = Plain(place.model, data, config_of(**SIZES), pixels, half=True)
    plain()
    plain()
    assert heard == [(4, torch.bfloat16)] * 4


@pytest.mark.parametrize(("name", "networks"), [("ours", 2), ("ours, SFT", 1), ("plain", 2)])
def test_nothing_is_alive_beside_a_way_whose_memory_is_taken(
    place: World, data: Dataset, monkeypatch: pytest.MonkeyPatch, name: str, networks: int
) -> None:
    def alive() -> set[int]:
        gc.collect()
        return {id(found) for found in gc.get_objects() if isinstance(found, UNet2DConditionModel)}

    others = alive() - {id(place.model.denoiser)}
    counts = []

    def step() -> dict[str, float]:
        counts.append(len(alive() - others))
        return {"resident_mib": 1.0}

    monkeypatch.setattr(training, "memory", lambda _: step())
    monkeypatch.setattr(training, "world", lambda *_: place)
    used = training.used(name, "tiny", str(data.folder), compiled=False, lora=0, batch=8, micro=4)
    assert used == {"resident_mib": 1.0}
    assert counts == [networks]


def test_memory_is_that_of_this_process() -> None:
    found = memory(CPU)
    assert found.keys() == {"resident_mib"}
    assert 100 < found["resident_mib"] < 100_000


def test_a_point_is_what_a_work_finds(capsys: pytest.CaptureFixture[str]) -> None:
    answer('{"work": "add", "one": 1, "other": 2}', {"add": lambda one, other: {"sum": one + other}})
    assert capsys.readouterr().out == '{"sum": 3}\n'


def test_iterations_are_played_one_on_another(place: World, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opponents: list[float] = []
    draw = scaling.sample_latents

    def drawn(model: Model, prompts: list[str], *others: Any) -> torch.Tensor:
        opponents.append(float(sum(weight.abs().sum() for weight in model.denoiser.parameters())))
        return draw(model, prompts, *others)

    monkeypatch.setattr(scaling, "world", lambda *_: place)
    monkeypatch.setattr(scaling, "sample_latents", drawn)
    told = scaling.playing("tiny", str(data.folder), batch=4, steps=2, iterations=3)
    assert list(told) == [1, 2, 3]
    assert all(spent["generate_seconds"] > 0 and spent["train_seconds"] > 0 for spent in told.values())
    assert len(set(opponents)) == 3, "every iteration has the player before as its opponent"


def test_where_a_demo_spent_its_time(tmp_path: Path) -> None:
    phases = {
        "prepare": {"seconds": 10},
        "generate": {"seconds": 20},
        "train": {"seconds": 30},
        "score": {"seconds": 20},
    }
    summary = {"phases": phases, "iterations": [{}, {}, {}], "seconds": {"pipeline": 100.0, "total": 120.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = accounted(tmp_path, import_seconds=2.5)
    assert found["share_outside_stages"] == 0.2
    # 8 stages: prepare, the base's scores, two iterations of three.
    assert found["import_seconds"] == 20
    assert found["share_outside_stages_and_imports"] == 0.4


def test_every_way_to_draw_is_ours(place: World) -> None:
    """In float32 the stock pipeline and ours draw the same images."""
    ways = {name: sampling.way(name, place, copy.deepcopy(place.model), 2, 1)[0] for name in sampling.names(CPU)[:3]}
    images = {name: draw() for name, draw in ways.items()}
    assert [len(drawn) for drawn in images.values()] == [1, 2, 2]
    assert difference(images[sampling.OURS], images[sampling.STOCK])["mean"] < 1


def test_the_notes_tables_are_what_the_results_say() -> None:
    text = tables.NOTES.read_text()
    assert len(tables.MARKED.findall(text)) == 5
    assert tables.filled(text) == text, "python -m benchmarks.tables writes them anew"
