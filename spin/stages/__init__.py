"""The stages: one function each, called by a component and by the command line alike."""

import logging
import sys
from dataclasses import dataclass

from spin.errors import SpinError
from spin.processes import rank
from spin.run import Run, check_key
from spin.store import Store, addresses

logger = logging.getLogger("spin")


@dataclass(frozen=True)
class Place:
    """Where a run lives: its key, the store, and the MLflow server (empty: no tracking)."""

    run_key: str
    store_uri: str
    store_endpoint: str
    tracking_uri: str = ""
    experiment: str = "spin-diffusion"
    accelerators: int = 0
    """Accelerators that this process was promised; 0: whatever there is."""

    def check(self) -> None:
        """Make sure that the key is a name and that the addresses are such; nobody is asked.

        Raises:
            SpinError: one of them is not.
        """
        check_key(self.run_key)
        addresses(self.store_uri, self.store_endpoint)
        if self.tracking_uri:
            from spin.tracking import check_address

            check_address(self.tracking_uri)

    def open(self) -> Run:
        """Return the run; the store is checked first, so that bad keys cost nothing."""
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
            logger.setLevel(logging.WARNING if rank() else logging.INFO)
            logger.propagate = False
        if self.accelerators:
            import torch

            if (seen := torch.accelerator.device_count()) < self.accelerators:
                raise SpinError(
                    f"expected {self.accelerators} accelerator(s), got {seen}; check gpu_count and the image, or set "
                    "gpu_count to 0 to run on the CPU"
                )
        self.check()
        store = Store(self.store_uri, self.store_endpoint)
        run = Run(store, self.run_key)
        # Preflight went before, with this address: a stage may start in the middle of an outage.
        store.check(known=True)
        return run
