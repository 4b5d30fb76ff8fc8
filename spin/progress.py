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

from spin.errors import DamagedError, SpinError
from spin.run import Run
from spin.store import Ref, Store, digest_of

logger = logging.getLogger("spin")


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
        known = run.read_progress(stage)
        self._stale = parts_of(known)
        if known and known["inputs"] == self._identity:
            try:
                self.folders = [self._store.get(part) for part in self._stale]
            except DamagedError as error:
                logger.warning("%s: starting anew, what it had cannot be read (%s)", stage, error)
            else:
                self.parts, self._stale = self._stale, []
                self.seconds, self.facts = float(known["seconds"]), known["facts"]

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
        value = {
            "inputs": self._identity,
            "parts": [part.model_dump(mode="json") for part in parts],
            "seconds": round(seconds, 2),
            "facts": facts,
        }
        if self.run.find(self._whole, self._inputs):
            # Another process has finished the stage, and removed the parts that both began from.
            discard(self._store, parts)
            return
        known = self.run.read_progress(self.stage)
        theirs = [part for part in parts_of(known) if part not in self._stale and part not in parts]
        if known and theirs and known["inputs"] == self._identity and len(known["parts"]) > len(parts):
            # Another process has come further; what it has counts, unless this one overtakes it.
            return
        self.run.write_progress(self.stage, value)
        stale, self._stale = self._stale, []
        discard(self._store, [part for part in stale if part not in parts])


def forget(run: Run, stage: str) -> None:
    """Remove the progress of a stage that is complete; a store that forbids it costs space, not the run."""
    if known := run.read_progress(stage):
        try:
            run.drop_progress(stage)
        except SpinError as error:
            logger.warning("the progress of %s stays in the store (%s)", stage, error)
        else:
            discard(run.parts_store(stage), parts_of(known))


def discard(store: Store, parts: Sequence[Ref]) -> None:
    """Remove parts that are no longer needed, as far as the store lets them go."""
    for part in parts:
        try:
            store.remove(part)
        except SpinError as error:
            logger.warning("a part that is no longer needed stays in the store (%s)", error)


def parts_of(known: dict[str, Any] | None) -> list[Ref]:
    """Return the parts that a progress document names."""
    return [Ref.model_validate(part) for part in (known or {}).get("parts", [])]
