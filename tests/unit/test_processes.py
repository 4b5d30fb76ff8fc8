"""Two processes: when they share gradients, how they agree to stop; what a pod says whose fellows do not come."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.launcher import api

from spin import checkpoint, models, processes
from spin.config import TrainConfig, foreign_to
from spin.data.dataset import Dataset, Latents
from spin.errors import SpinError
from spin.training import Stopped, Trainer
from tests import tiny

# The epsilon keeps Adam from turning the rounding of tiny gradients into whole steps.
PLAIN = {
    "beta": [20], "steps": [3], "batch_size": 8, "learning_rate": 1e-3, "adam_epsilon": 1e-4, "warmup_steps": 0,
    "decay_steps": 0, "max_grad_norm": 1e9, "max_winner_drift": 1000, "checkpoint_every": 100,
}  # fmt: skip
LORA = {"lora_rank": 4}
EXACT = {"objective": "exact-spin", "trajectory_steps": 3, "trajectory_scale": 1e-4}


def trainer(world: Path, **options: object) -> Trainer:
    losers = Latents([world / "losers.safetensors"]) if "objective" not in options else None
    unused = foreign_to(str(options.get("objective", "spin")), "given")
    plain = {name: value for name, value in PLAIN.items() if name not in unused}
    config = TrainConfig.model_validate({**plain, **options})
    model = models.load(world / "base", torch.device("cpu"))
    return Trainer(model, Dataset(world / "data"), losers, config, 1, "fp32")


def shared_gradients(player: Trainer) -> list[int]:
    """Return how often gradients were shared in each of three steps, once per bucket of weights."""
    calls: list[int] = []

    def share(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        calls.append(bucket.index())
        work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])  # type: ignore[no-any-return]

    player.player.register_comm_hook(None, share)
    counts = []
    for _ in range(3):
        calls.clear()
        player.train_step()
        counts.append(len(calls))
    return counts


def in_two(world: Path, out: Path) -> None:
    """What each of two processes does and finds; the tests look at it."""
    rank, found = processes.rank(), dict[str, Any]()
    for name, options in {"spin": {}, "lora": LORA, "exact-spin": EXACT}.items():
        found[name] = [shared_gradients(trainer(world, micro_batch_size=size, **options)) for size in (4, 1)]

    player, rows = trainer(world, micro_batch_size=2, **LORA), []
    player.run(lambda _, measures: rows.append(measures), lambda _: None, out / str(rank))
    found["rows"] = rows
    save_file({name: value.detach() for name, value in player.weights().items()}, out / f"{rank}.safetensors")

    player, learnt = trainer(world, micro_batch_size=1), 0
    learn = player.learn

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal learnt
        learnt += 1
        return learn(*arguments, **options)

    player.learn = count  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        # Four micro-batches a step; the second process alone is asked, in the midst of the second one.
        player.run(lambda *_: None, lambda _: None, out / str(rank), stop=lambda: rank == 1 and learnt >= 5)
    found |= {"learnt": learnt, "step": player.step}
    (out / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny.base(folder / "base")
    data = Dataset(tiny.dataset(folder / "data", pairs=24))
    tiny.losers(folder / "losers.safetensors", data.ids)
    return folder


@pytest.fixture(scope="module")
def two(world: Path) -> list[dict[str, Any]]:
    """Give what two processes found."""
    processes.spread(2, in_two, world, world)
    return [json.loads((world / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("objective", ["spin", "lora", "exact-spin"])
def test_gradients_are_shared_once_per_step(two: list[dict[str, Any]], objective: str) -> None:
    for found in two:
        whole, parts = found[objective]
        assert parts == whole, "one micro-batch each, or four"
        assert set(whole) == {1}, "the tiny model is one bucket"


@pytest.mark.timeout(600)
def test_adapters_train_in_two_processes_as_in_one(two: list[dict[str, Any]], world: Path, tmp_path: Path) -> None:
    alone, rows = trainer(world, micro_batch_size=8, **LORA), []
    alone.run(lambda _, measures: rows.append(measures), lambda _: None, tmp_path)
    for found in two:
        for row, other in zip(rows, found["rows"], strict=True):
            assert other == pytest.approx(row, rel=1e-3, abs=1e-6)
    for rank in range(2):
        theirs = load_file(world / f"{rank}.safetensors")
        for name, value in checkpoint.trained(alone.model.denoiser).items():
            torch.testing.assert_close(theirs[name], value.detach(), rtol=0, atol=1e-5)


@pytest.mark.timeout(600)
def test_two_processes_agree_to_stop_within_a_step(two: list[dict[str, Any]]) -> None:
    for found in two:
        # Asked before the sixth micro-batch, heard before the seventh.
        assert (found["learnt"], found["step"]) == (6, 1)


def test_the_pod_ends_what_it_grants_time_to_not_torchs_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[api.LaunchConfig] = []
    monkeypatch.setattr(api, "elastic_launch", lambda config, _: seen.append(config) or (lambda *_: None))
    processes.spread(2, print)
    assert seen[0].shutdown_timeout >= 3600


def test_pods_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in meeting.items():
        monkeypatch.setenv(f"PET_{name}", str(value))
    monkeypatch.setattr(processes, "SECONDS_TO_MEET", 1)
    with pytest.raises(SpinError, match=r"expected 2 pods to meet within 1 s, got .*; see why the others"):
        processes.spread(1, print)


def test_a_pod_leads_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.rank(), processes.node_count()) == (0, 1)
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PET_NNODES", "2")
    assert (processes.rank(), processes.node_count()) == (1, 2)
    monkeypatch.setenv("RANK", "0")
    assert processes.rank() == 0
