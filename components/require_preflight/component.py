"""require-preflight: stop the run where preflight has found a fault, or the scorer's keys are not good."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def require_preflight(faults: str, store_uri: str, store_endpoint: str):
    """Fail with the faults in one line; the table is on the task before. This task has the keys of those that score.

    Args:
        faults: The failed checks of preflight; empty: the run may begin.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
    """
    from spin.preflight import refuse, try_scorers_keys

    refuse(faults)
    try_scorers_keys(store_uri, store_endpoint)
