"""The one error that a user is meant to read."""


class SpinError(Exception):
    """A condition that the user can mend, said in one line: expected X, got Y (where); do Z.

    The command line prints it without a traceback and exits with code 2. Nothing half-written is left behind.
    """


class DamagedError(SpinError):
    """What the store should hold is missing, or is not what its digest says: asking again will not help."""


def printable(text: str) -> str:
    """Return ``text`` fit for terminals and reports: control characters and surrogates escaped, length bounded."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text[:200])


def brief(value: object) -> str:
    """Return ``repr(value)`` for a message: one line, bounded whatever was given."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python writes out no integers of thousands of digits.
        return f"a value of type {type(value).__name__} that is too long to show"
    return printable(text) + ("..." if len(text) > 200 else "")
