"""The one error that a user is meant to read."""


class SpinError(Exception):
    """A condition that the user can mend, said in one line: expected X, got Y (where); do Z.

    The command line prints it without a traceback and exits with code 2. Nothing half-written is left behind.
    """


class DamagedError(SpinError):
    """What the store should hold is missing, or is not what its digest says: asking again will not help."""
