"""What a student shall be: dims, fractions or a budget in; a `ModelShape` out.

    target     explicit dims                            hidden_size=3072
    keep       a fraction of the source's dim           ffn_hidden_size=0.65
    budget     what the whole may cost: parameters ("4.5B"), parameters outside embeddings, FLOPs per token, or memory
               at a batch and context; it resolves the dims its policy names, the others are as target and keep say

A budget shrinks the dims of its policy together: dim = source * r ** weight, rounded to multiples, with the largest r
whose model fits; then single steps of a dim that still fit are taken back, smallest first. Pure arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.pruning import BudgetConfig
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12, "P": 10**15}
_BYTES = {f"{unit}B": size for unit, size in _UNITS.items() if unit != "B"}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


_COSTS: dict[str, Callable[[ModelShape, BudgetConfig], int]] = {
    "parameters": lambda shape, _: shape.num_parameters,
    "non_embedding_parameters": lambda shape, _: shape.num_non_embedding_parameters,
    "flops_per_token": lambda shape, budget: shape.flops_per_token(budget.seq_length),
    "memory": lambda shape, budget: memory_bytes(
        shape, batch_size=budget.batch_size, seq_length=budget.seq_length, bytes_per_value=budget.bytes_per_value
    ),
}


def memory_bytes(shape: ModelShape, *, batch_size: int, seq_length: int, bytes_per_value: int = 2) -> int:
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
            that costs is logged; a budget goes in such steps, elsewhere in powers of two that hardware likes.
    Raises: ValueError: an unknown dim, one named twice, a budget nothing fits, or a shape that cannot be.
    """
    twice = sorted(set(target) & set(keep))
    require(not twice, f"{', '.join(twice)} stands in target and in keep. Leave it in one of them.")
    dims = dict(target)
    for dim in sorted(keep, reverse=True):  # num_query_groups before num_attention_heads, which must fit them
        dims[dim] = _fraction(source, dim, keep[dim], groups=dims.get("num_query_groups", source.num_query_groups))
    shape = _rounded(source, source.pruned_to(**dims), multiple_of)
    if budget.cost is None:
        return shape
    policy = {dim: weight for dim, weight in budget.dims.items() if dim not in dims}
    require(
        bool(policy),
        f"budget.{budget.cost} has no dim left to shrink: target and keep name all of {', '.join(budget.dims)}. "
        "Leave one out there, or add dims to budget.dims.",
    )
    return _fit(shape, policy, budget, multiple_of)


def parse_count(text: str, key: str, *, units: Mapping[str, int] = _UNITS) -> float:
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
    step = groups if dim == "num_attention_heads" else 1  # every group keeps equally many
    return max(step, round(getattr(source, dim) * share / step) * step)


def _step(shape: ModelShape, dim: str, multiple_of: Mapping[str, int]) -> int:
    """By how much a budget changes a dim at a time; wide dims go in powers of two near a sixteenth, at most 256."""
    if dim == "num_attention_heads":
        return shape.num_query_groups
    if dim in multiple_of:
        return multiple_of[dim]
    wide = dim.endswith(("hidden_size", "intermediate_size"))
    return min(256, 2 ** max(0, (getattr(shape, dim) // 16).bit_length() - 1)) if wide else 1


def _rounded(source: ModelShape, shape: ModelShape, multiple_of: Mapping[str, int]) -> ModelShape:
    changes = {}
    for dim, multiple in multiple_of.items():
        require(
            dim in source.prunable_dims,
            f"multiple_of.{dim} is not a prunable dim of this model; {did_you_mean(dim, source.prunable_dims)}",
        )
        have, limit = getattr(shape, dim), getattr(source, dim)
        require(
            1 <= multiple <= limit,
            f"multiple_of.{dim}={multiple} must be between 1 and the source's {dim}={limit}.",
        )
        if have != limit and have % multiple:
            changes[dim] = min(max(multiple, round(have / multiple) * multiple), limit // multiple * multiple)
    if not changes:
        return shape
    rounded = source.pruned_to(**{dim: getattr(shape, dim) for dim in source.prunable_dims} | changes)
    for dim, value in changes.items():
        logger.warning(
            "%s=%s becomes %s, a multiple of %s.", dim, f"{getattr(shape, dim):,}", f"{value:,}", multiple_of[dim]
        )
    logger.warning(
        "Rounding to multiples changes the student from %s to %s parameters (%+.2f%%).",
        f"{shape.num_parameters:,}",
        f"{rounded.num_parameters:,}",
        100 * (rounded.num_parameters / shape.num_parameters - 1),
    )
    return rounded


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
    limit = parse_count(getattr(budget, name), f"budget.{name}", units=_BYTES | _UNITS if name == "memory" else _UNITS)
    limit *= 1 if name == "memory" else 1 + budget.tolerance

    def fits(candidate: ModelShape) -> bool:
        return _COSTS[name](candidate, budget) <= limit

    if fits(shape):
        return shape
    full = {dim: getattr(shape, dim) for dim in policy}
    steps = {dim: _step(shape, dim, multiple_of) for dim in policy}

    def at(ratio: float) -> dict[str, int]:
        return {
            dim: min(size, max(steps[dim], round(size * ratio ** policy[dim] / steps[dim]) * steps[dim]))
            for dim, size in full.items()
        }

    low, high = 0.0, 1.0  # a model at `low` fits, one at `high` does not
    smallest = shape.pruned_to(**at(low))
    require(
        fits(smallest),
        f"budget.{name}={getattr(budget, name)} cannot be met by shrinking {', '.join(policy)}: even {at(low)} costs "
        f"{_COSTS[name](smallest, budget):,}. Raise it, or add dims to budget.dims.",
    )
    for _ in range(60):  # a double has no finer ratio
        middle = (low + high) / 2
        low, high = (middle, high) if fits(shape.pruned_to(**at(middle))) else (low, middle)
    best = shape.pruned_to(**at(low))
    grown = True
    while grown:
        sizes = {dim: getattr(best, dim) for dim in policy}
        steps_up = ({dim: size + steps[dim]} for dim, size in sizes.items() if size + steps[dim] <= full[dim])
        options = [option for step in steps_up if fits(option := shape.pruned_to(**sizes | step))]
        grown = bool(options)
        if grown:
            best = min(options, key=lambda option: _COSTS[name](option, budget))
    return best
