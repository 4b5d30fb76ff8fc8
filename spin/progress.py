"""What an unfinished stage has stored so far, from which a later attempt goes on.

Parts are stored first, then the progress document that names them; they are removed in the opposite order. So the
document never names what is not there, whenever a process is killed. Two processes at one stage, as when a node that
was given up lives on, do not share parts that they add: the document is that of the one who has come further.
"""

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from spin.errors import DamagedError, SpinError
from spin.run import Run
from spin.store import Ref, Store, digest_of

logger = logging.getLogger("spin")


class Noted(BaseModel):
    """The progress document of a stage: what it was made from, its parts, and what was noted with the last one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    inputs: str
    parts: list[Ref]
    seconds: float
    facts: dict[str, Any]

    @property
    def reached(self) -> tuple[float, int]:
        """How far it has come: a training's step, as its one part stands for all before it; else how many parts."""
        step = self.facts.get("step", 0)
        return step if isinstance(step, int | float) else 0, len(self.parts)


def noted(run: Run, stage: str) -> Noted | None:
    """Return the progress document of an unfinished stage, if any.

    Raises:
        SpinError: another version wrote it.
    """
    known = run.read_progress(stage)
    return None if known is None else run.parsed(Noted, f"{stage}.progress", known)


class Progress:
    """The parts of an unfinished stage: a shard's batches, a training's last checkpoint, a scoring's chunks.

    What an attempt with other inputs left is not gone on with, and removed with the first part of this one.

    Args:
        whole: the stage whose index ends it, where ``stage`` is a share of one.

    Attributes:
        parts: the objects in the store.
        folders: where added parts, and those of earlier attempts, are on this machine.
        seconds: what earlier attempts spent on them.
        facts: what else was noted with the last part, by name; empty before the first.
    """

    def __init__(self, run: Run, stage: str, inputs: dict[str, Any], whole: str = ""):
        self.run, self.stage, self._inputs, self._identity = run, stage, inputs, digest_of(inputs)
        self._whole, self._attempt, self._store = whole or stage, uuid.uuid4().hex, run.parts_store(stage)
        self.parts: list[Ref] = []
        self.folders: list[Path] = []
        self.seconds = 0.0
        self.facts: dict[str, Any] = {}
        self._stale: list[Ref] = []
        known = noted(run, stage)
        while known and self._cannot_go_on_from(known):
            # Another process may have replaced, meanwhile, what was being fetched.
            known, before = noted(run, stage), known
            if known == before:
                return

    def _cannot_go_on_from(self, known: Noted) -> bool:
        """Fetch the parts; return whether one of them cannot be read."""
        self._stale = known.parts
        if known.inputs == self._identity:
            try:
                self.folders = [self._store.get(part) for part in known.parts]
            except DamagedError as error:
                logger.warning("%s: what it had cannot be read (%s)", self.stage, error)
                return True
            self.parts, self._stale, self.seconds, self.facts = known.parts, [], known.seconds, known.facts
        return False

    def restart(self) -> None:
        """Go on from nothing; the parts so far are removed with the next one."""
        self._stale += self.parts
        self.parts, self.folders, self.seconds, self.facts = [], [], 0.0, {}

    def add(self, folder: Path, seconds: float, **facts: Any) -> None:
        """Store one more part, on which all attempts together spent ``seconds``."""
        self._write(
            [*self.parts, self.run.put_part(self.stage, self._attempt, folder)], [*self.folders, folder], seconds, facts
        )

    def replace(self, folder: Path, seconds: float, **facts: Any) -> None:
        """Store a part that stands for all before it; its folder may go."""
        part = self.run.put_part(self.stage, self._attempt, folder)
        self._stale += self.parts
        self._write([part], [], seconds, facts)

    def _write(self, parts: list[Ref], folders: list[Path], seconds: float, facts: dict[str, Any]) -> None:
        self.parts, self.folders, self.facts = parts, folders, facts
        value = Noted(inputs=self._identity, parts=parts, seconds=round(seconds, 2), facts=facts)
        if self.run.find(self._whole, self._inputs):
            # Another process has finished the stage, and knows nothing of the parts that only this one has made.
            discard(self._store, [*parts, *self._stale])
            return
        named, known = parts, noted(self.run, self.stage)
        theirs = [part for part in known.parts if part not in self._stale and part not in parts] if known else []
        if known and theirs and known.inputs == self._identity and known.reached > value.reached:
            # Another process has come further; what it has counts, unless this one overtakes it.
            named = [*parts, *known.parts]
        else:
            self.run.write_progress(self.stage, value.model_dump(mode="json"))
        discard(self._store, [part for part in self._stale if part not in named])
        self._stale = [part for part in self._stale if part in named and part not in parts]


def forget(run: Run, stage: str) -> None:
    """Remove the progress of a stage that is complete; a store that forbids it costs space, not the run."""
    if known := noted(run, stage):
        try:
            run.drop_progress(stage)
        except SpinError as error:
            logger.warning("the progress of %s stays in the store (%s)", stage, error)
        else:
            discard(run.parts_store(stage), known.parts)


def discard(store: Store, parts: Sequence[Ref]) -> None:
    """Remove parts that are no longer needed, as far as the store lets them go."""
    for part in parts:
        try:
            store.remove(part)
        except SpinError as error:
            logger.warning("a part that is no longer needed stays in the store (%s)", error)
