"""Instruments on held-out pairs, and the verdict: its three cases, and what training past use looks like."""

import copy
from pathlib import Path

import pytest
import torch

from spin import checkpoint, models
from spin.config import TrainConfig, foreign_to
from spin.data.dataset import Dataset, Latents
from spin.diffusion import Diffusion, Flow
from spin.instruments import GRADIENTS, GRID, GridErrors, errors_on_grid, gradient_snr, measure, verdict
from spin.training import Trainer, order
from tests import tiny

CPU = torch.device("cpu")
IMAGES = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a base, a data set of 8 pairs with 40 validation images, and the losers of both."""
    folder = tmp_path_factory.mktemp("instruments")
    tiny.base(folder / "base")
    data = Dataset(tiny.dataset(folder / "data", pairs=8, held_out=IMAGES))
    tiny.losers(folder / "losers.safetensors", [*data.ids, *(row.id for row in data.validation)])
    return folder


def trainer(world: Path, **options: object) -> Trainer:
    config: dict[str, object] = {
        "beta": [200], "steps": [1], "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0,
        "decay_steps": 0, "max_winner_drift": 1000,
    }  # fmt: skip
    unused = foreign_to(str(options.get("objective", "spin")), "given")
    config = {**{name: value for name, value in config.items() if name not in unused}, **options}
    losers = Latents([world / "losers.safetensors"]) if config.get("objective", "spin") == "spin" else None
    model, data = models.load(world / "base", CPU), Dataset(world / "data")
    return Trainer(model, data, losers, TrainConfig.model_validate(config), 1, "fp32")


def grid(winner: torch.Tensor, loser: torch.Tensor | None = None) -> GridErrors:
    return GridErrors(tuple(float(t) for t in range(winner.shape[1])), winner, loser)


def around(mean: float, spread: float, seed: int) -> torch.Tensor:
    return mean + spread * torch.randn(IMAGES, GRID, generator=torch.Generator().manual_seed(seed))


# --- the grid


def test_the_grid_is_the_middle_of_equal_parts_of_what_training_draws() -> None:
    middles = (torch.arange(GRID) + 0.5) / GRID
    diffusion, flow = Diffusion(torch.linspace(0.99, 0.01, 1000)), Flow(shift=3.0)
    assert diffusion.at(middles).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    drawn = torch.cat([flow.draw(torch.Generator().manual_seed(seed)) for seed in range(4000)])
    for share, timestep in zip(middles.tolist(), flow.at(middles).tolist(), strict=True):
        assert float((drawn < timestep).float().mean()) == pytest.approx(share, abs=0.03)


def test_errors_are_those_of_the_same_images_timesteps_and_noise_for_every_network(world: Path) -> None:
    one, other = errors_on_grid(trainer(world)), errors_on_grid(trainer(world, micro_batch_size=4, seed=5))
    assert one.winner.shape == (IMAGES, GRID)
    assert one.loser is not None
    assert other.loser is not None
    assert one.loser.shape == (IMAGES, GRID)
    torch.testing.assert_close(one.winner, other.winner)
    torch.testing.assert_close(one.loser, other.loser)
    assert not torch.equal(one.winner, one.loser)
    assert float(one.winner.min()) > 0


def test_without_losers_only_winners_are_measured(world: Path) -> None:
    assert errors_on_grid(trainer(world, objective="sft")).loser is None


def test_a_player_equal_to_its_opponent_changes_nothing(world: Path) -> None:
    player = trainer(world)
    before = errors_on_grid(player)
    gradient_snr(player)
    measures = measure(before, errors_on_grid(player))
    assert measures["error_change"] == {"value": 0, "low": 0, "high": 0}
    assert measures["margin"] == {"value": 0, "low": 0, "high": 0}
    assert measures["implicit_accuracy"]["value"] == 0
    assert verdict(measures)[0] == "converged"


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_measuring_leaves_training_as_it_was(world: Path, rank: int) -> None:
    touched, untouched = trainer(world, lora_rank=rank), trainer(world, lora_rank=rank)
    errors_on_grid(touched)
    gradient_snr(touched)
    assert touched.train_step() == untouched.train_step()
    for one, other in zip(
        checkpoint.trained(touched.model.denoiser).values(),
        checkpoint.trained(untouched.model.denoiser).values(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_gradient_snr_is_the_ratio_of_its_definition(world: Path) -> None:
    """Against the same figures from whole gradient vectors."""
    player = trainer(world, micro_batch_size=4, steps=[4])
    got = gradient_snr(player)
    places = order(player.winners.ids, 0, 1, 0, GRADIENTS * 4)
    rows = []
    for start in range(0, len(places), 4):
        player.objective(player.batch(places[start : start + 4])).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in player.model.denoiser.parameters()]).double())
        player.optimizer.zero_grad()
    gradients = torch.stack(rows)
    noise = gradients.var(0, unbiased=True).sum() / len(rows)
    assert got == pytest.approx(float(gradients.mean(0).square().sum() / noise), rel=1e-4)


def test_gradients_are_those_of_pairs_that_are_trained_on(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have no loser; two micro-batches, of one step of eight pairs, are the fewest that tell."""
    player, asked = trainer(world, micro_batch_size=4), []
    monkeypatch.setattr(player, "batch", lambda places, draw=player.batch: asked.append(places) or draw(places))
    assert gradient_snr(player) is not None
    assert [place for places in asked for place in places] == order(player.winners.ids, 0, 1, 0, 8)
    assert gradient_snr(trainer(world)) is None


# --- the verdict


def test_a_lower_error_on_real_images_is_an_improvement() -> None:
    before = around(1, 0.2, 0)
    word, reason = verdict(measure(grid(before), grid(before - around(0.02, 0.01, 1))))
    assert word == "improved"
    assert reason.startswith(f"error on {IMAGES} held-out real images -2.")
    assert reason.endswith("]: the error surely fell")


def test_telling_unseen_pairs_apart_without_harm_is_an_improvement() -> None:
    before, losers = around(1, 0.2, 0), around(0.5, 0.1, 2)
    same = before + around(0, 0.001, 1)
    measures = measure(grid(before, losers), grid(same, losers + around(0.01, 0.01, 3)))
    assert measures["error_change"]["low"] < 0 < measures["error_change"]["high"]
    word, reason = verdict(measures)
    assert word == "improved"
    assert "told from the opponent's 8" in reason
    assert reason.endswith("]: told apart surely better than by chance")


def test_no_sure_change_is_convergence() -> None:
    before, losers = around(1, 0.2, 0), around(0.5, 0.1, 2)
    measures = measure(grid(before, losers), grid(before + around(0, 0.005, 1), losers + around(0, 0.005, 3)))
    word, reason = verdict(measures)
    assert (word, reason.rpartition(": ")[2]) == ("converged", "no sure change")


def test_ruined_real_images_are_divergence_however_many_pairs_are_won() -> None:
    before, losers = around(1, 0.2, 0), around(0.5, 0.1, 2)
    measures = measure(grid(before, losers), grid(before + around(0.05, 0.01, 1), losers + 1))
    assert measures["implicit_accuracy"]["value"] == 1
    word, reason = verdict(measures)
    assert (word, reason.rpartition(": ")[2]) == ("diverged", "the error surely rose by more than 1 %")


def test_a_held_out_score_decides_where_it_chooses() -> None:
    before = around(1, 0.2, 0)
    worse = measure(grid(before, None), grid(before + around(0.05, 0.01, 1), None))
    assert verdict(worse)[0] == "diverged"
    word, reason = verdict(worse, chosen=40)
    assert (word, reason.split(",")[0]) == ("improved", "best score at step 40")
    assert "error on" in reason
    assert verdict(worse, chosen=0)[0] == "converged"


def test_by_timestep_tells_where() -> None:
    before = torch.ones(IMAGES, GRID)
    after = before.clone()
    after[:, 2] -= 0.5
    columns = measure(grid(before), grid(after))["by_timestep"]
    assert columns["0002"] == {"error_change": -0.5}
    assert columns["0003"] == {"error_change": 0}


def test_who_is_told_from_whom_by_timestep() -> None:
    """By hand: 4 images, 2 timesteps; margin = what the loser's error gained less what the winner's did."""
    before = grid(torch.full((4, 2), 2.0), torch.full((4, 2), 1.0))
    winner = torch.tensor([[1.5, 2.0], [1.5, 2.0], [2.0, 2.5], [2.0, 2.5]])
    loser = torch.tensor([[1.0, 1.5], [0.75, 1.0], [1.25, 1.5], [0.5, 1.0]])
    # margins: 0.5, 0.5 / 0.25, 0 / 0.25, 0 (at 0.5 each) / -0.5, -0.5
    measures = measure(before, grid(winner, loser))
    assert measures["by_timestep"] == {
        "0000": {"error_change": -0.125, "implicit_accuracy": 0.75, "margin": 0.125},
        "0001": {"error_change": 0.125, "implicit_accuracy": 0.25, "margin": 0.0},
    }
    assert measures["margin"]["value"] == 0.0625
    assert measures["implicit_accuracy"]["value"] == 0.5
    assert measures["error_change"]["value"] == 0


def test_a_model_trained_past_use_on_tiny_data_is_called_diverged(world: Path, tmp_path: Path) -> None:
    """Self-play on 8 pairs at a low beta: every one of them is won, unseen real images are ruined."""
    player = trainer(world, beta=[20], steps=[25], learning_rate=3e-3)
    before = errors_on_grid(player)
    player.run(lambda *_: None, lambda _: None, tmp_path)
    assert player.history[-1]["implicit_accuracy"] == 1
    assert player.history[-1]["loss"] < 0.1
    word, reason = verdict(measure(before, errors_on_grid(player)))
    assert word == "diverged"
    assert "+" in reason


def test_the_average_is_what_is_measured_and_exported(world: Path, tmp_path: Path) -> None:
    player = trainer(world, objective="sft", steps=[5], learning_rate=1e-2, ema_decay=0.9)
    player.run(lambda *_: None, lambda _: None, tmp_path)
    measured = errors_on_grid(player)
    models.export(world / "base", copy.deepcopy(player.player_denoiser()), tmp_path / "player")
    again = trainer(world, objective="sft")
    again.model.denoiser.load_state_dict(models.load(tmp_path / "player", CPU).denoiser.state_dict())
    torch.testing.assert_close(errors_on_grid(again).winner, measured.winner)
