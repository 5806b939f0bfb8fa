"""The two ways a run ends badly, as users see them.

Every message is one line that says what is wrong, where, and what to do about it. The CLI prints it
without a traceback and exits with `exit_code`; in Python these are ordinary exceptions.
"""

from __future__ import annotations


class HalfweightError(Exception):
    """Base of every error halfweight raises on purpose."""

    exit_code = 1


class InputError(HalfweightError, ValueError):
    """The user's input is wrong: a flag, a recipe, a checkpoint, a text file. Exit code 2."""

    exit_code = 2


class RunError(HalfweightError, RuntimeError):
    """The input was fine but the work failed: disk full, unusable Hessian, failed verification. Exit code 1."""


def did_you_mean(word: str, options: list[str]) -> str:
    """`"; did you mean 'wanda'?"` when an option is close to `word`, otherwise the list of options."""
    import difflib

    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(sorted(options))}" if options else ""
