"""Resumable training state as safetensors: trained weights, their average, Adam's moments, step and history."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn


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
    """Write weights, moments, the moving average and ``state`` (JSON: step, history) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in trained(module).items():
        tensors[f"weight/{name}"] = parameter.detach().contiguous().cpu()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = torch.as_tensor(value).contiguous().cpu()
    if average is not None:
        for name, value in zip(trained(module), average.shadow_params, strict=True):
            tensors[f"average/{name}"] = value.contiguous().cpu()
    save_file(tensors, folder / "training.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def load(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: EMAModel | None = None
) -> dict[str, Any]:
    """Restore what ``save`` wrote, in place, and return its ``state``."""
    tensors = load_file(folder / "training.safetensors")
    with torch.no_grad():
        for name, parameter in trained(module).items():
            parameter.copy_(tensors[f"weight/{name}"])
            moments = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            # Fused Adam keeps its step counter beside the parameter, and the moments in its layout.
            optimizer.state[parameter] = {"step": moments.pop("step").to(parameter.device)} | {
                key: torch.empty_like(parameter).copy_(value) for key, value in moments.items()
            }
        if average is not None:
            for name, value in zip(trained(module), average.shadow_params, strict=True):
                value.copy_(tensors[f"average/{name}"])
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if average is not None:
        average.optimization_step = state["step"]
    return state
