"""promote and rollback: move the alias ``champion`` by hand or after a passed gate; the registry keeps the list."""

import getpass
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from spin.errors import SpinError
from spin.stages import logger
from spin.tracking import Registry, Version

CHAMPION, CHALLENGER = "champion", "challenger"
MOST_CHAMPIONS = 50
"""As many are remembered."""


def promote(tracking_uri: str, model_name: str, reason: str, version: str = "") -> dict[str, Any]:
    """Make a version champion, whatever the gate says of it; ``version`` empty: the challenger.

    Raises:
        SpinError: no reason, no such version, or the registry is out of reach.
    """
    by_hand = _reason(reason)
    registry = Registry(tracking_uri)
    if version:
        found = registry.version(model_name, version) if version.isdecimal() else None
    else:
        found = registry.aliased(model_name, CHALLENGER)
    if found is None:
        wanted = f"version {version}" if version else f"the alias {CHALLENGER}"
        raise SpinError(f"expected {wanted} of {model_name!r}, got none; see the registry for what there is")
    return make_champion(registry, model_name, found, by_hand)


def make_champion(registry: Registry, model_name: str, version: Version, reason: str) -> dict[str, Any]:
    """Point ``champion`` at a version and remember it, with the reason, as the last of the champions.

    Given again after a failure it goes on from wherever that was.
    """
    present, champions = registry.aliased(model_name, CHAMPION), registry.champions(model_name)
    before = present.number if present else ""
    if before not in ("", version.number) and not _last_is(champions, before):
        # It is listed before it loses the alias: a champion that is on no list could not be returned to.
        champions.append({"version": before, "at": "", "reason": "made champion elsewhere"})
        registry.set_champions(model_name, champions[-MOST_CHAMPIONS:])
    # Only who has the alias is listed as its last owner, else a rollback could make one champion that never was.
    if before != version.number:
        registry.point(model_name, CHAMPION, version.number)
    if not _last_is(champions, version.number):
        champions.append({"version": version.number, "at": _now(), "reason": reason})
        registry.set_champions(model_name, champions[-MOST_CHAMPIONS:])
    registry.tag(model_name, version.number, {"spin.promoted": f"{_now()} {reason}"})
    logger.info("promote: %s version %s is %s (before: %s)", model_name, version.number, CHAMPION, before or "none")
    return {
        "model_name": model_name,
        "champion": version.number,
        "before": before,
        "gate": version.tags.get("spin.gate", "none"),
        "gate_reason": version.tags.get("spin.gate_reason", ""),
        "reason": reason,
    }


def rollback(tracking_uri: str, model_name: str, reason: str) -> dict[str, Any]:
    """Return to the champion before the present one; given again, to the one before that.

    Raises:
        SpinError: no reason, no earlier champion, or the registry is out of reach.
    """
    by_hand = _reason(reason)
    registry = Registry(tracking_uri)
    present, champions = registry.aliased(model_name, CHAMPION), registry.champions(model_name)
    left = present.number if present else ""
    while champions and (
        champions[-1]["version"] == left or not registry.version(model_name, champions[-1]["version"])
    ):
        champions.pop()
    if not champions:
        raise SpinError(
            f"expected an earlier champion of {model_name!r}, got none; promote a version with "
            f"`spin-diffusion promote --version`"
        )
    back = champions[-1]["version"]
    # The alias comes last: until it moves, the command may be given again and leaves the same version.
    if left:
        registry.tag(model_name, left, {"spin.rolled_back": f"{_now()} {by_hand}"})
    registry.set_champions(model_name, champions)
    registry.point(model_name, CHAMPION, back)
    logger.info("rollback: %s version %s is %s again (before: %s)", model_name, back, CHAMPION, left or "none")
    return {"model_name": model_name, "champion": back, "before": left, "reason": by_hand}


def _last_is(champions: Sequence[Mapping[str, str]], version: str) -> bool:
    return bool(champions) and champions[-1]["version"] == version


def _reason(reason: str) -> str:
    """Return who gives which reason.

    Raises:
        SpinError: it is empty.
    """
    if not reason.strip():
        raise SpinError("expected a reason that others can read later, got none; set --reason")
    try:
        who = getpass.getuser()
    except (OSError, KeyError):
        # A container's user need not have a name.
        who = "unknown"
    return f"{who}: {reason.strip()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
