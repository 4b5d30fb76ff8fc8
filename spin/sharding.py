"""FSDP2: a network whose weights are spread over all processes, and its tensors whole again."""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from spin.processes import rank


def shard(network: nn.Module, device: torch.device, precision: str) -> None:
    """Spread the weights of a diffusers network over all processes, in place; each keeps its part on ``device``.

    A block is gathered when it computes and let go of afterwards. Blocks are what diffusers itself never splits over
    devices. Given in main memory, the network is never whole on the device.

    With ``precision`` bf16 the gathered weights are bfloat16, as autocast would make them (which would keep its copies
    of all of them); what is kept, and the sums of gradients over processes, are float32.
    """
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        # bfloat16 cannot tell neighbouring timesteps apart.
        cast_forward_inputs=False,
    )
    blocks = getattr(network, "_no_split_modules", None) or ()
    for module in reversed(list(network.modules())):
        if module is network or type(module).__name__ in blocks:
            # Also the outermost, so that between two passes a weight is always a shard.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor in one piece, any other as it is. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a sharded tensor; any other is all its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a whole ``tensor``, which every process has, sharded as ``other`` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def make_whole(network: nn.Module) -> None:
    """Give the first process's network its weights back in one piece, in main memory; every process must take part.

    After that the network is there to be stored; it cannot compute in several processes any more.
    """
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = whole(parameter.detach())
            if rank() == 0:
                setattr(module, name, nn.Parameter(weight.cpu(), requires_grad=parameter.requires_grad))
