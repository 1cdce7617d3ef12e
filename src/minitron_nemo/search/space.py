"""Every shape a search may choose, without a list of them: arithmetic on arrays, a chunk of candidates at a time.

    hidden_size: [4096, 4608]                          these
    ffn_hidden_size: {from: 8192, to: 16384, step: 512}
    num_layers: {from: 0.8, to: 1.0, step: 1}          shares of the source's, in whole steps from the larger end
    ffn_expansion: [2.5, 3, 3.5]                       ffn_hidden_size as so many times the hidden size

A candidate has a number, its place in the product of the dims in their order; what cannot be a student of the source
(heads that do not fit their groups, a dim larger than the source's) is left out where candidates are made.
Source of the grids: arXiv:2407.14679, table 9 (layout of NeurIPS).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.counts import Counts
from minitron_nemo.shape import ModelShape

EXPANSION = "ffn_expansion"
CHUNK = 1 << 17
"""Candidates counted at once: their arrays stay in a core's cache."""


class Columns(Counts):
    """The counts of many candidates: dims that vary are arrays [n] int64, the others the source's."""

    def __init__(self, source: ModelShape, numbers: NDArray[np.int64], dims: Mapping[str, NDArray[np.int64]]) -> None:
        for field in dataclasses.fields(source):
            setattr(self, field.name, getattr(source, field.name))
        for dim, values in dims.items():
            setattr(self, dim, values)
        self.numbers, self.dims = numbers, dict(dims)

    def where(self, keep: NDArray[np.bool_], source: ModelShape) -> Columns:
        """Those of the candidates."""
        return Columns(source, self.numbers[keep], {dim: values[keep] for dim, values in self.dims.items()})


@dataclass(frozen=True)
class Space:
    """The product of the dims' values.

    Args:
        dims: dim (or `ffn_expansion`) -> its values, ascending.
    """

    source: ModelShape
    dims: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, source: ModelShape, dims: Mapping[str, Any]) -> Space:
        """Raises: Mistake: a dim that is unknown, is not the source's, or has no value that pruning can reach."""
        require(bool(dims), "search.space is empty: nothing would be searched. Give a dim its values.")
        known = (*source.prunable_dims, EXPANSION)
        for dim in dims:
            require(dim in known, f"search.space.{dim} is not a prunable dim of this model; {did_you_mean(dim, known)}")
        require(
            EXPANSION not in dims or "ffn_hidden_size" not in dims,
            f"search.space gives {EXPANSION} and ffn_hidden_size, which are the same dim. Leave one out.",
        )
        require(
            source.moe_layer_freq is None or "num_layers" not in dims,
            "search.space.num_layers: which of this model's dense and expert layers stay decides the shape, which a "
            "search does not choose. Leave num_layers out.",
        )
        return cls(source, {dim: _values(source, dim, given) for dim, given in dims.items()})

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.dims.values())

    def chunks(self) -> Iterator[Columns]:
        """Candidates that a cut of the source can be, in their order."""
        for first in range(0, len(self), CHUNK):
            columns = self.columns(np.arange(first, min(first + CHUNK, len(self))))
            possible = self._possible(columns)
            yield columns if possible.all() else columns.where(possible, self.source)

    def columns(self, numbers: NDArray[np.int64]) -> Columns:
        dims, rest = {}, numbers
        for dim, values in reversed(self.dims.items()):
            before = rest // len(values)
            dims[dim] = np.asarray(values)[rest - before * len(values)]  # several times as fast as np.divmod
            rest = before
        if EXPANSION in dims:
            hidden = dims.get("hidden_size", self.source.hidden_size)
            dims["ffn_hidden_size"] = np.rint(dims.pop(EXPANSION) * hidden).astype(np.int64)
        return Columns(self.source, numbers, dict(reversed(dims.items())))

    def shape(self, number: int) -> ModelShape:
        """A candidate as the shape of a model."""
        dims = self.columns(np.asarray([number])).dims
        return self.source.pruned_to(**{dim: int(values[0]) for dim, values in dims.items()})

    def _possible(self, columns: Columns) -> NDArray[np.bool_]:
        heads, groups = columns.num_attention_heads, columns.num_query_groups
        experts = 0 if columns.num_moe_experts is None else columns.num_moe_experts
        routed = columns.moe_router_topk or 0
        possible = np.asarray(heads % groups == 0) & np.asarray(heads <= groups * self.source.heads_per_group)
        possible = possible & np.asarray(columns.ffn_hidden_size <= self.source.ffn_hidden_size)
        return np.broadcast_to(possible & np.asarray(experts >= routed), columns.numbers.shape)


def _values(source: ModelShape, dim: str, given: Any) -> tuple[float, ...]:
    """The values of a dim, ascending. Raises: Mistake."""
    key, most = f"search.space.{dim}", None if dim == EXPANSION else getattr(source, dim)
    if isinstance(given, Mapping):
        values = _steps(key, dict(given), most)
    else:
        listed = given if isinstance(given, list | tuple) else [given]
        values = [_size(key, value, most) for value in listed]
    require(
        bool(values) and min(values) > 0, f"{key}={given} has no value above 0. Give it a list, or from, to and step."
    )
    if most is not None:
        require(
            max(values) <= most,
            f"{key} reaches {max(values)}, and the source's {dim} is {most}; pruning only makes models smaller. "
            f"Let it end at {most}.",
        )
    return tuple(sorted(set(values)))


def _size(key: str, value: Any, most: int | None) -> float:
    """A value as it stands: a whole number, or of a dim a share of the source's."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(number, f"{key}={value!r} is not a number.")
    if most is None:
        return float(value)
    if (isinstance(value, float) and not value.is_integer()) or (isinstance(value, float) and value == 1.0):
        require(0 < value <= 1, f"{key}={value} must be a whole number, or a share of the source's up to 1.0.")
        return max(1, round(value * most))
    return int(value)


def _steps(key: str, given: dict[str, Any], most: int | None) -> list[float]:
    unknown = ", ".join(sorted(set(given) - {"from", "to", "step", "multiple_of"}))
    require(not unknown, f"{key}.{unknown} is not known; a range has from, to, and step or multiple_of.")
    by = [name for name in ("step", "multiple_of") if name in given]
    require(
        "from" in given and len(by) == 1 and _size(key, given[by[0]], None) > 0,
        f"{key}={given} must have from, and one of step and multiple_of above 0; to is the source's where left out.",
    )
    require("to" in given or most is not None, f"{key}={given} must have to.")
    step = given[by[0]]
    first, last = _size(key, given["from"], most), _size(key, given.get("to", most), most)
    require(first <= last, f"{key}: from={given['from']} lies above to={given.get('to', most)}. Exchange them.")
    begin = first if by == ["step"] else math.ceil(first / step) * step
    return [begin + step * place for place in range(math.floor((last - begin) / step + 1e-9) + 1)]
