"""What each of many candidates will lose, from a few measurements that they share.

A table holds the loss of cuts of one dim alone, at a few of its sizes. A candidate's price is the teacher's loss and
the growth its dims have in the table, added up; between two sizes of the table a straight line. Where cuts add up worse
or better than that, the measurement of the best candidates themselves says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.pruning.targets import step_of
from minitron_nemo.runtimes import WIDE_DIMS, opening_problem
from minitron_nemo.search.space import Columns
from minitron_nemo.shape import ModelShape

_LETTERS = {
    "num_layers": "l",
    "hidden_size": "h",
    "ffn_hidden_size": "f",
    "num_attention_heads": "n",
    "num_query_groups": "g",
    "num_moe_experts": "e",
    "moe_ffn_hidden_size": "m",
    "moe_shared_expert_intermediate_size": "s",
}


def default_space(source: ModelShape) -> dict[str, object]:
    """Where nobody gave one: widths from half the source's on in some eight steps, and heads inside their groups."""
    space: dict[str, object] = {
        dim: {"from": 0.5, "multiple_of": step_of(source, dim)} for dim in source.prunable_dims if dim in WIDE_DIMS
    }
    groups, most = source.num_query_groups, source.heads_per_group
    if most > 1:
        space["num_attention_heads"] = [groups * each for each in range(-(-most // 2), most + 1)]
    return space


def name_of(dims: Mapping[str, int]) -> str:
    """A candidate's name, of the dims that a search varies: h160-f384-n4."""
    return "-".join(f"{_LETTERS[dim]}{size}" for dim, size in dims.items())


def points_of(source: ModelShape, dim: str, sizes: Iterable[int], points: int) -> list[int]:
    """Sizes of a dim that are measured alone: the smallest, and others at equal distances up to the source's own; of
    those with which the source still opens, where it does."""
    whole, opens = getattr(source, dim), opening_problem(source) is None
    smaller = sorted({size for size in sizes if size < whole})
    smaller = [size for size in smaller if not opens or opening_problem(source.pruned_to(**{dim: size})) is None]
    if len(smaller) <= points:
        return smaller
    wanted = np.linspace(smaller[0], whole, points + 1)[:-1]
    return sorted({min(smaller, key=lambda size: abs(size - place)) for place in wanted})


def prices(
    columns: Columns, source: ModelShape, table: Mapping[str, Mapping[int, float]], loss: float
) -> NDArray[np.float64]:
    """[n] nats per token.

    Args:
        table: dim -> size -> loss of the source with this dim alone cut to it.
        loss: of the source.
    """
    total = np.full(columns.numbers.shape, loss)
    for dim, losses in table.items():
        sizes = [*sorted(losses), getattr(source, dim)]
        growth = [*(losses[size] - loss for size in sorted(losses)), 0.0]
        total += np.interp(columns.dims[dim], sizes, growth)
    return total


def on_front(costs: Sequence[float], losses: Sequence[float]) -> list[bool]:
    """Whether nobody else costs and loses at most as much, and less of one."""
    pairs = list(zip(costs, losses, strict=True))
    return [not any(o != pair and o[0] <= pair[0] and o[1] <= pair[1] for o in pairs) for pair in pairs]
