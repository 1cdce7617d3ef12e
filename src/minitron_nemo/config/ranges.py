"""Which numbers a field of a config may have, beside the field, and the one check of them all.

    lr: float = ranged(1e-4, above=0)

Of a list or a dict each number is checked. NaN and the infinities are no number of anybody's, and a whole number is at
most `LARGEST` unless its field says more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from minitron_nemo.checks import require
from minitron_nemo.config.identity import HOW

LARGEST = 2**31 - 1
"""Of whole numbers: what C's int holds, in which Megatron-core and its kernels count samples and tokens."""
SEEDS = 2**32 - 1
"""Largest seed that NumPy, torch and Lightning all take."""
_RANGE = "range"


@dataclass(frozen=True)
class Range:
    """Limits of a number; None: no limit on that side."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    mend: str = ""

    def broken_by(self, value: float) -> str | None:
        """What a number would have to be, in words; None: it is."""
        if isinstance(value, int) and value > LARGEST and self.at_most is None and self.below is None:
            return f"at most {LARGEST}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"a finite number {self}".strip()
        within = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if within else str(self)

    def __str__(self) -> str:
        """at least 0 and below 1"""
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)


def ranged(
    default: Any = dataclasses.MISSING,
    *,
    of: Any = dataclasses.MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    mend: str = "",
    how: bool = False,
) -> Any:
    """A field whose number, or each number of whose list or dict, lies within these limits.

    Args:
        of: makes the default of a list or a dict.
        mend: what to do about a number outside; empty: the default is named.
        how: as `identity.how`.
    """
    metadata = {_RANGE: Range(at_least, above, at_most, below, mend)} | (HOW if how else {})
    if of is not dataclasses.MISSING:
        return dataclasses.field(default_factory=of, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Ranged:
    """A config whose numbers are checked when it is made, before its own checks of one field beside another."""

    KEY: ClassVar[str] = ""
    """Where it stands below a section of a recipe: `training.optim`; empty for a section itself."""

    def __post_init__(self) -> None:
        """Raises: Mistake: a number outside of its field's range."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            limits = range_of(field)
            if limits is None:
                continue
            for key, value in _numbers(f"{self.KEY}.{field.name}".lstrip("."), getattr(self, field.name)):
                limit = limits.broken_by(value)
                require(limit is None, f"{key}={value} must be {limit}{_mend(limits, field)}")


def range_of(field: dataclasses.Field[Any]) -> Range | None:
    """What a field's numbers may be; None: it has not said."""
    return field.metadata.get(_RANGE)


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """(key, number) of a value and of all within it."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(f"{key}.{name}", each)
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from _numbers(f"{key}[{place}]", each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _mend(limits: Range, field: dataclasses.Field[Any]) -> str:
    if limits.mend:
        return f"; {limits.mend}."
    if field.default is None:
        return ", or null."
    return "." if field.default is dataclasses.MISSING else f"; the default is {field.default}."
