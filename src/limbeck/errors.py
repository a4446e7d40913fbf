"""Every error that limbeck raises on purpose, as one family.

A message is one line that names the thing, its value, what is allowed and the fix. The command line
prints it and exits with its ``code``; in Python it is an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

MOST_NAMED = 40  # choices that one line names
LATER = 75  # exit code of what may go well if it is tried later


def shown(text: str) -> str:
    """``text`` as a terminal may show it: control characters, which could move its cursor, colour it or turn
    its direction round, stand escaped; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class LimbeckError(Exception):
    """Something that the user can mend. The message is one line, whatever names stand in it.

    Attributes:
        code: the exit code of the command line.
    """

    code: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(shown(" ".join(message.splitlines())))


class ConfigError(LimbeckError):
    """A recipe, a field or a command-line value is wrong."""


class DataError(LimbeckError):
    """Data cannot be had, or is not what its description says."""


class ShapeError(LimbeckError):
    """Two parts do not fit: widths, class counts, token counts, taps."""


class CheckpointError(LimbeckError):
    """A checkpoint is damaged, belongs to another run, or cannot be written."""


class CacheError(LimbeckError):
    """A cache is damaged or was made from something else."""


class NonFiniteError(LimbeckError):
    """A NaN or an infinity where a number must stand."""


class GuardError(LimbeckError):
    """A run that would have finished and been wrong: a frozen weight moved, a parameter was orphaned."""


class ServiceError(LimbeckError):
    """A server that a run depends on does not answer; the run can be resumed."""

    code = LATER


class RankError(LimbeckError):
    """One of the processes that carry out a run together is gone; the run can be resumed."""

    code = LATER


class Interrupted(LimbeckError):
    """The user stopped the run; it can be resumed."""

    code = 130


def nearest(name: str, choices: Iterable[str]) -> str:
    """The choice most like ``name``, or an empty string when none is near."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return close[0] if close else ""


def unknown(kind: str, name: str, choices: Iterable[str], *, where: str = "") -> ConfigError:
    """A ``ConfigError`` for a name that is not among ``choices``, with the nearest one.

    Args:
        kind: what was looked for, for example ``"recipe"`` or ``"field"``.
        name: what was asked for.
        choices: what there is.
        where: the place it was written at, for example ``"teacher.prompts"``.
    """
    names = sorted(choices)
    close = nearest(name, names)
    hint = f"did you mean {close!r}? " if close else ""
    place = f" at {where}" if where else ""
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    listed = ", ".join(names[:MOST_NAMED]) or "nothing"
    return ConfigError(f"unknown {kind} {name!r}{place}: {hint}choose from {listed}{rest}")
