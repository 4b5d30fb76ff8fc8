"""Random numbers that depend on what they are for, never on who draws them or in which order.

Every draw is named by its purpose, e.g. ``("noise", seed, iteration, epoch, pair id)``. So images and training noise
are the same for any number of shards, processes and micro-batches, and after any interruption.
"""

import hashlib

import torch


def seed_of(*name: str | int) -> int:
    """Return the 63-bit seed that belongs to ``name`` (the first bytes of its SHA-256)."""
    # The length prefix keeps ("a", "bc") and ("ab", "c") apart.
    text = "".join(f"{len(str(part))}:{part}" for part in name)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_of(*name: str | int) -> torch.Generator:
    """Return a CPU generator seeded by ``name``; CPU, so that an accelerator draws the same numbers.

    torch's CPU generator uses the low 32 bits of its seed. So among n names about n^2 / 2^33 pairs draw the same
    numbers: some hundred in a million, of different prompts, which biases nothing.
    """
    return torch.Generator().manual_seed(seed_of(*name))


def noise_of(shape: tuple[int, ...], *name: str | int) -> torch.Tensor:
    """Return standard normal float32 noise of ``shape`` that belongs to ``name``."""
    return torch.randn(shape, generator=generator_of(*name))
