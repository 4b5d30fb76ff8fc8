"""plan: the numbers that a loop of the pipeline runs over."""

from kfp import dsl

from components.settings import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def plan(count: int, first: int) -> list[int]:
    """Return first, first + 1, ... (count numbers): iterations count from 1, shards from 0.

    Args:
        count: How many; at least 1.
        first: The first number.
    """
    if count < 1:
        raise ValueError(f"expected a count of at least 1, got {count}; set iterations and the shards")
    return [first + i for i in range(count)]
