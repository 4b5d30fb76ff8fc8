"""require-preflight: stop the run where preflight has found a fault."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def require_preflight(faults: str):
    """Fail with the faults in one line; the table is on the task before.

    Args:
        faults: The failed checks of preflight; empty: the run may begin.
    """
    from spin.preflight import refuse

    refuse(faults)
