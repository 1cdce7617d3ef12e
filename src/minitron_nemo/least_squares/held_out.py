"""Least squares whose ridge is chosen by tokens that are not fitted: arithmetic on sums.

    r, a    what is missing, and what it is to be said from      [t, o], [t, f]
    C, X    sums of a a^T and of r a^T over some tokens          [f, f], [o, f]
    D       a map of a                                           [o, f]

The sums alone say what any D misses of those tokens: sum |r - D a|^2 = sum |r|^2 - 2 tr(X D^T) + tr(D C D^T).
Everything is local and float64; nothing here communicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from minitron_nemo.least_squares.fits import regress
from minitron_nemo.least_squares.ridge import NotDefinite

RIDGES = tuple(10 ** (half / 2) for half in range(-8, 5))
"""What is chosen from: 1e-4 to 100 in steps of half a decade."""
USUAL = 0.1
"""Where the choice begins, and where there is nothing to choose by."""


@dataclass(frozen=True)
class Sums:
    """Of some tokens."""

    moment: Tensor
    """C."""
    products: Tensor
    """X."""
    power: Tensor
    """sum |r|^2, a scalar."""

    def fit(self, ridge: float) -> Tensor:
        """D. Raises: ValueError: see `regress`."""
        return regress(self.moment, self.products, ridge)

    def missed_by(self, solution: Tensor) -> Tensor:
        """sum |r - D a|^2, a scalar."""
        return self.power - 2 * (self.products * solution).sum() + ((solution @ self.moment) * solution).sum()


def best_ridge(fitted: Sums, held_out: Sums) -> float:
    """The ridge of `RIDGES` with which the map fitted to the one misses least of the other: from `USUAL` on in the
    direction of less, to the first minimum. Waits for the device.
    """
    errors: dict[int, float] = {}

    def error(index: int) -> float:
        if not 0 <= index < len(RIDGES):
            return math.inf
        if index not in errors:
            try:
                errors[index] = float(held_out.missed_by(fitted.fit(RIDGES[index])))
            except NotDefinite:
                errors[index] = math.inf
        return errors[index]

    here = RIDGES.index(USUAL)
    step = 1 if error(here + 1) < error(here) else -1
    while error(here + step) < error(here):
        here += step
    return RIDGES[here]
