"""What a student shall be: dims, fractions or a budget in; a `ModelShape` out.

    target     explicit dims                            hidden_size=3072
    keep       a fraction of the source's dim           ffn_hidden_size=0.65
    budget     what the whole may cost: parameters ("4.5B"), parameters outside embeddings, FLOPs per token, or memory
               at a batch and context; it resolves the dims its policy names, the others are as target and keep say

A budget shrinks the dims of its policy together: dim = source * r ** weight, rounded to multiples, with the largest r
whose model fits; then single steps of a dim that still fit are taken back, smallest first. What keep and budget choose
opens in its family, where such a shape is there (`runtimes`); what target names stands. Pure arithmetic.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.pruning import BudgetConfig
from minitron_nemo.counts import Counts
from minitron_nemo.runtimes import default_multiple, nearest_that_opens, opening_problem
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape

logger = logging.getLogger(__name__)

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12, "P": 10**15}
BYTES = {f"{unit}B": size for unit, size in COUNTS.items() if unit != "B"}
BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


_FEW = 8
"""So many hidden sizes at least a budget chooses among."""

_COSTS: dict[str, Callable[[ModelShape, BudgetConfig], int]] = {
    "parameters": lambda shape, _: shape.num_parameters,
    "non_embedding_parameters": lambda shape, _: shape.num_non_embedding_parameters,
    "flops_per_token": lambda shape, budget: shape.flops_per_token(budget.seq_length),
    "memory": lambda shape, budget: memory_bytes(
        shape, batch_size=budget.batch_size, seq_length=budget.seq_length, bytes_per_value=budget.bytes_per_value
    ),
}


def memory_bytes(shape: Counts, *, batch_size: int, seq_length: int, bytes_per_value: int = 2) -> int:
    """Bytes of the weights and the key-value cache of `batch_size` sequences; activations are not counted."""
    cache = batch_size * seq_length * shape.kv_bytes_per_token(bytes_per_value)
    return shape.num_parameters * bytes_per_value + cache


def resolve_target(
    source: ModelShape,
    *,
    target: Mapping[str, int],
    keep: Mapping[str, float],
    budget: BudgetConfig,
    multiple_of: Mapping[str, int],
) -> ModelShape:
    """The student's shape.

    Args:
        target: dims as they shall be.
        keep: dims as a fraction of the source's, above 0 and at most 1.
        budget: resolves the dims of its policy that neither of them names.
        multiple_of: dims named here become multiples: those of target and keep are rounded to the nearest, and what
            that costs is logged; a budget goes in such steps. Wide dims that are not named: those of keep become
            multiples of 64 or of the largest power of two in the source's, a budget goes in powers of two.
    Raises: ValueError: an unknown dim, one named twice, a budget nothing fits, or a shape that cannot be.
    """
    twice = sorted(set(target) & set(keep))
    require(not twice, f"{', '.join(twice)} stands in target and in keep. Leave it in one of them.")
    dims = dict(target)
    for dim in sorted(keep, reverse=True):  # num_query_groups before num_attention_heads, which must fit them
        dims[dim] = _fraction(source, dim, keep[dim], groups=dims.get("num_query_groups", source.num_query_groups))
    shape = _rounded(source, source.pruned_to(**dims), multiple_of, keep)
    if budget.cost is None:
        return shape
    policy = {dim: weight for dim, weight in budget.dims.items() if dim not in dims}
    require(
        bool(policy),
        f"budget.{budget.cost} has no dim left to shrink: target and keep name all of {', '.join(budget.dims)}. "
        "Leave one out there, or add dims to budget.dims.",
    )
    return _fit(shape, policy, budget, multiple_of)


def parse_count(text: str, key: str, *, units: Mapping[str, float] = COUNTS) -> float:
    """A number with a unit: 4.5B, 800M, 16GiB.

    Raises: ValueError: no such number, or not above 0.
    """
    number = str(text).strip().replace("_", "").replace(",", "")
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if unit and number.endswith(unit)), "")
    try:
        value = float(number.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        value = 0.0
    require(
        0 < value < float("inf"),
        f"{key}={text} is not a number above 0. Write it as 4500000000, 4.5e9 or with one of "
        f"{', '.join(unit for unit in units if unit)}.",
    )
    return value


def _fraction(source: ModelShape, dim: str, share: float, *, groups: int) -> int:
    require(dim in PRUNABLE_DIMS, f"keep.{dim} is not a prunable dim; {did_you_mean(dim, PRUNABLE_DIMS)}")
    require(
        dim in source.prunable_dims,
        f"keep.{dim}: this {source.family} model does not have it; it has {', '.join(source.prunable_dims)}.",
    )
    require(0 < share <= 1, f"keep.{dim}={share} must be above 0 and at most 1: the fraction of {dim} that stays.")
    heads = dim == "num_attention_heads"
    step = groups if heads else 1  # every group keeps equally many, and gets no more than it had
    most = groups * source.heads_per_group if heads else getattr(source, dim)
    return min(most, max(step, round(getattr(source, dim) * share / step) * step))


def step_of(shape: ModelShape, dim: str, multiple_of: Mapping[str, int] = {}) -> int:
    """By how much a budget changes a dim at a time; wide dims go in powers of two near a sixteenth, at most 256."""
    if dim == "num_attention_heads":
        return shape.num_query_groups
    if dim in multiple_of:
        return multiple_of[dim]
    wide = dim.endswith(("hidden_size", "intermediate_size"))
    return min(256, 2 ** max(0, (getattr(shape, dim) // 16).bit_length() - 1)) if wide else 1


def _rounded(
    source: ModelShape, asked: ModelShape, multiple_of: Mapping[str, int], keep: Mapping[str, float]
) -> ModelShape:
    """What was asked for in multiples, and dims of `keep` so that the family opens it; says what that costs."""
    multiples = {dim: default_multiple(source, dim) for dim in sorted(keep)} | dict(multiple_of)
    changes: dict[str, Any] = {}
    for dim, multiple in multiples.items():
        require(
            dim in source.prunable_dims,
            f"multiple_of.{dim} is not a prunable dim of this model; {did_you_mean(dim, source.prunable_dims)}",
        )
        have, limit = getattr(asked, dim), getattr(source, dim)
        require(
            1 <= multiple <= limit,
            f"multiple_of.{dim}={multiple} must be between 1 and the source's {dim}={limit}.",
        )
        if have != limit and have % multiple:
            changes[dim] = min(max(multiple, round(have / multiple) * multiple), limit // multiple * multiple)
    rounded = dataclasses.replace(asked, **changes)
    free = {dim: multiples[dim] for dim in keep if getattr(asked, dim) != getattr(source, dim)}
    shape = _opening(source, rounded, free, hidden_is_named="hidden_size" in multiple_of)
    if shape == asked:
        return shape
    for dim in asked.prunable_dims:
        before, after = getattr(asked, dim), getattr(shape, dim)
        if before != after:
            why = f"a multiple of {multiples[dim]}" if before % multiples[dim] else f"which a {shape.family} opens with"
            logger.warning("%s=%s becomes %s, %s.", dim, f"{before:,}", f"{after:,}", why)
    logger.warning(
        "Rounding to multiples changes the student from %s to %s parameters (%+.2f%%).",
        f"{asked.num_parameters:,}",
        f"{shape.num_parameters:,}",
        100 * (shape.num_parameters / asked.num_parameters - 1),
    )
    return shape


def _opening(source: ModelShape, shape: ModelShape, free: Mapping[str, int], *, hidden_is_named: bool) -> ModelShape:
    """The nearest shape that opens, by moving dims of `free` in their steps; the shape as it is where there is none.

    Args:
        hidden_is_named: the step of hidden_size is the user's; ours gives way.
    """
    steps = dict(free)
    if "num_attention_heads" in steps:
        steps["num_attention_heads"] = math.lcm(steps["num_attention_heads"], shape.num_query_groups)
    while (found := nearest_that_opens(shape, source, steps)) is None:
        if hidden_is_named or steps.get("hidden_size", 1) == 1:
            return shape
        steps["hidden_size"] //= 2
    return found


def _fit(
    shape: ModelShape, policy: Mapping[str, float], budget: BudgetConfig, multiple_of: Mapping[str, int]
) -> ModelShape:
    """The largest model along the policy that fits."""
    name = budget.cost
    assert name is not None
    for dim in policy:
        require(
            dim in shape.prunable_dims,
            f"budget.dims.{dim}: this {shape.family} model does not have it; it has {', '.join(shape.prunable_dims)}.",
        )
    limit = parse_count(getattr(budget, name), f"budget.{name}", units=BYTES | COUNTS if name == "memory" else COUNTS)
    limit *= 1 if name == "memory" else 1 + budget.tolerance

    def fits(candidate: ModelShape) -> bool:
        return _COSTS[name](candidate, budget) <= limit

    if fits(shape):
        return shape
    full = {dim: getattr(shape, dim) for dim in policy}
    steps = {dim: step_of(shape, dim, multiple_of) for dim in policy}
    if "hidden_size" in policy and "hidden_size" not in multiple_of:
        steps["hidden_size"] = _fine_enough(shape, steps["hidden_size"])

    def at(ratio: float) -> dict[str, int]:
        return {
            dim: min(size, max(steps[dim], round(size * ratio ** policy[dim] / steps[dim]) * steps[dim]))
            for dim, size in full.items()
        }

    def model(ratio: float) -> ModelShape:
        nearest = shape.pruned_to(**at(ratio))
        return nearest_that_opens(nearest, shape, steps) or nearest

    low, high = 0.0, 1.0  # a model at `low` fits, one at `high` does not
    smallest = model(low)
    require(
        fits(smallest),
        f"budget.{name}={getattr(budget, name)} cannot be met by shrinking {', '.join(policy)}: even {at(low)} costs "
        f"{_COSTS[name](smallest, budget):,}. Raise it, or add dims to budget.dims.",
    )
    for _ in range(60):  # a double has no finer ratio
        middle = (low + high) / 2
        low, high = (middle, high) if fits(model(middle)) else (low, middle)
    best = model(low)
    grown = True
    while grown:
        larger = (_next_larger(best, dim, full[dim], steps[dim]) for dim in policy)
        options = [option for option in larger if option is not None and fits(option)]
        grown = bool(options)
        if grown:
            best = min(options, key=lambda option: _COSTS[name](option, budget))
    return best


def _fine_enough(shape: ModelShape, step: int) -> int:
    """`step` of the hidden size, halved until a few of its multiples open: of 576 channels and 9 heads those of 32 are
    288 and 576 alone, those of 8 also 360, 432 and 504."""

    def opening(step: int) -> int:
        sizes = range(step, shape.hidden_size + 1, step)
        return sum(opening_problem(dataclasses.replace(shape, hidden_size=size)) is None for size in sizes)

    while step > 1 and opening_problem(shape) is None and opening(step) < _FEW:
        step //= 2
    return step


def _next_larger(shape: ModelShape, dim: str, most: int, step: int) -> ModelShape | None:
    """The shape with one dim a step larger, or as many as it takes to open; None where there is none up to `most`."""
    larger: list[dict[str, Any]] = [{dim: size} for size in range(getattr(shape, dim) + step, most + 1, step)]
    options = (dataclasses.replace(shape, **changes) for changes in larger)
    opens_anyway = opening_problem(shape) is not None  # nothing of this policy opens; it is refused elsewhere
    return next((option for option in options if opens_anyway or opening_problem(option) is None), None)
