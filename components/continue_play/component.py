"""continue-play: whether a further iteration is worth its accelerators."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def continue_play(
    run_key: str,
    iteration: int,
    store_uri: str,
    store_endpoint: str,
) -> bool:
    """Return False once an iteration before this one converged or diverged; the iteration is then skipped.

    Args:
        run_key: Name of the run in the store.
        iteration: Self-play iteration, from 1.
        store_uri: s3://bucket/prefix of runs and objects.
        store_endpoint: Address of the S3 server.
    """
    from spin.stages import Place
    from spin.stages.train import goes_on

    return goes_on(Place(run_key, store_uri, store_endpoint), iteration)
