"""One iteration of self-play: where it starts, what it may depend on, how it goes on and when it stops."""

import copy
import math
import shutil
import sysconfig
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from spin import checkpoint, models
from spin.config import TrainConfig, foreign_to
from spin.data.dataset import Dataset, Latents
from spin.diffusion import add_noise, denoising_error
from spin.errors import SpinError
from spin.families import Conditioning
from spin.presets import preset
from spin.seeding import noise_of
from spin.selection import Selection
from spin.training import Diverged, Stopped, Trainer, consumed, from_previous, learning_rate, order
from tests import tiny

CPU = torch.device("cpu")
PAIRS = 24
LN2 = 0.6931471824645996
"""ln 2 in float32."""
BOTH = pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a base model, a data set of 24 pairs and its losers."""
    folder = tmp_path_factory.mktemp("training")
    tiny.base(folder / "base")
    tiny.dataset(folder / "data", PAIRS)
    tiny.losers(folder / "losers.safetensors", Dataset(folder / "data").ids)
    return folder


def trainer(world: Path, iteration: int = 1, precision: str = "fp32", **options: object) -> Trainer:
    config: dict[str, object] = {
        "beta": [2000], "steps": [3], "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0,
        "decay_steps": 0, "checkpoint_every": 100, "max_winner_drift": 1000,
    }  # fmt: skip
    unused = foreign_to(str(options.get("objective", "spin")), "given")
    config = {**{name: value for name, value in config.items() if name not in unused}, **options}
    paired = options.get("objective", "spin") in ("spin", "dpo")
    losers = Latents([world / "losers.safetensors"]) if paired else None
    return Trainer(
        models.load(world / "base", CPU),
        Dataset(world / "data"),
        losers,
        TrainConfig.model_validate(config),
        iteration,
        precision,
    )


def run(player: Trainer, work: Path, resume_from: Path | None = None, keep: Path | None = None) -> list[dict[str, Any]]:
    """Train to the end, copy checkpoints to ``keep``, and return the history without seconds."""

    def on_checkpoint(folder: Path) -> None:
        if keep is not None:
            shutil.copytree(folder, keep / folder.name)

    player.run(lambda *_: None, on_checkpoint, work, resume_from)
    return [{name: value for name, value in row.items() if name != "seconds"} for row in player.history]


def weights(player: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in checkpoint.trained(player.model.denoiser).items()}


def places(*rows: int, epoch: int = 0) -> list[tuple[int, int]]:
    return [(epoch, row) for row in rows]


# --- where it starts


@BOTH
@pytest.mark.parametrize("micro", [8, 4])
def test_the_first_loss_is_ln_2(world: Path, rank: int, micro: int) -> None:
    first = trainer(world, lora_rank=rank, micro_batch_size=micro).train_step()
    # The player is its opponent: the margin is 0 to the last bit, so no pair is won.
    assert first["loss"] == LN2
    assert (first["margin"], first["winner_drift"], first["loser_drift"]) == (0.0, 0.0, 0.0)
    assert first["implicit_accuracy"] == 0.0
    assert first["error_winner"] == first["reference_error_winner"] > 0.1
    assert first["grad_norm"] > 0


@BOTH
def test_dpo_is_spin_on_given_pairs(world: Path, tmp_path: Path, rank: int) -> None:
    """The same loss, link and reference; only where the losers come from differs, and that is not the trainer's."""
    options = {"lora_rank": rank, "beta": [2000]}
    spin, dpo = trainer(world, **options), trainer(world, objective="dpo", **options)
    assert run(dpo, tmp_path) == run(spin, tmp_path)


@BOTH
def test_exact_spin_starts_at_ln_2_and_learns_to_tell_whole_trajectories(
    world: Path, tmp_path: Path, rank: int
) -> None:
    options = {"objective": "exact-spin", "trajectory_steps": 4, "trajectory_scale": 0.05, "lora_rank": rank}
    player = trainer(world, **options, steps=[12], learning_rate=3e-4)
    rows = run(player, tmp_path)
    assert rows[0]["loss"] == LN2
    assert (rows[0]["margin"], rows[0]["winner_drift"], rows[0]["implicit_accuracy"]) == (0.0, 0.0, 0.0)
    assert rows[0]["error_winner"] == rows[0]["reference_error_winner"] > 0.1
    last = rows[-3:]  # an epoch
    assert sum(row["loss"] for row in last) / 3 < 0.6
    assert min(row["margin"] for row in last) > 0
    assert min(row["implicit_accuracy"] for row in last) > 0.5


def test_exact_spin_in_micro_batches_is_the_same_step(world: Path) -> None:
    whole, parts = (
        trainer(world, objective="exact-spin", trajectory_steps=3, micro_batch_size=micro, max_grad_norm=1e9)
        for micro in (8, 2)
    )
    one, other = whole.train_step(), parts.train_step()
    assert other == pytest.approx(one, rel=1e-4)
    assert one["grad_norm"] > 0


def test_the_first_gradient_is_a_quarter_beta_of_winners_minus_losers(world: Path) -> None:
    player = trainer(world)
    denoiser, batch = player.model.denoiser, player.batch(places(*range(8)))
    player.objective(batch).loss.backward()
    gradients = [parameter.grad.clone() for parameter in denoiser.parameters()]

    def gradient(latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        noisy = add_noise(latents, batch.noise, batch.timestep, player.process.alphas_cumprod)
        predicted = denoiser(noisy, batch.timestep, encoder_hidden_states=batch.conditioning.text).sample
        return torch.autograd.grad(denoising_error(predicted, batch.noise).mean(), list(denoiser.parameters()))

    assert batch.loser is not None
    scale = max(float(found.abs().max()) for found in gradients)
    for found, winner, loser in zip(gradients, gradient(batch.winner), gradient(batch.loser), strict=True):
        # beta / 4 = 500; the tolerance is that of float32 sums over the batch, relative to the largest gradient
        torch.testing.assert_close(found, 500 * (winner - loser), rtol=0, atol=1e-5 * scale)


def test_the_first_step_is_adamws(world: Path) -> None:
    player = trainer(world, weight_decay=0.1, adam_epsilon=1e-12, max_grad_norm=1e9)
    before = weights(player)
    player.objective(player.batch(order(player.winners.ids, 0, 1, 0, 8))).loss.backward()
    signs = {name: value.grad.sign() for name, value in checkpoint.trained(player.model.denoiser).items()}
    large = {name: value.grad.abs() > 1e-3 for name, value in checkpoint.trained(player.model.denoiser).items()}
    player.optimizer.zero_grad()
    player.train_step()
    for name, after in weights(player).items():
        # w - lr * (0.1 w + m / sqrt(v)), and after one step m / sqrt(v) is the gradient's sign
        wanted = before[name] - 1e-3 * (0.1 * before[name] + signs[name])
        torch.testing.assert_close(after[large[name]], wanted[large[name]], rtol=0, atol=2e-6)
    assert torch.cat([mask.flatten() for mask in large.values()]).float().mean() > 0.9


def test_beta_and_steps_are_those_of_the_iteration(world: Path) -> None:
    options = {"beta": [2000, 5000], "steps": [3, 7, 5]}
    assert [(t.beta, t.steps) for t in (trainer(world, k, **options) for k in (1, 2, 4))] == [
        (2000.0, 3), (5000.0, 7), (5000.0, 5),
    ]  # fmt: skip


def test_training_tells_winners_from_losers(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = trainer(world, beta=[100])
    same = player.batch(places(*range(8)))
    monkeypatch.setattr(player, "batch", lambda _: same)
    history = [player.train_step() for _ in range(4)]
    assert [row["loss"] for row in history] == sorted((row["loss"] for row in history), reverse=True)
    assert history[-1]["loss"] < LN2 / 4
    assert history[-1]["implicit_accuracy"] == 1.0


# --- the losers that are needed


def test_only_what_is_trained_on_is_needed(world: Path) -> None:
    ids = Dataset(world / "data").ids
    config = TrainConfig(steps=(2, 4), batch_size=4, micro_batch_size=4, decay_steps=0)
    rows = consumed(ids, config, 1)
    assert rows == {row for _, row in order(ids, config.seed, 1, 0, 8)}
    assert len(rows) == 8 < len(ids)
    assert consumed(ids, config, 2) != rows
    assert consumed(ids, config.model_copy(update={"steps": (9,)}), 1) == set(range(len(ids))), "more than one epoch"


def test_what_the_next_iteration_takes_is_needed_too(world: Path) -> None:
    ids = Dataset(world / "data").ids
    config = TrainConfig(steps=(2,), batch_size=4, micro_batch_size=4, decay_steps=0, previous_share=0.5)
    own = consumed(ids, config.model_copy(update={"previous_share": 0.0}), 1)
    following = order(ids, config.seed, 2, 0, 8)
    older = {row for (_, row), old in zip(following, from_previous(ids, following, config, 2), strict=True) if old}
    assert older - own
    assert consumed(ids, config, 1) == own | older


def test_a_trainer_needs_no_other_losers(world: Path, tmp_path: Path) -> None:
    """Steps with the needed losers alone equal those with all of them; with one fewer there are none."""
    data = Dataset(world / "data")
    whole = trainer(world, steps=[2])
    rows = sorted(consumed(data.ids, whole.config, 1))
    ids = [data.ids[row] for row in rows]
    assert len(ids) == 16
    all_of_them = Latents([world / "losers.safetensors"])
    Latents.write(tmp_path / "few.safetensors", ids, all_of_them.of(ids))
    few = Trainer(
        models.load(world / "base", CPU), data, Latents([tmp_path / "few.safetensors"]), whole.config, 1, "fp32"
    )
    assert [few.train_step() for _ in range(2)] == [whole.train_step() for _ in range(2)]
    Latents.write(tmp_path / "fewer.safetensors", ids[1:], all_of_them.of(ids[1:]))
    with pytest.raises(SpinError, match=rf"^expected a loser for every pair, got none for 1, e.g. {ids[0]}; generate$"):
        Trainer(
            models.load(world / "base", CPU), data, Latents([tmp_path / "fewer.safetensors"]), whole.config, 1, "fp32"
        )


def test_a_compiled_step_is_the_same_step(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks are captured whole; what a backend makes of that is the benchmarks' to compare."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = trainer(world)
    compiled = Trainer(
        models.load(world / "base", CPU), plain.winners, plain.losers, plain.config, 1, "fp32", compiled=True
    )
    one, other = plain.train_step(), compiled.train_step()
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert weights(compiled).keys() == weights(plain).keys()


@pytest.mark.skipif(
    not shutil.which("g++") or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="inductor needs a C++ compiler and Python's headers",
)
@pytest.mark.timeout(900)
def test_what_inductor_compiles_is_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend, in float32: the smallest UNet's prediction and gradients, within rounding."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8,
        attention_head_dim=4, mid_block_type=None,
    )  # fmt: skip
    compiled = copy.deepcopy(plain)
    compiled.compile(dynamic=False)
    given = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.randn(2, 5, 8)
    one, other = (network(*given).sample for network in (plain, compiled))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.detach().abs().max()))
    for prediction in (one, other):
        prediction.square().mean().backward()
    found = {name: weight.grad for name, weight in compiled.named_parameters()}
    scale = max(float(weight.grad.abs().max()) for weight in plain.parameters())
    assert scale > 0
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_bfloat16_stays_near_float32(world: Path) -> None:
    """Errors are taken in float32 of rounded predictions: 2^-8 each, of a loss that starts at the same ln 2."""
    exact, rough = (
        trainer(world, precision=precision, beta=[100], learning_rate=1e-4) for precision in ("fp32", "bf16")
    )
    pairs = [(exact.train_step(), rough.train_step()) for _ in range(3)]
    assert pairs[0][0]["loss"] == pairs[0][1]["loss"] == LN2
    for one, other in pairs:
        assert other["loss"] == pytest.approx(one["loss"], rel=0.05)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)


def reference_in_float32(player: Trainer) -> Any:
    """Return the reference as the opponent has it, every weight in float32."""
    network = copy.deepcopy(player.model.denoiser).requires_grad_(False).eval()
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    return network


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_references_weights_are_rounded_once_to_what_autocast_makes_of_them(
    worlds: Callable[[str], Path], world: Path, family: str
) -> None:
    player = trainer(world if family == "sd1" else worlds(family), precision="bf16")
    batch = player.batch(places(*range(8)))
    with torch.no_grad():
        wanted = player.errors(reference_in_float32(player), batch)
    found = player.reference_errors(batch)
    assert wanted[1] is not None
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    dtypes = {
        type(module).__name__: weight.dtype
        for module in player.reference.modules()
        for weight in module.parameters(recurse=False)
    }
    assert dtypes.pop("Linear") == dtypes.pop("Conv2d") == torch.bfloat16
    assert set(dtypes.values()) <= {torch.float32}, "norms"
    assert all(weight.dtype == torch.float32 for weight in player.model.denoiser.parameters())


@pytest.mark.parametrize("options", [{"lora_rank": 4}, {"objective": "sft"}, {"mixed_precision": "no"}])
def test_a_reference_that_is_the_player_keeps_float32(world: Path, options: dict[str, Any]) -> None:
    player = trainer(world, precision="bf16", **options)
    assert all(weight.dtype == torch.float32 for weight in player.reference.parameters())


# --- the next batch is drawn while this one computes


def others() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread is not threading.main_thread()}


@pytest.mark.parametrize("options", [{}, {"objective": "exact-spin", "trajectory_steps": 2}], ids=["spin", "exact"])
def test_drawing_ahead_changes_no_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    drawers: list[bool] = []
    draw = Trainer.draw
    monkeypatch.setattr(
        Trainer,
        "draw",
        lambda *given: drawers.append(threading.current_thread() is threading.main_thread()) or draw(*given),
    )
    before = others()
    ahead = trainer(world, micro_batch_size=4, prompt_dropout=0.2, **options)
    rows = run(ahead, tmp_path / "a")
    # 3 steps of 2 micro-batches: all but the first are drawn beside the work, and none twice or for nothing.
    assert drawers == [True, *[False] * 5]
    for thread in others() - before:
        thread.join(5)
    assert others() <= before
    monkeypatch.setattr(Trainer, "draw_ahead", lambda *_: None)
    inline = trainer(world, micro_batch_size=4, prompt_dropout=0.2, **options)
    assert run(inline, tmp_path / "b") == rows
    assert drawers[6:] == [True] * 6
    for name, weight in weights(ahead).items():
        assert torch.equal(weight, weights(inline)[name])


def test_what_goes_wrong_while_drawing_ahead_is_the_steps_error(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = trainer(world, micro_batch_size=4)
    read = player.winners.winners

    def broken(ids: Sequence[str]) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread() and player.step == 1:
            raise OSError("no such row")
        return read(ids)

    monkeypatch.setattr(player.winners, "winners", broken)
    with pytest.raises(OSError, match="no such row"):
        run(player, tmp_path)
    assert player.step == 1


def test_a_batch_that_was_not_drawn_ahead_is_drawn_when_it_is_asked_for(world: Path) -> None:
    player = trainer(world)
    wanted = player.batch(places(3, 4))
    player.draw_ahead(places(1, 2))
    found = player.batch(places(3, 4))
    assert torch.equal(found.noise, wanted.noise)
    assert torch.equal(found.winner, wanted.winner)


# --- what a pair sees


def test_both_sides_of_a_pair_share_timestep_noise_and_prompt(world: Path) -> None:
    player = trainer(world)
    batch, seen = player.batch(places(0, 5, 9)), {}

    class Silent:
        """Predicts zeros, so that the error is the noise's mean square."""

        def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
            seen.update(noisy=noisy, timestep=timestep, embeds=encoder_hidden_states)
            self.sample = torch.zeros_like(noisy)
            return self

    winner, loser = player.errors(Silent(), batch)
    assert batch.loser is not None
    assert loser is not None
    assert torch.equal(winner, loser)
    torch.testing.assert_close(winner, batch.noise.pow(2).mean(dim=(1, 2, 3)))
    for side, latents in ((slice(0, 3), batch.winner), (slice(3, 6), batch.loser)):
        assert torch.equal(
            seen["noisy"][side], add_noise(latents, batch.noise, batch.timestep, player.process.alphas_cumprod)
        )
        assert torch.equal(seen["timestep"][side], batch.timestep)
        assert torch.equal(seen["embeds"][side], batch.conditioning.text)
    assert not torch.equal(batch.winner, batch.loser)


def test_a_batch_holds_the_pairs_own_latents_and_prompts(world: Path) -> None:
    player = trainer(world)
    batch = player.batch(places(3, 20))
    # tiny.dataset: winners of seed 2, losers of seed 3, prompts "colour <row>"
    assert torch.equal(batch.winner, tiny.random_latents(PAIRS, seed=2)[[3, 20]])
    assert batch.loser is not None
    assert torch.equal(batch.loser, tiny.random_latents(PAIRS, seed=3)[[3, 20]])
    torch.testing.assert_close(batch.conditioning.text, player.model.embed(["colour 3", "colour 20"]).text)
    assert torch.equal(batch.noise[1], noise_of(tiny.LATENTS, "train", 0, 1, 0, "p020"))


def test_noise_and_timestep_belong_to_pair_epoch_iteration_and_seed(world: Path) -> None:
    player = trainer(world)
    whole, part = player.batch(places(*range(8))), player.batch(places(6, 2))
    assert torch.equal(part.noise, whole.noise[[6, 2]])
    assert torch.equal(part.timestep, whole.timestep[[6, 2]])
    for other in (
        player.batch(places(*range(8), epoch=1)),
        trainer(world, iteration=2).batch(places(*range(8))),
        trainer(world, seed=1).batch(places(*range(8))),
    ):
        assert not torch.equal(other.timestep, whole.timestep)
        assert not any(torch.equal(one, two) for one, two in zip(other.noise, whole.noise, strict=True))


def test_timesteps_are_uniform_over_the_schedule(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = trainer(world)
    monkeypatch.setattr(player.model, "embed", lambda prompts: Conditioning(torch.zeros(len(prompts), 12, 16)))
    timestep = torch.cat([player.batch(places(*range(PAIRS), epoch=epoch)).timestep for epoch in range(40)]).float()
    # 960 draws of 0..999: mean 499.5 +- 9.3; bounds of 4 standard errors
    assert abs(float(timestep.mean()) - 499.5) < 37
    assert 0 <= float(timestep.min()) < 20
    assert 980 < float(timestep.max()) <= 999


def test_prompt_dropout_gives_that_share_the_empty_prompt(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts_of(player: Trainer) -> tuple[list[str], torch.Tensor]:
        seen: list[str] = []
        monkeypatch.setattr(
            player.model,
            "embed",
            lambda prompts: seen.extend(prompts) or Conditioning(torch.zeros(len(prompts), 12, 16)),
        )
        timesteps = [player.batch(places(*range(PAIRS), epoch=epoch)).timestep for epoch in range(20)]
        return seen, torch.cat(timesteps)

    kept, timesteps = prompts_of(trainer(world))
    assert kept == [f"colour {row}" for row in range(PAIRS)] * 20
    dropped, same_timesteps = prompts_of(trainer(world, prompt_dropout=0.2))
    assert {prompt for prompt, whole in zip(dropped, kept, strict=True) if prompt != whole} == {""}
    # 480 pairs: 20 % +- 1.8 %; bounds of 4 standard errors
    assert 0.128 < dropped.count("") / 480 < 0.272
    assert torch.equal(timesteps, same_timesteps)
    assert prompts_of(trainer(world, prompt_dropout=0.2))[0] == dropped


def test_noise_is_shared_by_a_pair_or_not(world: Path) -> None:
    shared, apart = (trainer(world, shared_noise=share).batch(places(*range(8))) for share in (True, False))
    assert torch.equal(shared.noise, shared.loser_noise)
    assert torch.equal(apart.noise, shared.noise)
    between = torch.stack([apart.noise.flatten(), apart.loser_noise.flatten()]).corrcoef()[0, 1]
    assert abs(float(between)) < 0.1  # 2048 values
    first = trainer(world, shared_noise=False).train_step()
    assert first["loss"] == LN2
    assert first["error_winner"] == trainer(world).train_step()["error_winner"]


def test_min_snr_weighs_all_four_errors(world: Path) -> None:
    plain, weighted = trainer(world), trainer(world, min_snr=5.0)
    batch = plain.batch(places(*range(8)))
    alpha = plain.process.alphas_cumprod[batch.timestep]
    weight = (5 * (1 - alpha) / alpha).clamp(max=1)
    assert 0 < int((weight < 1).sum()) < 8
    with torch.no_grad():
        for found, whole in zip(weighted.reference_errors(batch), plain.reference_errors(batch), strict=True):
            torch.testing.assert_close(found, weight * whole)


def test_some_losers_may_be_the_previous_iterations(world: Path, tmp_path: Path) -> None:
    ids = Dataset(world / "data").ids
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    Latents.write(old, ids, torch.full((PAIRS, *tiny.LATENTS), -1.0))
    Latents.write(new, ids, torch.full((PAIRS, *tiny.LATENTS), 1.0))
    config = TrainConfig(batch_size=8, micro_batch_size=8, previous_share=0.3)
    model, winners = models.load(world / "base", CPU), Dataset(world / "data")
    player = Trainer(model, winners, Latents([new]), config, 2, "fp32", Latents([old]))
    drawn = torch.cat([player.losers_of(places(*range(PAIRS), epoch=epoch)) for epoch in range(20)]).mean((1, 2, 3))
    assert set(drawn.tolist()) == {-1.0, 1.0}
    # 480 pairs: 30 % +- 2.1 %; bounds of 4 standard errors. Each epoch has its own choice.
    assert 0.216 < float((drawn < 0).float().mean()) < 0.384
    assert not torch.equal(drawn[:PAIRS], drawn[PAIRS : 2 * PAIRS])
    assert torch.equal(player.losers_of(places(3, 4)), player.losers_of(places(3, 4)))


def test_winners_may_be_drawn_too(world: Path, tmp_path: Path) -> None:
    data, drawn = Dataset(world / "data"), tmp_path / "winners.safetensors"
    Latents.write(drawn, data.ids, torch.full((PAIRS, *tiny.LATENTS), 0.5))
    losers, config = Latents([world / "losers.safetensors"]), TrainConfig(batch_size=8, micro_batch_size=8)
    player = Trainer(models.load(world / "base", CPU), data, losers, config, 1, "fp32", best=Latents([drawn]))
    assert set(player.batch(places(3, 4)).winner.flatten().tolist()) == {0.5}


# --- what it may depend on


def test_an_epoch_of_steps_visits_every_pair_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = trainer(world, micro_batch_size=4)
    assemble, visited = player.batch, []
    monkeypatch.setattr(player, "batch", lambda part: visited.extend(part) or assemble(part))
    for _ in range(3):
        player.train_step()
    # 3 steps of 8 pairs
    assert visited == order(player.winners.ids, 0, 1, 0, 24)
    assert sorted(visited) == places(*range(24))


@BOTH
def test_micro_batches_add_up_to_the_batch(world: Path, tmp_path: Path, rank: int) -> None:
    # beta multiplies the rounding of the errors, about 1e-7: at 20 the sums agree to 1e-6, at 2000 they could not.
    # The epsilon keeps Adam from turning the rounding of tiny gradients into whole steps.
    options = {"lora_rank": rank, "beta": [20], "adam_epsilon": 1e-4, "max_grad_norm": 1e9}
    one, two = trainer(world, **options), trainer(world, micro_batch_size=4, **options)
    whole, halves = run(one, tmp_path), run(two, tmp_path)
    assert (one.accumulation, two.accumulation) == (1, 2)
    for row, other in zip(whole, halves, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
    assert abs(whole[2]["loss"] - whole[0]["loss"]) > 1e-3
    for name, value in weights(two).items():
        torch.testing.assert_close(value, weights(one)[name], rtol=0, atol=1e-5)


def test_the_gradient_is_clipped(world: Path) -> None:
    player = trainer(world, max_grad_norm=0.5, learning_rate=1e-12)
    clipped: list[float] = []
    step = player.optimizer.optimizer.step

    def spy(*args: object, **options: object) -> object:
        gradients = [p.grad for p in checkpoint.trained(player.model.denoiser).values()]
        clipped.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))
        return step(*args, **options)

    player.optimizer.optimizer.step = spy
    measured = player.train_step()["grad_norm"]
    assert measured > 5
    assert clipped == pytest.approx([0.5], rel=1e-4)


def test_gradient_checkpointing_changes_memory_alone(world: Path) -> None:
    plain, sparing = trainer(world), trainer(world, gradient_checkpointing=True)
    assert sparing.model.denoiser.is_gradient_checkpointing
    assert sparing.train_step() == pytest.approx(plain.train_step(), rel=1e-5)


def test_mixed_precision_no_computes_in_float32(world: Path) -> None:
    assert trainer(world, precision="bf16", mixed_precision="no").precision == "fp32"
    assert trainer(world, precision="bf16", mixed_precision="bf16").precision == "bf16"
    assert trainer(world, precision="fp32", mixed_precision="bf16").precision == "fp32"


def test_bfloat16_keeps_weights_and_errors_in_float32(world: Path) -> None:
    rough, exact = trainer(world, precision="bf16"), trainer(world)
    batch = rough.batch(places(*range(4)))
    assert rough.errors(rough.player, batch)[0].dtype == torch.float32
    assert not torch.equal(rough.errors(rough.player, batch)[0], exact.errors(exact.player, batch)[0])
    assert rough.train_step()["loss"] == LN2
    assert {value.dtype for value in weights(rough).values()} == {torch.float32}


# --- how it goes on


@BOTH
def test_a_resumed_run_is_the_uninterrupted_run(world: Path, tmp_path: Path, rank: int) -> None:
    # 5 steps of 8 of 24 pairs reach the second epoch; warm-up, decay and dropout depend on the step.
    options = {
        "lora_rank": rank, "steps": [5], "checkpoint_every": 2, "warmup_steps": 2, "decay_steps": 8,
        "prompt_dropout": 0.3, "micro_batch_size": 4,
    }  # fmt: skip
    whole = trainer(world, **options)
    history = run(whole, tmp_path / "whole", keep=tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "checkpoint-000002", "checkpoint-000004", "checkpoint-000005",
    ]  # fmt: skip
    for name in ("checkpoint-000002", "checkpoint-000004", "checkpoint-000005"):
        resumed = trainer(world, **options)
        torch.manual_seed(99)
        assert run(resumed, tmp_path / "again", resume_from=tmp_path / "kept" / name) == history
        assert resumed.drift == whole.drift
        wanted = weights(whole)
        assert weights(resumed).keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in weights(resumed).items())


@BOTH
def test_the_player_may_be_the_average_of_its_weights(world: Path, tmp_path: Path, rank: int) -> None:
    options = {"lora_rank": rank, "steps": [4], "checkpoint_every": 2}
    player, path = trainer(world, ema_decay=0.3, **options), []
    start = weights(player)
    player.run(lambda *_: path.append(weights(player)), lambda _: None, tmp_path)
    # diffusers: decay of step n (from 0) is min(0.3, (1 + n) / (10 + n)) = 1/10, 2/11, 3/12, 0.3; its first is 0
    wanted = start
    for decay, now in zip((0.0, 2 / 11, 3 / 12, 0.3), path, strict=True):
        wanted = {name: decay * wanted[name] + (1 - decay) * now[name] for name in now}
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in player.history]
    trained = dict(zip(wanted, player.average.shadow_params, strict=True))
    for name, value in wanted.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)
    assert history == run(trainer(world, **options), tmp_path)  # training itself does not see it

    resumed = trainer(world, ema_decay=0.3, **options)
    run(trainer(world, ema_decay=0.3, **options), tmp_path, keep=tmp_path / "kept")
    run(resumed, tmp_path / "again", resume_from=tmp_path / "kept" / "checkpoint-000002")
    for one, other in zip(resumed.average.shadow_params, player.average.shadow_params, strict=True):
        assert torch.equal(one, other)
    averaged, last = player.player_denoiser().state_dict(), trainer(world, **options)
    run(last, tmp_path)
    assert any(not torch.equal(value, averaged[name]) for name, value in last.player_denoiser().state_dict().items())


@BOTH
def test_a_stop_within_a_step_keeps_the_last_whole_step(world: Path, tmp_path: Path, rank: int) -> None:
    options = {"lora_rank": rank, "steps": [4], "micro_batch_size": 4}
    whole = trainer(world, **options)
    history = run(whole, tmp_path / "whole")
    stopped, asked = trainer(world, **options), iter([False] * 5 + [True])
    kept: list[Path] = []

    def keep(folder: Path) -> None:
        kept.append(shutil.copytree(folder, tmp_path / "kept"))

    # Two micro-batches a step: the sixth question falls into the middle of step 3.
    with pytest.raises(Stopped):
        stopped.run(lambda *_: None, keep, tmp_path, stop=lambda: next(asked))
    assert stopped.step == 2
    assert len(kept) == 1
    assert run(trainer(world, **options), tmp_path / "again", resume_from=kept[0]) == history


def test_a_stop_before_anything_new_keeps_nothing_new(world: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        trainer(world).run(lambda *_: None, lambda _: pytest.fail("nothing to keep"), tmp_path, stop=lambda: True)


def test_two_runs_are_equal_and_another_seed_is_not(world: Path, tmp_path: Path) -> None:
    one = run(trainer(world, steps=[2]), tmp_path)
    assert run(trainer(world, steps=[2]), tmp_path) == one
    assert run(trainer(world, steps=[2], seed=1), tmp_path) != one


def test_a_checkpoint_holds_safetensors_and_json_alone(world: Path, tmp_path: Path) -> None:
    run(trainer(world, steps=[2], checkpoint_every=1), tmp_path, keep=tmp_path / "kept")
    folder = tmp_path / "kept" / "checkpoint-000001"
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "training.safetensors"]
    assert {name.split("/")[0] for name in load_file(folder / "training.safetensors")} == {
        "weight", "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip


def test_steps_are_reported_from_1_and_the_last_is_kept_too(world: Path, tmp_path: Path) -> None:
    steps, kept = [], []
    player = trainer(world, steps=[5], checkpoint_every=2)
    player.run(lambda step, measures: steps.append((step, measures)), lambda folder: kept.append(folder.name), tmp_path)
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5]
    assert kept == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000005"]
    assert steps[0][1]["loss"] == LN2


# --- the opponent


def test_the_reference_never_moves(world: Path, tmp_path: Path) -> None:
    player = trainer(world)
    opponent = copy.deepcopy(player.model.denoiser).state_dict()
    run(player, tmp_path)
    assert all(torch.equal(value, opponent[name]) for name, value in player.reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in player.reference.parameters())
    moved = [
        name for name, value in player.model.denoiser.state_dict().items() if not torch.equal(value, opponent[name])
    ]
    assert len(moved) == len(opponent)


def test_lora_keeps_its_opponent_in_the_frozen_weights(world: Path, tmp_path: Path) -> None:
    opponent = models.load(world / "base", CPU)
    player = trainer(world, lora_rank=4)
    batch = player.batch(places(*range(8)))
    run(player, tmp_path)
    trained, frozen = checkpoint.trained(player.model.denoiser), opponent.denoiser.state_dict()
    # query, key, value and output of the self- and the cross-attention of the 4 transformer blocks, A and B of each
    assert len(trained) == 4 * 2 * 4 * 2
    assert all(".lora_" in name for name in trained)
    kept = {
        name.replace(".base_layer", ""): value
        for name, value in player.model.denoiser.state_dict().items()
        if ".lora_" not in name
    }
    assert kept.keys() == frozen.keys()
    assert all(torch.equal(value, frozen[name]) for name, value in kept.items())

    # With the adapters off it predicts what the opponent predicts; with them on, something else.
    with torch.no_grad():
        wanted = player.errors(opponent.denoiser, batch)
        moved = player.errors(player.player, batch)
    for reference, opposed, now in zip(player.reference_errors(batch), wanted, moved, strict=True):
        assert opposed is not None
        assert now is not None
        assert torch.equal(reference, opposed)
        assert not torch.allclose(now, opposed, rtol=1e-4)
    # And they are on again, and trained, after the reference had its turn.
    assert checkpoint.trained(player.model.denoiser).keys() == trained.keys()
    with torch.no_grad():
        assert torch.equal(player.errors(player.player, batch)[0], moved[0])


def test_merged_adapters_predict_what_they_did_apart(world: Path, tmp_path: Path) -> None:
    opponent = models.load(world / "base", CPU)
    player = trainer(world, lora_rank=4, learning_rate=1e-2)
    run(player, tmp_path)
    latents, timestep = tiny.random_latents(2, seed=7), torch.tensor([20, 700])
    prompts = opponent.embed(["cat", ""])

    def predict(denoiser: Any) -> torch.Tensor:
        with torch.no_grad():
            return opponent.predict(denoiser, latents, timestep, prompts)

    apart = predict(player.model.denoiser)
    merged = player.player_denoiser()
    assert merged.state_dict().keys() == opponent.denoiser.state_dict().keys()
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(predict(merged), apart, rtol=0, atol=1e-5)
    assert float((apart - predict(opponent.denoiser)).abs().max()) > 1e-3

    models.export(world / "base", merged, tmp_path / "player")
    torch.testing.assert_close(predict(models.load(tmp_path / "player", CPU).denoiser), apart, rtol=0, atol=1e-5)


# --- every family


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function that returns the folder of a family's base model, a data set of 8 pairs and its losers."""
    root = tmp_path_factory.mktemp("families")

    def world(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            tiny.base(folder / "base", family)
            tiny.dataset(folder / "data", 8, family=family)
            tiny.losers(folder / "losers.safetensors", Dataset(folder / "data").ids, family)
        return folder

    return world


@BOTH
@pytest.mark.parametrize("family", tiny.FAMILIES[1:])
def test_every_family_learns_resumes_and_is_merged(
    worlds: Callable[[str], Path], tmp_path: Path, family: str, rank: int
) -> None:
    options = {"lora_rank": rank, "steps": [3], "checkpoint_every": 1, "prompt_dropout": 0.3, "ema_decay": 0.5}
    world = worlds(family)
    player, opponent = trainer(world, **options), models.load(world / "base", CPU)
    batch = player.batch(places(*range(8)))
    player.objective(batch).loss.backward()
    # Several processes wait for every gradient.
    assert [name for name, value in checkpoint.trained(player.model.denoiser).items() if value.grad is None] == []
    player.optimizer.zero_grad()
    history = run(player, tmp_path, keep=tmp_path / "kept")
    assert history[0]["loss"] == LN2
    assert abs(history[1]["loss"] - LN2) > 1e-4
    with torch.no_grad():
        for reference, wanted in zip(
            player.reference_errors(batch), player.errors(opponent.denoiser, batch), strict=True
        ):
            assert torch.equal(reference, wanted)
    resumed = trainer(world, **options)
    assert run(resumed, tmp_path / "again", resume_from=tmp_path / "kept" / "checkpoint-000002") == history
    with torch.no_grad():
        player.average.copy_to(checkpoint.trained(player.model.denoiser).values())
        apart = player.errors(player.player, batch)[0]
        denoiser = player.player_denoiser()
        models.export(world / "base", denoiser, tmp_path / "player")
        merged = models.load(tmp_path / "player", CPU).denoiser
        assert denoiser.state_dict().keys() == merged.state_dict().keys() == opponent.denoiser.state_dict().keys()
        torch.testing.assert_close(player.errors(merged, batch)[0], apart, rtol=0, atol=1e-5)
        assert not torch.allclose(player.errors(opponent.denoiser, batch)[0], apart, rtol=1e-4)


def test_lora_reaches_both_sides_of_joint_attention(worlds: Callable[[str], Path]) -> None:
    trained = checkpoint.trained(trainer(worlds("sd3"), lora_rank=2).model.denoiser)
    adapted = {name.partition(".lora_")[0].removeprefix("transformer_blocks.") for name in trained}
    image = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}
    text = {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}
    # The last block gives nothing back to the text.
    assert adapted == {f"0.{name}" for name in image | text | {"attn.to_add_out"}} | {f"1.{n}" for n in image | text}


def test_a_flow_is_told_its_noise_level(worlds: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    player, seen = trainer(worlds("sd3")), {}
    batch = player.batch(places(0, 1))
    monkeypatch.setattr(
        player.model,
        "predict",
        lambda _, noisy, timestep, __: seen.update(noisy=noisy, timestep=timestep) or torch.zeros_like(noisy),
    )
    winner, loser = player.errors(player.player, batch)
    assert batch.loser is not None
    assert torch.equal(seen["timestep"], batch.timestep.repeat(2))
    sigma = (batch.timestep / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"][:2], (1 - sigma) * batch.winner + sigma * batch.noise)
    # It is to predict noise - image.
    torch.testing.assert_close(winner, (batch.noise - batch.winner).pow(2).mean((1, 2, 3)))
    torch.testing.assert_close(loser, (batch.noise - batch.loser).pow(2).mean((1, 2, 3)))


def test_dropped_prompts_of_sdxl_are_what_guidance_compares_with(worlds: Callable[[str], Path]) -> None:
    batch = trainer(worlds("sdxl"), prompt_dropout=0.9).batch(places(*range(8)))
    dropped = ~batch.conditioning.text.flatten(1).any(1)
    assert 0 < int(dropped.sum()) < 8
    assert batch.conditioning.pooled is not None
    assert torch.equal(~batch.conditioning.pooled.any(1), dropped)


def test_exact_spin_plays_sdxl(worlds: Callable[[str], Path]) -> None:
    player = trainer(worlds("sdxl"), objective="exact-spin", trajectory_steps=2)
    assert player.train_step()["loss"] == LN2
    assert player.train_step()["loss"] != LN2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": "exact-spin"},
            "expected a diffusion model for exact-spin, got a flow model; use train.objective spin",
        ),
        (
            {"min_snr": 5.0},
            "expected train.min_snr 0 for a flow model, got 5; it weighs diffusion models alone",
        ),
    ],
)
def test_what_a_flow_model_cannot_be_asked_for(
    worlds: Callable[[str], Path], options: dict[str, Any], message: str
) -> None:
    assert refusal(worlds("sd3"), **options) == message


# --- supervised fine-tuning


@BOTH
def test_sft_needs_no_losers(world: Path, tmp_path: Path, rank: int) -> None:
    player = trainer(world, objective="sft", lora_rank=rank)
    batch = player.batch(order(player.winners.ids, 0, 1, 0, 8))
    assert batch.loser is None
    with torch.no_grad():
        noisy = add_noise(batch.winner, batch.noise, batch.timestep, player.process.alphas_cumprod)
        predicted = player.model.denoiser(noisy, batch.timestep, encoder_hidden_states=batch.conditioning.text).sample
    history = run(player, tmp_path)
    assert history[0]["loss"] == pytest.approx(float((predicted - batch.noise).pow(2).mean()), rel=1e-5)
    assert history[0].keys() == {"step", "loss", "error_winner", "grad_norm", "learning_rate"}
    assert player.reference is player.model.denoiser


# --- when it stops


def measures(drift: float = 0.0, loss: float = 0.7, norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "winner_drift": drift, "reference_error_winner": 0.5, "grad_norm": norm}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "winner_drift", "grad_norm"])
def test_what_is_not_finite_stops_the_run(world: Path, name: str, value: float) -> None:
    player = trainer(world)
    player.step = 2
    with pytest.raises(Diverged) as caught:
        player.watch(measures() | {name: value})
    assert str(caught.value) == (
        f"expected finite measures, got {name} {value} at step 2 of iteration 1; lower train.learning_rate, "
        "under a new run key"
    )


def test_smoothed_drift_beyond_the_bound_stops_the_run(world: Path) -> None:
    player = trainer(world, max_winner_drift=0.1)
    player.step = 1
    player.watch(measures(drift=0.025))  # 0.025 / 0.5 = 5 %
    assert player.drift == pytest.approx(0.05)
    player.step = 2
    player.watch(measures(drift=0.125))  # 0.8 * 5 % + 0.2 * 25 % = 9 %
    assert player.drift == pytest.approx(0.09)
    player.step = 3
    with pytest.raises(Diverged) as caught:
        player.watch(measures(drift=0.1))  # 0.8 * 9 % + 0.2 * 20 % = 11.2 %
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "expected the winners' error to stay within 10% of the opponent's, got +11.2% at step 3 of iteration 1;"
    )


def test_a_falling_error_never_stops_the_run(world: Path) -> None:
    player = trainer(world, max_winner_drift=0.01)
    for step in range(1, 5):
        player.step = step
        player.watch(measures(drift=-0.4))
    assert player.drift == pytest.approx(-0.8)


def test_sft_is_watched_for_its_loss_alone(world: Path) -> None:
    player = trainer(world, objective="sft")
    player.watch({"loss": 1e6, "error_winner": 1e6, "grad_norm": 1.0})
    with pytest.raises(Diverged):
        player.watch({"loss": math.nan, "error_winner": math.nan, "grad_norm": 1.0})


def test_a_run_that_ruins_the_winners_ends_with_its_last_good_checkpoint(world: Path, tmp_path: Path) -> None:
    player = trainer(world, steps=[30], learning_rate=0.05, max_winner_drift=0.1, checkpoint_every=1)
    kept: list[int] = []
    with pytest.raises(Diverged):
        player.run(lambda *_: None, lambda _: kept.append(player.step), tmp_path)
    assert kept == list(range(1, player.step))
    assert len(player.history) == player.step - 1 >= 1


# --- chosen by a held-out score


def scores(*values: float) -> Callable[[], float]:
    """Return a score function that says ``values`` in turn."""
    left = iter(values)
    return lambda: next(left)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"ema_decay": 0.5}], ids=["full", "lora", "average"])
def test_the_best_player_leaves_and_patience_ends_the_iteration(
    world: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Scores of steps 0, 2, 4, 6, 8: the best is that of step 4; after two worse ones training is over."""
    player = trainer(world, steps=[20], **options)
    selection = Selection(scores(1, 2, 5, 3, 4), every=2, patience=2)
    player.run(lambda *_: None, lambda _: None, tmp_path, selection=selection)
    assert player.step == 8
    assert (selection.best_step, selection.best_score) == (4, 5)
    assert {row["step"]: row["validation_score"] for row in player.history if "validation_score" in row} == {
        2: 2, 4: 5, 6: 3, 8: 4,
    }  # fmt: skip
    fixed = trainer(world, steps=[4], **options)
    run(fixed, tmp_path)
    left = weights(player)
    for name, value in weights(fixed).items():
        assert torch.equal(left[name], value), name


def test_a_player_that_is_never_better_leaves_the_opponent(world: Path, tmp_path: Path) -> None:
    player = trainer(world, steps=[5])
    before = weights(player)
    selection = Selection(scores(9, 1, 2), every=4, patience=3)
    player.run(lambda *_: None, lambda _: None, tmp_path, selection=selection)
    assert player.step == 5, "the last step is always asked about"
    assert selection.best_step == 0
    for name, value in weights(player).items():
        assert torch.equal(before[name], value)


def test_a_selection_goes_on_after_an_interruption(world: Path, tmp_path: Path) -> None:
    options = {"steps": [20], "checkpoint_every": 3}
    whole, first, second = (trainer(world, **options) for _ in range(3))
    kept: list[Path] = []

    def keep(folder: Path) -> None:
        kept.append(Path(shutil.copytree(folder, tmp_path / "kept" / folder.name)))

    selection = Selection(scores(1, 5, 3, 4, 2), every=2, patience=3)
    whole.run(lambda *_: None, lambda _: None, tmp_path / "a", selection=selection)
    with pytest.raises(StopIteration):
        first.run(lambda *_: None, keep, tmp_path / "b", selection=Selection(scores(1, 5), every=2, patience=3))
    resumed = Selection(scores(3, 4, 2), every=2, patience=3)
    second.run(lambda *_: None, lambda _: None, tmp_path / "c", resume_from=kept[0], selection=resumed)
    assert (resumed.best_step, resumed.best_score) == (selection.best_step, selection.best_score) == (2, 5)
    assert second.step == whole.step == 8
    for name, value in weights(whole).items():
        assert torch.equal(weights(second)[name], value)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}], ids=["last", "average"])
@pytest.mark.parametrize("every", [100, 2], ids=["stored when asked to stop", "stored before validating"])
def test_a_stop_while_validating_keeps_the_last_step(
    world: Path, tmp_path: Path, options: dict[str, Any], every: int
) -> None:
    """At step 4, after scores of steps 0 and 2; the next start asks about step 4 first."""
    options = {**options, "steps": [6], "checkpoint_every": every}
    whole, stopped, resumed = (trainer(world, **options) for _ in range(3))
    kept: list[Path] = []
    left = iter([1, 2])

    def score() -> float:
        if (value := next(left, None)) is None:
            if every == 2:
                assert kept[-1].name == "checkpoint-000004", "stored before"
            raise Stopped
        return value

    def keep(folder: Path) -> None:
        kept.append(Path(shutil.copytree(folder, tmp_path / "kept" / folder.name)))

    told: list[tuple[int, dict[str, float]]] = []
    whole.run(lambda *_: None, lambda _: None, tmp_path / "a", selection=Selection(scores(1, 2, 5, 4), 2, 9))
    with pytest.raises(Stopped):
        stopped.run(lambda *_: None, keep, tmp_path / "b", selection=Selection(score, 2, 9))
    assert [folder.name for folder in kept][-1:] == ["checkpoint-000004"]
    assert len({folder.name for folder in kept}) == len(kept), "stored once"
    selection = Selection(scores(5, 4), 2, 9)
    resumed.run(
        lambda *row: told.append(row), lambda _: None, tmp_path / "c", resume_from=kept[-1], selection=selection
    )
    assert selection.best_step == 4
    assert [(step, measures.get("validation_score")) for step, measures in told] == [(4, 5), (5, None), (6, 4)]
    assert [row.get("validation_score") for row in resumed.history] == [None, 2, None, 5, None, 4]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value)


def test_the_best_player_is_kept_by_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = {"weight": torch.ones(3)}
    first = Selection(scores(1), every=1, patience=1)
    first.consider(0, weight)
    first.save(tmp_path)
    monkeypatch.setenv("RANK", "1")
    other, resumed = Selection(scores(1), every=1, patience=1), Selection(scores(), every=1, patience=1)
    assert other.consider(0, weight) == 1
    resumed.load(tmp_path)
    assert (other.best_step, other._weights) == (resumed.best_step, resumed._weights) == (0, {})
    assert first._weights.keys() == weight.keys()


# --- schedules and orders


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-7),  # 2e-5 * 1 / 200
        (49, 5e-6),  # the paper's first iteration ends here: 50 / 200 = 0.25 of 2e-5
        (199, 2e-5),
        (200, 2e-5),  # (500 - 200) / (500 - 200)
        (350, 1e-5),  # 150 / 300
        (499, 2e-5 / 300),
        (500, 0.0),
        (9999, 0.0),
    ],
)
def test_learning_rate_of_the_paper(step: int, rate: float) -> None:
    assert learning_rate(preset("sd15-paper").train, step) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_constant_learning_rate() -> None:
    config = TrainConfig(learning_rate=1e-4, warmup_steps=4, decay_steps=0)
    assert [learning_rate(config, step) for step in (0, 1, 3, 4, 10**6)] == pytest.approx(
        [2.5e-5, 5e-5, 1e-4, 1e-4, 1e-4]
    )
    assert learning_rate(TrainConfig(learning_rate=1e-4, warmup_steps=0, decay_steps=0), 0) == 1e-4


def test_decay_may_end_with_the_warmup() -> None:
    config = TrainConfig(learning_rate=1.0, steps=(2,), warmup_steps=2, decay_steps=2)
    assert [learning_rate(config, step) for step in range(4)] == [0.5, 1.0, 0.0, 0.0]


def test_the_rate_is_the_optimizers(world: Path) -> None:
    player = trainer(world, warmup_steps=4, learning_rate=4e-4)
    rates = [player.train_step()["learning_rate"] for _ in range(2)]
    assert rates == pytest.approx([1e-4, 2e-4])
    assert player.optimizer.param_groups[0]["lr"] == rates[1]


IDS = [f"p{i}" for i in range(10)]


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    drawn = order(IDS, 0, 1, 0, 50)
    epochs = [[row for epoch, row in drawn if epoch == e] for e in range(5)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 5
    assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 11, 30])
def test_the_order_does_not_depend_on_the_chunks(size: int) -> None:
    whole = order(IDS, 0, 1, 0, 60)
    chunks = [order(IDS, 0, 1, start, size) for start in range(0, 60, size)]
    assert [place for chunk in chunks for place in chunk][:60] == whole


def test_the_order_depends_on_seed_and_iteration() -> None:
    orders = {tuple(order(IDS, seed, iteration, 0, 10)) for seed in (0, 1) for iteration in (1, 2)}
    assert len(orders) == 4


# --- what is refused


def refusal(world: Path, **options: object) -> str:
    with pytest.raises(SpinError) as caught:
        trainer(world, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_pairs(world: Path) -> None:
    assert refusal(world, batch_size=32) == (
        "expected at least one batch of pairs (32), got 24 in the data set; lower train.batch_size or add images"
    )


def test_missing_losers(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copytree(world / "data", tmp_path / "data")
    tiny.losers(tmp_path / "losers.safetensors", Dataset(world / "data").ids[:-2])
    assert refusal(tmp_path) == "expected a loser for every pair, got none for 2, e.g. p022; generate"


# --- the data it reads


def test_the_data_set(world: Path) -> None:
    data = Dataset(world / "data")
    assert len(data) == PAIRS
    assert (data.ids[:2], data.prompts[:2]) == (["p000", "p001"], ["colour 0", "colour 1"])
    assert data.latents_shape == (4, 8, 8)
    wanted = tiny.random_latents(PAIRS, seed=2)
    # Rows of both files, in the order asked for, one twice.
    found = data.winners(["p023", "p000", "p012", "p000"])
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted[[23, 0, 12, 0]])


def test_held_out_rows(world: Path) -> None:
    data = Dataset(world / "data")
    rows = data.held_out("test", 5)
    assert [(row.id, row.prompt) for row in rows] == [("test-0", "test 0"), ("test-1", "test 1")]
    assert rows[1].image.size == (32, 32)
    # tiny.dataset paints (40 * row, 80, 120)
    assert rows[1].image.getpixel((3, 3)) == (40, 80, 120)
    assert [row.id for row in data.held_out("validation", 1)] == ["validation-0"]
    assert not {row.id for row in rows} & set(data.ids)


def test_a_shard_may_hold_no_losers(tmp_path: Path) -> None:
    # More shards than batches: the last ones are empty.
    files: Sequence[Path] = [tmp_path / "empty.safetensors", tmp_path / "full.safetensors"]
    Latents.write(files[0], [], torch.zeros(0, *tiny.LATENTS))
    Latents.write(files[1], ["a", "b"], tiny.random_latents(2, seed=1))
    latents = Latents(files)
    assert latents.shape == tiny.LATENTS
    assert "a" in latents
    assert "c" not in latents
    assert torch.equal(latents.of(["b"])[0], tiny.random_latents(2, seed=1)[1])
