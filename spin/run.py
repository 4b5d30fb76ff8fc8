"""A run in the store: its config, and one index per finished stage. Nothing else decides what is done and what is not.

``runs/<key>/run.json`` holds the config. Each stage writes ``runs/<key>/<stage>.json`` last, when all its objects are
stored; so a stage is complete or absent. The index says what was made (digests), from what (digests) and by whom; a
stage whose index matches its inputs is not computed again. That is how a rerun resumes.
"""

import logging
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

import spin
from spin.config import RunConfig
from spin.errors import SpinError
from spin.store import Ref, Store, awaited, digest_of

logger = logging.getLogger("spin")
Parsed = TypeVar("Parsed", bound=BaseModel)
RUN_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Index(BaseModel):
    """What a finished stage leaves behind.

    Attributes:
        stage: its path below the run, e.g. ``iteration-001/train``.
        inputs: everything that determines the result, as digests and settings.
        outputs: the objects made, by name.
        facts: small results: counts, metrics, shapes.
        seconds, items: wall time and number of images or pairs worked on; summed over interrupted attempts.
        cost: FLOPs, their share of the peak, items/s, accelerator-hours (``spin.accounting.cost``); no part of the
            identity either.
        producer: versions, commit, host and device; no part of the identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    iteration: int
    inputs: dict[str, Any]
    outputs: dict[str, Ref]
    facts: dict[str, Any]
    seconds: float
    items: int
    cost: dict[str, float] = {}
    producer: dict[str, str]


def commit() -> str:
    """Return the source commit: ``SPIN_COMMIT`` (set in images), else git's, else ``unknown``."""
    if known := os.environ.get("SPIN_COMMIT"):
        return known
    try:
        where = Path(__file__).resolve().parent
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return git.stdout.strip() or "unknown"


def producer() -> dict[str, str]:
    """Return who computes: versions, commit, host, device, and the image and the KFP run, where there are."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "spin": spin.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "host": socket.gethostname(),
        "device": device,
        "image": os.environ.get("SPIN_IMAGE", ""),
        "kfp_run_id": os.environ.get("KFP_RUN_ID", ""),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += _changes(before, after, f"{where}{key}.")
        elif before != after:
            changes.append(f"{where}{key} {before!r} -> {after!r}")
    return changes


def check_key(key: str) -> None:
    """Refuse a run key that is no plain name."""
    if not RUN_KEY.fullmatch(key) or ".." in key:
        raise SpinError(
            f"expected a run key of letters, digits, '.', '_' and '-' (at most 63), got {key!r}; choose another"
        )


class Run:
    """One run key in a store.

    Raises:
        SpinError: the key is no plain name (letters, digits, ``.``, ``_``, ``-``; at most 63).
    """

    def __init__(self, store: Store, key: str):
        check_key(key)
        self.store, self.key = store, key

    def _path(self, stage: str) -> str:
        return f"runs/{self.key}/{stage}.json"

    def parsed(self, model: type[Parsed], stage: str, value: Any) -> Parsed:
        """Return a document of the run as what it should be; another version may have written it."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise SpinError(
                f"expected {self._path(stage)} as spin {spin.__version__} writes it, got another {where or 'form'} "
                f"({self.store.uri}); use the version that wrote it, or choose another run key"
            ) from None

    def began(self, config: RunConfig) -> bool:
        """Return whether the run has begun already, with this config.

        Raises:
            SpinError: it began with another one; the first differences are named.
        """
        known = self.store.read_json(self._path("run"))
        if known is None:
            return False
        # An option that is newer than the run had its default's effect before it was one.
        begun = self.parsed(RunConfig, "run", known["config"])
        if changes := _changes(begun.model_dump(mode="json"), config.model_dump(mode="json")):
            raise SpinError(
                f"expected the config that run {self.key!r} began with, got {'; '.join(changes[:3])}; choose another "
                "run key, or the old options to resume"
            )
        return True

    def begin(self, config: RunConfig) -> None:
        """Write the config of a new run, or make sure that an existing run has the same one.

        Only a config that has proven good may begin a run: it can never be changed.

        Of several that begin it at once, one does, and the others go on with it or are refused.

        Raises:
            SpinError: as ``began``.
        """
        if not self.began(config) and not self.store.create_json(
            self._path("run"), {"config": config.model_dump(mode="json")}
        ):
            self.began(config)

    def agreed(self, name: str, value: str) -> str:
        """Return what every process of the run goes by for ``name``: ``value``, unless another was faster."""
        path = self._path(name)
        # Read first: a store that ignores the condition on writes keeps at least to what is there.
        known = self.store.read_json(path)
        if known is None and self.store.create_json(path, value):
            return value
        return str(self.store.read_json(path) if known is None else known)

    def config(self) -> RunConfig:
        """Return the run's config, as written by prepare-data."""
        known = awaited(lambda: self.store.read_json(self._path("run")))
        if known is None:
            raise SpinError(f"expected a prepared run, got no run {self.key!r} in {self.store.uri}; prepare it first")
        return self.parsed(RunConfig, "run", known["config"])

    def find(self, stage: str, inputs: dict[str, Any] | None = None) -> Index | None:
        """Return the index of a finished stage; with ``inputs``, only if it was made from exactly those."""
        found = self.store.read_json(self._path(stage))
        if found is None:
            return None
        index = self.parsed(Index, stage, found)
        return index if inputs is None or digest_of(index.inputs) == digest_of(inputs) else None

    def need(self, stage: str, for_what: str) -> Index:
        """Return the index of a stage that must be complete before ``for_what`` may start."""
        index = awaited(lambda: self.find(stage))
        if index is None:
            raise SpinError(
                f"expected {stage} of run {self.key!r} to be complete before {for_what}, got none in {self.store.uri}; "
                "run it first"
            )
        return index

    def finish(self, index: Index, instead_of: Index | None = None) -> Index:
        """Write the index; from now on the stage is complete.

        Where another process has finished the same work meanwhile, its index is returned and stays: others may have
        gone on from it. ``instead_of`` is the one that was there before, which this one replaces.
        """
        value = index.model_dump(mode="json")
        if self.store.create_json(self._path(index.stage), value):
            return index
        first = self.find(index.stage, index.inputs)
        if first in (None, instead_of):
            self.store.write_json(self._path(index.stage), value)
            return index
        if first != index:
            logger.warning(
                "%s of run %s was finished meanwhile by another process (on %s); its result counts, this one's is left",
                index.stage, self.key, first.producer.get("host", "?"),
            )  # fmt: skip
        return first

    def parts_store(self, stage: str) -> Store:
        """Return where an unfinished stage keeps its parts.

        Those of scores are below ``parts/``: who scores may write there, and not where models and checkpoints are.
        """
        scores = stage.rpartition("/")[2].startswith("score")
        return self.store.below("parts") if scores else self.store

    def put_part(self, stage: str, attempt: str, folder: Path) -> Ref:
        """Store what an unfinished stage has so far, as an object of this run, stage and attempt alone.

        Others may come to the same content, another run or a second process at the same stage; removing their parts
        must not take this one's.
        """
        (folder / "whose.txt").write_text(f"{self.key} {stage} {attempt}")
        return self.parts_store(stage).put_folder(folder)

    def read_progress(self, stage: str) -> dict[str, Any] | None:
        """Return the progress document of an unfinished stage, if any; ``spin.progress.Noted`` says what is in it."""
        found: dict[str, Any] | None = self.store.read_json(self._path(f"{stage}.progress"))
        return found

    def write_progress(self, stage: str, value: dict[str, Any]) -> None:
        self.store.write_json(self._path(f"{stage}.progress"), value)

    def drop_progress(self, stage: str) -> None:
        self.store.remove_json(self._path(f"{stage}.progress"))


def iteration_stage(iteration: int, stage: str) -> str:
    """Return the path of a stage of an iteration below its run."""
    return f"iteration-{iteration:03d}/{stage}"


def whole_iteration(value: float, lowest: int) -> int:
    """Return ``value`` as an iteration number; loops in KFP hand over 1 as 1.0.

    Raises:
        SpinError: it is below ``lowest`` or no whole number.
    """
    return _whole(value, lowest, f"an iteration number of at least {lowest}", "iterations count from 1")


def whole_iterations(value: float) -> int:
    """Return ``value`` as a number of iterations.

    Raises:
        SpinError: it is below 1 or no whole number.
    """
    return _whole(value, 1, "at least 1 iteration", "set iterations to how many are to be played")


def whole_shards(value: float) -> int:
    """Return ``value`` as a number of shards.

    Raises:
        SpinError: it is below 1 or no whole number.
    """
    return _whole(value, 1, "at least 1 shard", "use the number that the images are drawn in")


def _whole(value: float, lowest: int, expected: str, do: str) -> int:
    if not value >= lowest or value % 1:  # so that neither NaN nor infinity passes
        raise SpinError(f"expected {expected}, got {value}; {do}")
    return int(value)


class Clock:
    """Wall time of a stage."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._started, 2)
