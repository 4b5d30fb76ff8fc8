"""How long an iteration trains: until a held-out score no longer improves; the best player is kept."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file

from spin.errors import SpinError
from spin.processes import rank
from spin.sharding import part, spread_like, whole


class Selection:
    """Asks for a score now and then, remembers the best player, and tells when patience has run out.

    Of several processes, which get the same scores, the first keeps the best player's weights.

    Args:
        score: a held-out score of the player as it is now; higher is better.
        every: steps between questions; the opponent is asked about first, as step 0.
        patience: questions in a row without a better score after which training is over.
    """

    def __init__(self, score: Callable[[], float], every: int, patience: int):
        self.score, self.every, self.patience = score, every, patience
        self.best_score, self.best_step, self.stale = -math.inf, 0, 0
        self._weights: dict[str, torch.Tensor] = {}

    def due(self, step: int, last: int) -> bool:
        """Return whether to ask after ``step`` of at most ``last``."""
        return step % self.every == 0 or step == last

    def consider(self, step: int, weights: Mapping[str, torch.Tensor]) -> float:
        """Score the player and keep a copy of ``weights``, in main memory, if it is the best; return the score.

        Raises:
            SpinError: the score is no finite number.
        """
        score = self.score()
        if not math.isfinite(score):
            raise SpinError(f"expected a finite score of the player at step {step}, got {score}; check the judge")
        if score > self.best_score:
            self.best_score, self.best_step, self.stale = score, step, 0
            for name, value in weights.items():
                best = whole(value.detach())
                if rank() == 0:
                    # safetensors, where they may be saved, knows one layout alone.
                    self._weights[name] = best.cpu().clone(memory_format=torch.contiguous_format)
        else:
            self.stale += 1
        return score

    @property
    def over(self) -> bool:
        return self.stale >= self.patience

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the best player's weights into ``weights``, those of all processes."""
        with torch.no_grad():
            for name, value in weights.items():
                best = self._weights[name] if rank() == 0 else torch.empty(value.shape, dtype=value.dtype)
                value.copy_(spread_like(broadcast(best.to(part(value).device)), value))

    def save(self, folder: Path) -> None:
        """Write what has been learnt so far beside a checkpoint; a task of the first process."""
        save_file(self._weights, folder / "best.safetensors")
        state = {"best_score": self.best_score, "best_step": self.best_step, "stale": self.stale}
        (folder / "selection.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""
        if rank() == 0:
            self._weights = load_file(folder / "best.safetensors")
        state = json.loads((folder / "selection.json").read_text())
        self.best_score, self.best_step, self.stale = state["best_score"], state["best_step"], state["stale"]
