"""When memory runs out, an accelerator's or the computer's: how that is told from other faults, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from spin.errors import SpinError


def is_full(error: Exception) -> bool:
    """Return whether ``error`` says that there is no memory left, on any kind of device."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


@contextmanager
def room_for(what: str, instead: str = "lower it, under a new run key where the run has begun,") -> Iterator[None]:
    """Say what to do ``instead``, or to use a larger accelerator, where memory runs out within the block.

    For what is drawn, the batch is part of the result: an image's last bit depends on its neighbours. So it is not
    made smaller unasked.

    Raises:
        SpinError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_full(error):
            raise
        raise SpinError(f"expected memory for {what}, got none left; {instead} or use a larger accelerator") from None
