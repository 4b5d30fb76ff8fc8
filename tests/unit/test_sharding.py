"""Two processes that share one player's weights out train it as one that holds them all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spin import models
from spin.config import TrainConfig
from spin.data.dataset import Dataset, Latents
from spin.instruments import errors_on_grid, gradient_snr
from spin.processes import rank, spread
from spin.training import Trainer
from tests import tiny

CPU = torch.device("cpu")
PLAIN = {
    "beta": [20], "steps": [4], "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0,
    "decay_steps": 0, "checkpoint_every": 2, "max_winner_drift": 1000, "adam_epsilon": 1e-4, "max_grad_norm": 0.5,
    "sharding": "fsdp", "mixed_precision": "no",
}  # fmt: skip


def trainer(world: Path, options: dict[str, Any]) -> Trainer:
    data = Dataset(world / "data")
    losers = Latents([world / "losers.safetensors"])
    config = TrainConfig.model_validate(PLAIN | options)
    return Trainer(models.load(world / "base", CPU), data, losers, config, 1, "fp32")


def play(world: Path, work: Path, options: dict[str, Any], resume_from: Path | None = None) -> None:
    """Train as the train stage does; write what there is to see into ``work``."""
    player = trainer(world, options)
    before, snr = errors_on_grid(player), gradient_snr(player)
    local = sum(weight.to_local().numel() if player.sharded else weight.numel() for weight in player.weights().values())
    seen = {"whole": sum(weight.numel() for weight in player.weights().values()), "local": local, "snr": snr}
    seen["reference"] = sum(
        weight.to_local().numel() if player.sharded else weight.numel() for weight in player.reference.parameters()
    )
    player.run(lambda *_: None, lambda _: None, work, resume_from)
    after = errors_on_grid(player)
    seen["errors"] = [before.winner.tolist(), before.loser.tolist(), after.winner.tolist(), after.loser.tolist()]
    seen["history"] = [{name: value for name, value in row.items() if name != "seconds"} for row in player.history]
    (work / f"seen-{rank()}.json").write_text(json.dumps(seen))
    denoiser = player.player_denoiser()
    if rank() == 0:
        models.export(world / "base", denoiser, work / "player")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a base model, a data set of 24 pairs with 3 held-out ones, and its losers."""
    folder = tmp_path_factory.mktemp("sharding")
    tiny.base(folder / "base")
    data = Dataset(tiny.dataset(folder / "data", held_out=3))
    tiny.losers(folder / "losers.safetensors", [*data.ids, *(row.id for row in data.validation)])
    return folder


@pytest.mark.parametrize("options", [{"ema_decay": 0.5}, {"lora_rank": 4}], ids=["full", "lora"])
def test_a_sharded_player_learns_as_a_whole_one(world: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folders = [tmp_path / name for name in ("one", "two", "again", "fewer")]
    for folder in folders:
        folder.mkdir()
    one, two, again, fewer = folders
    play(world, one, options)
    spread(2, play, world, two, options)
    alone, *together = (json.loads(path.read_text()) for path in (one / "seen-0.json", *sorted(two.glob("seen-*"))))
    assert len(together) == 2
    # Weights, and the opponent's too, are in one process or the other.
    for name in ("local", "reference"):
        assert sum(seen[name] for seen in together) == alone[name]
        assert max(seen[name] for seen in together) < 0.8 * alone[name]
    for seen in together:
        for row, other in zip(alone["history"], seen["history"], strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(torch.tensor(seen["errors"]), torch.tensor(alone["errors"]), rtol=1e-4, atol=1e-5)
        assert seen["snr"] > 0
    names = [
        "player/unet/diffusion_pytorch_model.safetensors",
        *(f"checkpoint-00000{n}/training.safetensors" for n in (2, 4)),
    ]
    for name in names:
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-5)
    assert json.loads((two / "player/unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"

    spread(2, play, world, again, options, two / "checkpoint-000002")
    for path in sorted(two.glob("seen-*")):
        assert json.loads((again / path.name).read_text())["history"] == json.loads(path.read_text())["history"]
    for name in (names[0], names[2]):
        ours, theirs = load_file(two / name), load_file(again / name)
        assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    # One process alone goes on where two were stopped.
    play(world, fewer, options, two / "checkpoint-000002")
    for row, other in zip(alone["history"], json.loads((fewer / "seen-0.json").read_text())["history"], strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
