"""One tiny world, and one run of two iterations in it, for all tests that only look."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pipelines.laptop import Laptop
from spin.run import Index
from spin.stages import Place
from spin.stages.register import register
from tests import tiny
from tests.integration.world import World

MODEL_NAME = "tiny-player"


@pytest.fixture(scope="session")
def world(laptop_servers: Laptop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIN_CACHE", str(folder / "cache"))
        patch.setenv("SPIN_COMMIT", "c0ffee")
        # What is damaged here stays so; how long the store waits for better is tested with its faults.
        patch.setattr("spin.store.ARRIVALS", (0.01,))
        # A stage adds its own handler where there is none, on the standard output of the test that happens to be first.
        logger, handler = logging.getLogger("spin"), logging.NullHandler()
        logger.addHandler(handler)
        base, judge = tiny.base(folder / "base"), tiny.judge(folder / "judge")
        yield World(laptop_servers, base, judge, tiny.images(folder / "images"))
        logger.removeHandler(handler)


@dataclass(frozen=True)
class Played:
    """A registered run of two iterations in two shards, and its indexes by stage."""

    place: Place
    indexes: dict[str, Index]
    model_name: str = MODEL_NAME


@pytest.fixture(scope="session")
def played(world: World) -> Played:
    place = world.place("played", world.servers.mlflow_uri)
    indexes = world.play(place, iterations=2, shards=2)
    return Played(place, indexes | {"register": register(place, MODEL_NAME, 2)})
