"""Found first by Python processes whose PYTHONPATH names this folder: shards of losers store a part for every batch.

As shipped they do so every 120 s, which no run of a minute ever reaches.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

SMALL: dict[str, dict[str, float]] = {
    "spin.stages.generate": {"SECONDS_BETWEEN_PARTS": -1.0},
}


class SmallParts:
    """Sets the values of ``SMALL`` as soon as their module is imported, and imports nothing by itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        values = SMALL.pop(name, None)
        spec = find_spec(name) if values else None
        if spec is None or spec.loader is None:
            return None
        run: Any = spec.loader.exec_module

        def run_and_set(module: ModuleType) -> None:
            run(module)
            for key, value in (values or {}).items():
                assert hasattr(module, key), f"{name} has no {key} any more"
                setattr(module, key, value)

        spec.loader.exec_module = run_and_set  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, SmallParts())  # type: ignore[arg-type]
