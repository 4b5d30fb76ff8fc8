"""Too large a batch: training goes on in smaller parts with the same steps, drawing says what to lower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spin import models
from spin.config import TrainConfig, foreign_to
from spin.data.dataset import Dataset, Latents
from spin.errors import SpinError
from spin.instruments import errors_on_grid, gradient_snr
from spin.memory import is_full, room_for
from spin.training import Trainer
from tests import tiny

CPU = torch.device("cpu")
SIZES = {"full": {}, "lora": {"lora_rank": 2}, "exact": {"objective": "exact-spin", "trajectory_steps": 2}}
OPTIONS: dict[str, Any] = {
    "beta": [20], "steps": [3], "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3, "adam_epsilon": 1e-4,
    "warmup_steps": 0, "decay_steps": 0, "max_winner_drift": 1000, "max_grad_norm": 1e9,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.base(folder / "base")
    data = Dataset(tiny.dataset(folder / "data", 24))
    tiny.losers(folder / "losers.safetensors", data.ids)
    return folder


def trainer(world: Path, **options: object) -> Trainer:
    unused = foreign_to(str(options.get("objective", "spin")), "given")
    plain = {name: value for name, value in OPTIONS.items() if name not in unused}
    config = TrainConfig.model_validate({**plain, **options})
    losers = Latents([world / "losers.safetensors"]) if config.objective == "spin" else None
    return Trainer(models.load(world / "base", CPU), Dataset(world / "data"), losers, config, 1, "fp32")


def cuda_says() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def allocator_says() -> None:
    torch.empty(2**60, dtype=torch.uint8)


@contextmanager
def room(player: Trainer, latents: int, full: Callable[[], object] = cuda_says) -> Iterator[list[int]]:
    """Let no more than so many latents through the last layer of the player's network; give the sizes that passed."""
    passed: list[int] = []

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > latents:
            full()
        passed.append(len(inputs[0]))

    handle = player.model.denoiser.conv_out.register_forward_pre_hook(hook)
    yield passed
    handle.remove()


@pytest.mark.parametrize("full", [cuda_says, allocator_says])
def test_it_is_known_when_memory_is_full(full: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError) as caught:
        full()
    assert is_full(caught.value)
    assert not is_full(RuntimeError("shapes differ"))


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("full", [cuda_says, allocator_says])
def test_the_batch_stays_when_its_parts_must_shrink(
    world: Path, kind: str, full: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    """8 pairs, 16 latents, with room for 5: by 4 pairs, then by 2. The first step ends as if they had all fitted."""
    wanted, player = trainer(world, **SIZES[kind]), trainer(world, **SIZES[kind])
    # The second step is the one that runs out: there are gradients, moments and measures to begin anew with.
    steps = [wanted.train_step() for _ in range(3)]
    found = [player.train_step()]
    with room(player, 5, full) as passed:
        found += [player.train_step() for _ in range(2)]
    assert player.micro_batch_size == 2
    assert max(passed) == 4
    for one, other in zip(found, steps, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"iteration 1: no memory for micro-batches of {size} pairs, going on with {size // 2}; the batch stays at 8"
        for size in (8, 4)
    ]


def test_gradients_of_a_pass_that_failed_are_gone(world: Path) -> None:
    """The second of two parts runs out, when the first has left its gradients."""
    wanted, player = trainer(world).train_step(), trainer(world, micro_batch_size=4)
    passes, learn = 0, player.learn

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        objective = learn(*arguments, **options)
        if passes == 2:
            cuda_says()
        return objective

    player.learn = failing  # type: ignore[method-assign]
    assert player.train_step() == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert passes == 2 + 4


def test_parts_stay_whole(world: Path) -> None:
    player = trainer(world, batch_size=18, micro_batch_size=9)
    with room(player, 9):
        player.train_step()
    assert player.micro_batch_size == 3, "of 18 pairs, 4 are no whole part"


def test_the_instruments_shrink_too(world: Path) -> None:
    """They come first, so it is they who find out."""
    wanted, player = trainer(world), trainer(world)
    with room(player, 4):
        errors = player.fitting(lambda: errors_on_grid(player))
        assert player.fitting(lambda: gradient_snr(player)) is not None
    assert player.micro_batch_size == 2
    assert torch.allclose(errors.winner, errors_on_grid(wanted).winner, rtol=1e-5)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(SpinError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_no_room_for_one_pair_is_one_line(world: Path) -> None:
    player = trainer(world)
    with room(player, 1):
        assert refusal(player.train_step) == (
            "expected memory for a single pair, got none left at step 1 of iteration 1; set "
            "train.gradient_checkpointing or train.lora_rank, under a new run key, or use a larger accelerator"
        )


def test_no_room_for_moments_is_one_line(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = trainer(world)
    monkeypatch.setattr(player.optimizer, "step", cuda_says)
    assert refusal(player.train_step) == (
        "expected memory for the optimizer's moments, got none left; set train.lora_rank, or lower it, under a new run "
        "key, or use a larger accelerator"
    )


def test_one_of_several_processes_says_what_to_lower(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = trainer(world, micro_batch_size=4)
    monkeypatch.setattr(type(player.accelerator), "num_processes", 2)
    with room(player, 1):
        assert refusal(lambda: player.fitting(lambda: player.learn(player.batch([(0, 0), (0, 1)]), last=False))) == (
            "expected memory for train.micro_batch_size 4 in each process, got none left at step 1 of iteration 1; "
            "lower it, under a new run key"
        )


def test_other_faults_pass(world: Path) -> None:
    player = trainer(world)

    def mistake() -> None:
        raise RuntimeError("shapes differ")

    for act in (lambda: player.fitting(mistake), lambda: named(mistake)):
        with pytest.raises(RuntimeError, match=r"^shapes differ$"):
            act()


def named(work: Callable[[], object]) -> None:
    with room_for("generate.batch_size 64"):
        work()


def test_drawing_names_the_option() -> None:
    assert refusal(lambda: named(allocator_says)) == (
        "expected memory for generate.batch_size 64, got none left; lower it, under a new run key where the run has "
        "begun, or use a larger accelerator"
    )
