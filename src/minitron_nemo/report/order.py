"""Do the held-out losses stand in the order that the recipe expects? Said in a sentence, with each distance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

CLOSE = 0.01
"""Nats per token. One seed and one held-out set cannot tell models apart that differ by less."""


def order_of(losses: Mapping[str, float | None]) -> dict[str, Any]:
    """Whether held-out losses stand as expected.

    Args:
        losses: nats per token by label, from the lowest that is expected to the highest; None where not known. Empty:
            nothing is claimed.
    Returns:
        `holds`: True, False, or None where fewer than two are known; `complete`: all that are expected are known;
        `statement`: the verdict in words, with each distance; empty where nothing is claimed.
    """
    if not losses:
        return {"holds": None, "complete": False, "statement": ""}
    known = {label: float(loss) for label, loss in losses.items() if loss is not None}
    unknown = [label for label in losses if label not in known]
    claim = " < ".join(losses)
    without = f" Not compared, as no held-out loss is known: {', '.join(unknown)}." if unknown else ""
    if len(known) < 2:
        statement = f"The expected order ({claim}) cannot be checked.{without}"
        return {"holds": None, "complete": False, "statement": statement}
    pairs = list(itertools.pairwise(known))
    wrong = [(better, worse) for better, worse in pairs if not known[better] < known[worse]]
    statement = _against(claim, known, wrong) if wrong else _in_favour(known, pairs, complete=not unknown)
    for better, worse in pairs:
        if abs(known[worse] - known[better]) < CLOSE:
            statement += f" {better} and {worse} are within {CLOSE}: too close to call from one run."
    return {"holds": not wrong, "complete": not unknown, "statement": statement + without}


def _against(claim: str, losses: Mapping[str, float], wrong: Sequence[tuple[str, str]]) -> str:
    faults = "; ".join(
        f"{better} ({losses[better]:.3f}) was expected below {worse} ({losses[worse]:.3f}) and is "
        + (f"{losses[better] - losses[worse]:.3f} above it" if losses[better] > losses[worse] else "equal to it")
        for better, worse in wrong
    )
    return f"The expected order ({claim}) does not hold: {faults}."


def _in_favour(losses: Mapping[str, float], pairs: Sequence[tuple[str, str]], *, complete: bool) -> str:
    which = "The expected order" if complete else "As far as it can be checked, the expected order"
    steps = ", ".join(f"{losses[worse] - losses[better]:.3f}" for better, worse in pairs)
    found = " < ".join(f"{label} {loss:.3f}" for label, loss in losses.items())
    return f"{which} holds: {found} (distances {steps} nats per token)."
