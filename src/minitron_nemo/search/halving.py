"""Successive halving: few tokens for many candidates, more for few.

All start; after each rung the best share goes on, under one schedule, until one rung's candidates have all the steps.
Losses of short runs rank candidates wrongly (arXiv:2407.14679, figure 9: ranks settle near step 300 of 400), so nobody
is left out before a step of the user's choosing. After arXiv:2502.07780, which spends its tokens so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from minitron_nemo.checks import require


def rungs_of(steps: int, rungs: Sequence[int]) -> list[int]:
    """Steps at which candidates are compared, ascending; the last is the whole run.

    Args:
        rungs: as asked for; empty: an eighth, a quarter, a half and all of the steps, as far as they differ.
    Raises: Mistake: they do not ascend to `steps`.
    """
    if not rungs:
        return sorted({max(1, steps // part) for part in (8, 4, 2, 1)})
    require(
        all(0 < before < after for before, after in itertools.pairwise(rungs)) and rungs[-1] == steps,
        f"search.halving.rungs={list(rungs)} must rise to training.steps={steps}, the length of the whole run.",
    )
    return list(rungs)


def survivors(losses: Mapping[str, float], *, keep: float, step: int, never_before: int) -> list[str]:
    """Who goes on after a rung, best first; of equal losses the earlier in `losses`.

    Args:
        losses: candidate -> held-out loss; one that is not a number is the worst.
        keep: share that goes on, at least one of them.
        never_before: step before which everybody goes on.
    """
    ranked = sorted(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name])
    return ranked if step < never_before else ranked[: max(1, math.ceil(keep * len(ranked) - 1e-9))]


def steps_in_all(candidates: int, rungs: Sequence[int], *, keep: float, never_before: int) -> int:
    """Optimizer steps of a whole search: what it costs is known before it starts."""
    total, before, left = 0, 0, [str(number) for number in range(candidates)]
    for step in rungs:
        total += len(left) * (step - before)
        left, before = survivors(dict.fromkeys(left, 0.0), keep=keep, step=step, never_before=never_before), step
    return total
