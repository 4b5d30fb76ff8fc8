"""What the training scripts share: a time limit, a cosine schedule on that time, EMA and resumption."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = 8 if DEVICE.type == "cuda" else 1
"""How many of the CPU's batches one step takes: a GPU has room for them and would idle with fewer."""
M = TypeVar("M", bound=nn.Module)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def placed(module: M) -> M:
    """Put a network on the device, its convolutions' weights channels last."""
    return module.to(device=DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compile a loss on a GPU, anew for every shape; on the CPU it was measured to gain nothing for 96 s of warm-up."""
    return torch.compile(loss, dynamic=False) if DEVICE.type == "cuda" else loss


class TimedTraining(Generic[M]):
    """Train ``module`` for ``minutes`` of wall time, whatever the machine; resumable from ``folder``.

    Progress is elapsed training time over the limit, so the learning rate reaches 0 exactly at the end.
    ``saved`` keeps the weights, their moving average and the elapsed seconds; the optimizer state is not
    kept: Adam's moments are rebuilt within a few dozen steps. Call ``torch.manual_seed`` before the weights are made:
    what goes on draws from a seed of its own, or it would see the first batches again.
    """

    def __init__(
        self,
        module: M,
        folder: Path,
        minutes: float,
        lr: float,
        ema: float,
        flat: float = 0.0,
        weight_decay: float = 0.01,
    ):
        self.module, self.folder, self.limit, self.lr = module, folder, minutes * 60, lr
        self.decay, self.flat = ema, flat
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.elapsed, self.step = 0.0, 0
        self.curve: list[list[float]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.json").exists():
            state = json.loads((folder / "state.json").read_text())
            self.elapsed, self.step, self.curve = state["elapsed"], state["step"], state["curve"]
            module.load_state_dict(load_file(folder / "weights.safetensors"))
            self.average.load_state_dict(load_file(folder / "average.safetensors"))
            torch.manual_seed(torch.initial_seed() + self.step)

    @property
    def progress(self) -> float:
        return self.elapsed / self.limit

    def rate(self) -> float:
        """Warm-up over 100 steps, flat until ``flat`` of the time, then cosine to 0."""
        warm = min(1.0, (self.step + 1) / 100)
        late = max(0.0, (self.progress - self.flat) / (1 - self.flat))
        return self.lr * warm * 0.5 * (1 + float(torch.cos(torch.tensor(min(1.0, late) * torch.pi))))

    def save(self) -> None:
        """Write all of it out before any of it is replaced, and replace the state last."""
        for name, module in (("weights", self.module), ("average", self.average)):
            tensors = {k: v.contiguous().clone() for k, v in module.state_dict().items()}
            save_file(tensors, self.folder / f"{name}.part")
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
        state = {"elapsed": self.elapsed, "step": self.step, "device": device, "curve": self.curve}
        (self.folder / "state.part").write_text(json.dumps(state))
        for name in ("weights.safetensors", "average.safetensors", "state.json"):
            path = self.folder / name
            path.with_suffix(".part").replace(path)

    def run(self, loss_of: Callable[[], torch.Tensor], every: int = 100) -> Iterator[int]:
        """Step until the time is spent; yield after each ``every`` steps, saved.

        What is done between the yields takes no time from the limit. A GPU's steps are only queued: the mean of their
        losses waits for them, before the clock is read.
        """
        losses: list[torch.Tensor] = []
        clock = time.monotonic()
        while self.progress < 1:
            self.module.train()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            loss = loss_of()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.module.parameters()), 1 - decay)
                for mean, new in zip(self.average.buffers(), self.module.buffers(), strict=True):
                    mean.copy_(new)
            losses.append(loss.detach())
            self.step += 1
            mean_loss = float(torch.stack(losses).mean()) if self.step % every == 0 else None
            now = time.monotonic()
            self.elapsed, clock = self.elapsed + now - clock, now
            if mean_loss is not None:
                losses.clear()
                self.curve.append([self.step, round(self.elapsed, 1), round(mean_loss, 5)])
                minutes = f"{self.elapsed / 60:.1f}/{self.limit / 60:.0f} min"
                print(f"step {self.step}  {minutes}  loss {mean_loss:.4f}", flush=True)
                self.save()
                yield self.step
                clock = time.monotonic()
        self.save()
