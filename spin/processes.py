"""Several processes, one per accelerator, in one pod or several: started by torch's elastic agent, joined in one group.

Where pods train together, each is told of the others in torchrun's own variables (``PET_NNODES``, ``PET_NODE_RANK``,
``PET_MASTER_ADDR``, ``PET_MASTER_PORT``), which Kubeflow Trainer sets.
"""

import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spin.errors import SpinError

SECONDS_TO_MEET = 900
"""Pods that train together start when their images are there, which may take one of them minutes longer."""
SECONDS_TO_STOP = 3600
"""After SIGTERM, torch's agent waits so long for its processes; its own 30 s would cut short a pod that has more time.
What a pod is granted ends it anyway, so this is merely longer than any of that."""
LOOK_ABOVE = "read its lines above"
"""How the fault of a process ends that said nothing itself, maybe since another, elsewhere, is to blame."""


def rank() -> int:
    """Return this process's place in its group; 0 leads, and is alone where there is no group.

    A pod's first process, before it has started its group, has the place of its pod.
    """
    return int(os.environ.get("RANK") or os.environ.get("PET_NODE_RANK", "0"))


def node_count() -> int:
    """Return the number of pods that train together, this one included."""
    return int(os.environ.get("PET_NNODES", "1"))


def joined() -> bool:
    """Return whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def spread(processes: int, function: Callable[..., object], *arguments: Any) -> None:
    """Call ``function`` with ``arguments`` in ``processes`` new processes of each pod and wait for all of this one's.

    Raises:
        SpinError: a process of this pod raised it; one that died otherwise is told from its log. Or the other pods
            did not come.
        SystemExit: this process was told to terminate; so were the others.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        config = LaunchConfig(
            min_nodes=node_count(),
            max_nodes=node_count(),
            nproc_per_node=processes,
            max_restarts=0,
            start_method="spawn",
            shutdown_timeout=SECONDS_TO_STOP,
            **_meeting(),
        )
        try:
            elastic_launch(config, _work)(scratch, function, arguments)
        except ChildFailedError as error:
            said = sorted(Path(scratch).glob("*.txt"))
            if said:
                raise SpinError(said[0].read_text()) from None
            code = error.get_first_failure()[1].exitcode
            raise SpinError(
                f"expected {processes} processes to finish, got one that ended with {code}; {LOOK_ABOVE}"
            ) from None
        except SignalException as signal:
            raise SystemExit(128 + signal.sigval) from None
        except DistError as error:
            raise SpinError(
                f"expected {node_count()} pods to meet within {SECONDS_TO_MEET} s, got {str(error).splitlines()[0]}; "
                "see why the others did not start"
            ) from None


def _meeting() -> dict[str, Any]:
    """Return how the agents of all pods find each other; one alone needs no address that others know."""
    if node_count() == 1:
        return {"run_id": uuid.uuid4().hex, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    return {
        "run_id": "spin",
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}",
        "rdzv_configs": {"rank": int(os.environ["PET_NODE_RANK"]), "timeout": SECONDS_TO_MEET},
    }


def _work(scratch: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    try:
        function(*arguments)
    except SpinError as error:
        Path(scratch, f"{rank():05d}.txt").write_text(str(error))
        raise
