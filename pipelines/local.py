"""Run the compiled pipeline on this computer: the same file and components as on a cluster, as subprocesses."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spin.errors import SpinError


@contextlib.contextmanager
def _no_indent(num_spaces: int = 4) -> Iterator[None]:  # noqa: ARG001
    yield


def run_local(package: Path, params: Mapping[str, Any], root: Path) -> None:
    """Run a compiled pipeline through ``kfp.local`` and wait for its end.

    The environment must hold the S3 keys; components run in this interpreter's environment.

    Raises:
        SpinError: a task failed; its own output, above, says why.
    """
    from kfp import components, local
    from kfp.local import logging_utils

    # KFP's indenting print is not thread-safe: each loop leaves a wrapper behind that doubles every later line.
    logging_utils.indented_print = _no_indent
    # The components import the project from its root, wherever this was started.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
    )
    # Threads that wait by spinning would starve the second shard on a small computer.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    root.mkdir(parents=True, exist_ok=True)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), enable_caching=False)
    pipeline = components.load_component_from_file(str(package))
    try:
        pipeline(**params)
    except RuntimeError as error:
        # KFP colours its messages.
        lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
        reason = lines[-1].rstrip(".")
        raise SpinError(f"expected the pipeline to finish, got a failed task ({reason}); its output is above") from None
