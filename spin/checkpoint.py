"""Resumable training state as safetensors: trained weights, their average, Adam's moments, step and history."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from spin.processes import rank
from spin.sharding import spread_like, whole


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are being trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: EMAModel | None = None,
) -> None:
    """Write weights, moments, the moving average and ``state`` (JSON: step, history) into ``folder``.

    All tensors are whole. Of a sharded module every process must call this, and the first one writes.
    """
    tensors = {}

    def keep(name: str, value: Any) -> None:
        tensor = whole(torch.as_tensor(value).detach())
        if rank() == 0:
            tensors[name] = tensor.contiguous().cpu()

    for name, parameter in trained(module).items():
        keep(f"weight/{name}", parameter)
        for moment, value in optimizer.state.get(parameter, {}).items():
            keep(f"{moment}/{name}", value)
    if average is not None:
        for name, value in zip(trained(module), average.shadow_params, strict=True):
            keep(f"average/{name}", value)
    if rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "training.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def load(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: EMAModel | None = None
) -> dict[str, Any]:
    """Restore what ``save`` wrote, in place, and return its ``state``."""
    tensors = load_file(folder / "training.safetensors")
    with torch.no_grad():
        for name, parameter in trained(module).items():
            parameter.copy_(spread_like(tensors[f"weight/{name}"], parameter))
            moments = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            # Adam keeps its step counter on the CPU, the moments beside the parameter in its layout.
            optimizer.state[parameter] = {"step": moments.pop("step")} | {
                key: torch.empty_like(parameter).copy_(spread_like(value, parameter)) for key, value in moments.items()
            }
        if average is not None:
            for name, value in zip(trained(module), average.shadow_params, strict=True):
                value.copy_(spread_like(tensors[f"average/{name}"], value))
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if average is not None:
        average.optimization_step = state["step"]
    return state
