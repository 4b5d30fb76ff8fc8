"""Several processes in one pod, one per accelerator: started by torch's elastic agent, joined in one group."""

import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spin.errors import SpinError


def rank() -> int:
    """Return this process's place in its group; 0 leads, and is alone where there is no group."""
    return int(os.environ.get("RANK", "0"))


def joined() -> bool:
    """Return whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def spread(processes: int, function: Callable[..., object], *arguments: Any) -> None:
    """Call ``function`` with ``arguments`` in ``processes`` new processes and wait for all of them.

    Raises:
        SpinError: a process raised it; one that died otherwise is told from its log.
        SystemExit: this process was told to terminate; so were the others.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="spawn",
        )
        try:
            elastic_launch(config, _work)(scratch, function, arguments)
        except ChildFailedError as error:
            said = sorted(Path(scratch).glob("*.txt"))
            if said:
                raise SpinError(said[0].read_text()) from None
            code = error.get_first_failure()[1].exitcode
            raise SpinError(
                f"expected {processes} processes to finish, got one that ended with {code}; read its lines above"
            ) from None
        except SignalException as signal:
            raise SystemExit(128 + signal.sigval) from None


def _work(scratch: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    try:
        function(*arguments)
    except SpinError as error:
        Path(scratch, f"{rank():05d}.txt").write_text(str(error))
        raise
