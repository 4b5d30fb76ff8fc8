"""The head that the LAION aesthetic predictor and ImageReward share: five linear layers without activations."""

from collections.abc import Mapping

import torch
from torch import nn

from spin.errors import SpinError

LAYERS = {"0": (None, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
"""Inputs and outputs by the authors' numbers, between which dropout layers stood."""


def head(width: int) -> nn.ModuleDict:
    """Return a head for features of ``width``; its weights are named as the authors', ``2.weight`` and so on."""
    return nn.ModuleDict({name: nn.Linear(inputs or width, outputs) for name, (inputs, outputs) in LAYERS.items()})


def filled(head: nn.ModuleDict, state: Mapping[str, torch.Tensor], what: str) -> nn.ModuleDict:
    """Return ``head`` with the weights ``state``.

    Raises:
        SpinError: one is missing, left over or of another shape.
    """
    try:
        head.load_state_dict(dict(state), strict=True)
    except RuntimeError:
        raise SpinError(
            f"expected the head of {what}: five linear layers, the first from {head['0'].in_features}; got other "
            "weights; name the right ones"
        ) from None
    return head


def value(head: nn.ModuleDict, features_ND: torch.Tensor) -> torch.Tensor:
    """Return the head's number for each row, [N]."""
    for layer in head.values():
        features_ND = layer(features_ND)
    return features_ND.squeeze(-1)
