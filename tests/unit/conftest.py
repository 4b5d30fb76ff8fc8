"""What unit tests share: the tiny base models, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function that returns a family's base model; nobody may write into it."""
    folder = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        path = folder / family
        return path if path.exists() else tiny.base(path, family)

    return base
