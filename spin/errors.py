"""The one error that a user is meant to read."""

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


class SpinError(Exception):
    """A condition that the user can mend, said in one line: expected X, got Y (where); do Z.

    The command line prints it without a traceback and exits with code 2. Nothing half-written is left behind.
    """


class DamagedError(SpinError):
    """What the store should hold is missing, or is not what its digest says: asking again will not help."""


@contextmanager
def in_one_line() -> Iterator[None]:
    """End a command with one line on stderr and exit code 2 where its user can mend what went wrong."""
    try:
        yield
    except SpinError as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False, style="red")
        raise SystemExit(2) from None


def printable(text: str) -> str:
    """Return ``text`` fit for terminals and reports: control characters and surrogates escaped, length bounded."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text[:200])


def cause(error: Exception) -> str:
    """Return why a server gave no answer, in one short line, without what its clients wrap around that."""
    text = str(getattr(error, "reason", None) or error).strip()
    if wrapped := re.search(r"\(Caused by \w+\((.*)\)\)$", text):
        text = wrapped[1].strip("'\"")
    text = re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): (Failed to establish a new connection: )?", "", text)
    first = next(iter(text.splitlines()), type(error).__name__)
    # Cut between words alone: no half of an address, whose password others look for, is left.
    return printable(textwrap.shorten(first, 200, placeholder=" ...", break_on_hyphens=False, break_long_words=False))


def brief(value: object) -> str:
    """Return ``repr(value)`` for a message: one line, bounded whatever was given."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python writes out no integers of thousands of digits.
        return f"a value of type {type(value).__name__} that is too long to show"
    return printable(text) + ("..." if len(text) > 200 else "")
