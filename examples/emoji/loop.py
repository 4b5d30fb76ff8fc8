"""What the three training scripts share: a time limit, a cosine schedule on that time, EMA and resumption."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def compiled(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compile a loss on a GPU; on the CPU it was measured to gain nothing for 96 s of warm-up."""
    return torch.compile(loss) if DEVICE.type == "cuda" else loss


class TimedTraining:
    """Train ``module`` for ``minutes`` of wall time, whatever the machine; resumable from ``folder``.

    Progress is elapsed training time over the limit, so the learning rate reaches 0 exactly at the end.
    ``saved`` keeps the weights, their moving average and the elapsed seconds; the optimizer state is not
    kept: Adam's moments are rebuilt within a few dozen steps.
    """

    def __init__(
        self,
        module: nn.Module,
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
        self.elapsed, self.step, self.curve = 0.0, 0, []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.json").exists():
            state = json.loads((folder / "state.json").read_text())
            self.elapsed, self.step, self.curve = state["elapsed"], state["step"], state["curve"]
            module.load_state_dict(load_file(folder / "weights.safetensors"))
            self.average.load_state_dict(load_file(folder / "average.safetensors"))

    @property
    def progress(self) -> float:
        return self.elapsed / self.limit

    def rate(self) -> float:
        """Warm-up over 100 steps, flat until ``flat`` of the time, then cosine to 0."""
        warm = min(1.0, (self.step + 1) / 100)
        late = max(0.0, (self.progress - self.flat) / (1 - self.flat))
        return self.lr * warm * 0.5 * (1 + float(torch.cos(torch.tensor(min(1.0, late) * torch.pi))))

    def save(self) -> None:
        for name, module in (("weights", self.module), ("average", self.average)):
            part = self.folder / f"{name}.part"
            save_file({k: v.contiguous().clone() for k, v in module.state_dict().items()}, part)
            part.replace(self.folder / f"{name}.safetensors")
        state = {"elapsed": self.elapsed, "step": self.step, "curve": self.curve}
        (self.folder / "state.json").write_text(json.dumps(state))

    def run(self, loss_of: Callable[[], torch.Tensor], every: int = 100) -> Iterator[int]:
        """Step until the time is spent; yield after each ``every`` steps, saved."""
        losses: list[torch.Tensor] = []
        while self.progress < 1:
            self.module.train()
            started = time.monotonic()
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
                for mean, now in zip(self.average.buffers(), self.module.buffers(), strict=True):
                    mean.copy_(now)
            losses.append(loss.detach())
            self.step += 1
            self.elapsed += time.monotonic() - started
            if self.step % every == 0:
                mean = float(torch.stack(losses).mean())
                losses.clear()
                self.curve.append([self.step, round(self.elapsed, 1), round(mean, 5)])
                print(
                    f"step {self.step}  {self.elapsed / 60:.1f}/{self.limit / 60:.0f} min  loss {mean:.4f}", flush=True
                )
                self.save()
                yield self.step
        self.save()
