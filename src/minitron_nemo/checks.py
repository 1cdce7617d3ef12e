"""The sentence a user gets when what they typed cannot work: the value, the limit, the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Mistake(ValueError):
    """What a person asked for cannot be done, in words with the value, the limit and the mend; no traceback helps."""


class NothingThere(Mistake, FileNotFoundError):
    """A `Mistake` about a path where nothing, or something unfinished, stands."""


class CannotWrite(OSError, Mistake):  # in this order, for `strerror` is set by OSError.__new__
    """A `Mistake` about a place that cannot be written to, or that is full."""


class Interrupted(Exception):
    """A run was told to stop and has saved what it did; the same command continues it."""


class NothingKept(Interrupted):
    """A run was told to stop and has kept nothing; the same command begins anew, and needs as long again."""


class Paused(Interrupted):
    """A run has come as far as it was asked to for now."""


def require(condition: bool, message: str, error: type[Exception] = Mistake) -> None:
    """Raise `error(message)` unless `condition` holds; for what a person typed, never for our own invariants.

    Args:
        error: a kind of `Mistake`; another one keeps its traceback.
    """
    if not condition:
        raise error(message)


@contextmanager
def reading(file: Path, mend: str) -> Iterator[None]:
    """What goes wrong in the block, which reads `file`, is said of the file: a library speaks of bytes and lines."""
    try:
        yield
    except Mistake:
        raise
    except FileNotFoundError as error:
        raise NothingThere(f"{file} is gone. {mend}") from error
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise Mistake(f"{file} cannot be read ({first.rstrip('.')}). {mend}") from error


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value` that are at least one, for the mend of a divisibility error."""
    below = value // divisor * divisor
    return ", ".join(str(multiple) for multiple in (below, below + divisor) if multiple > 0)


def require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    """`value` must be a multiple of `by`; both are named in the user's own keys."""
    require(
        value % by == 0,
        f"{name}={value} cannot be split over {by_name}={by}. "
        f"Nearest that can: {nearest_multiples(value, by)}. Change {name} or {by_name}.",
    )


def require_files(folder: Path, files: Iterable[str], what: str, mend: str) -> None:
    """FileNotFoundError unless `folder` holds every one of `files`, which make up `what`."""
    for file in files:
        require((folder / file).is_file(), f"{folder} holds no {what}: {file} is missing. {mend}", NothingThere)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' where something near exists, else the sorted list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
