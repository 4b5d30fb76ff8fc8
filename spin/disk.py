"""Room on this machine's disks: scratch folders, and one line that names the folder where none is left."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spin.errors import SpinError

NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""No space, a quota, a limit. By their words: libraries that write themselves pass on no number."""


@contextmanager
def room_in(folder: Path, variable: str) -> Iterator[None]:
    """Name the folder, and the ``variable`` that sets it, where its disk becomes full within the block.

    Raises:
        SpinError: a write failed for lack of room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        words = next((words for words in NO_ROOM if words in str(error)), None)
        if words is None:
            raise
        raise SpinError(
            f"expected room on the disk of {folder}, got {words!r}; free or add space, or set {variable} to another "
            "folder, and start the run again with the same run key"
        ) from None


@contextmanager
def scratch() -> Iterator[Path]:
    """Give an empty folder that is gone after the block.

    Raises:
        SpinError: its disk became full.
    """
    with room_in(Path(tempfile.gettempdir()), "TMPDIR"), tempfile.TemporaryDirectory(prefix="spin-") as folder:
        yield Path(folder)
