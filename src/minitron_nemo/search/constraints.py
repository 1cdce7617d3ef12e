"""What every candidate of a search keeps to: bands of costs, multiples, and functions of the user's own.

Constraints hold together and are asked in their order, cheap ones first. Where nobody is left, the message names the
one that the last candidates did not meet, and the nearest they came.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.checks import Mistake, did_you_mean, require
from minitron_nemo.config.search import BANDS, TIMED, ConstraintsConfig
from minitron_nemo.counts import Counts
from minitron_nemo.pruning.targets import BYTES, COUNTS, memory_bytes, parse_count
from minitron_nemo.runtimes import opening_problem, wants_whole_heads
from minitron_nemo.search.space import EXPANSION, Columns, Space
from minitron_nemo.shape import PRUNABLE_DIMS, SPLIT_DIMS, ModelShape

_ALL = "every shape"
SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Constraint:
    """One of them: which of the candidates [n] meet it."""

    words: str
    """In the user's key and value."""
    holds: Callable[[Columns], NDArray[np.bool_]]
    distance: Callable[[Columns], NDArray[np.float64]] | None = None
    """How far a candidate's cost lies from the band, and on which side; None: there is no such number."""
    cost: Callable[[Columns], Any] | None = None


@dataclass
class Feasible:
    """The candidates of a space that meet every constraint."""

    space: Space
    numbers: NDArray[np.int64]
    left: dict[str, int] = field(default_factory=dict)
    """Constraint -> candidates left after it and those before it."""

    @property
    def met(self) -> list[str]:
        """The constraints, in the order they were asked in."""
        return [words for words in self.left if words != _ALL]

    @property
    def count(self) -> int:
        return len(self.numbers)

    def shapes(self) -> Iterator[ModelShape]:
        """In the order of the space."""
        return (self.space.shape(int(number)) for number in self.numbers)


def feasible(space: Space, constraints: Sequence[Constraint], of: Feasible | None = None) -> Feasible:
    """
    Args:
        of: candidates that met others before; None: all of the space.
    Raises: Mistake: none is left; names the constraint that removed the last, and the nearest values.
    """
    before = {} if of is None else {words: of.left[words] for words in of.met}
    left = {_ALL: 0, **before, **{each.words: 0 for each in constraints}}
    found, nearest = [], _Nearest()
    for columns in space.chunks() if of is None else [space.columns(of.numbers)]:
        left[_ALL] += len(columns.numbers)
        for each in constraints:
            if not len(columns.numbers):
                break
            keep = np.broadcast_to(each.holds(columns), columns.numbers.shape)
            if not keep.any():
                nearest.see(each, columns)
            columns = columns if keep.all() else columns.where(keep, space.source)
            left[each.words] += len(columns.numbers)
        found.append(columns.numbers)
    numbers = np.concatenate(found) if found else np.empty(0, np.int64)
    if not len(numbers):
        raise Mistake(_nobody(space, left, nearest))
    return Feasible(space, numbers, left)


def _nobody(space: Space, left: Mapping[str, int], nearest: _Nearest) -> str:
    if not left[_ALL]:
        return (
            f"None of the {len(space):,} shapes of search.space can be cut out of this model: heads must fill their "
            f"query groups with at most {space.source.heads_per_group} each, and no dim may grow. Give other values."
        )
    names = list(left)
    last = next(place for place, name in enumerate(names) if not left[name])
    before = left[names[last - 1]]
    return (
        f"No candidate is left: {names[last]} is met by none of the {before:,} that met all before it"
        f"{nearest.words(names[last], space)}. Widen it, or give search.space other values."
    )


class _Nearest:
    """Of each constraint the candidates nearest to its band, from below and from above, where nobody met it."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, bool], tuple[float, float, int]] = {}

    def see(self, constraint: Constraint, columns: Columns) -> None:
        if constraint.distance is None or constraint.cost is None:
            return
        distances = np.broadcast_to(constraint.distance(columns), columns.numbers.shape)
        costs = np.broadcast_to(np.asarray(constraint.cost(columns)), columns.numbers.shape)
        for above in (False, True):
            side = np.flatnonzero(distances > 0 if above else distances < 0)
            if not len(side):
                continue
            place = side[np.argmin(np.abs(distances[side]))]
            entry = (abs(float(distances[place])), float(costs[place]), int(columns.numbers[place]))
            key = (constraint.words, above)
            self._found[key] = min(entry, self._found.get(key, entry))

    def words(self, constraint: str, space: Space) -> str:
        near = [self._found[constraint, above] for above in (False, True) if (constraint, above) in self._found]
        each = []
        for _, cost, number in near:
            shape = space.shape(number)
            dims = {"ffn_hidden_size" if dim == EXPANSION else dim for dim in space.dims}
            said = f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
            each.append(f"{said} ({', '.join(f'{dim}={getattr(shape, dim)}' for dim in sorted(dims))})")
        return f"; the nearest have {' and '.join(each)}" if each else ""


def constraints_of(config: ConstraintsConfig, source: ModelShape) -> list[Constraint]:
    """Raises: Mistake: a value that is no number, a dim or a function that is not there."""
    made: list[Constraint] = []
    for name in BANDS:
        given = getattr(config, name)
        if given is not None:
            units = BYTES | COUNTS if name == "memory" else COUNTS
            made.append(_band(name, _at_most(given), _cost(name, config), source, units))
    if config.tensor_parallel > 1:
        size = config.tensor_parallel
        dims = [dim for dim in SPLIT_DIMS if dim in source.prunable_dims]
        made.append(Constraint(f"constraints.tensor_parallel={size}", _multiples(dict.fromkeys(dims, size))))
    for dim, multiple in config.multiple_of.items():
        require(
            dim in source.prunable_dims,
            f"constraints.multiple_of.{dim} is not a prunable dim of this model; {did_you_mean(dim, PRUNABLE_DIMS)}",
        )
        made.append(Constraint(f"constraints.multiple_of.{dim}={multiple}", _multiples({dim: multiple})))
    if config.opens and wants_whole_heads(source.family) and opening_problem(source) is None:
        made.append(Constraint("constraints.opens=true", _whole_heads))
    for path in config.predicates:
        made.append(Constraint(f"constraints.predicates: {path}", _of_shapes(source, _predicate(path))))
    return made


def timed_constraints_of(
    config: ConstraintsConfig, source: ModelShape, times: Callable[[Counts], Mapping[str, NDArray[np.float64]]]
) -> list[Constraint]:
    """Those that need the machine.

    Args:
        times: see `search.latency.Times.of`.
    Raises: Mistake: a value that is no number.
    """
    made = []
    for name in TIMED:
        if (given := getattr(config, name)) is not None:
            rate = name == "throughput"
            pair = [given, None] if rate and not isinstance(given, list | tuple) else _at_most(given)
            units = COUNTS if rate else SECONDS
            made.append(_band(name, pair, _time(name, times), source, units))
    return made


def _time(name: str, times: Callable[[Counts], Mapping[str, NDArray[np.float64]]]) -> Callable[[Counts], Any]:
    return lambda counts: times(counts)[name]


def _at_most(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [None, given]


def _cost(name: str, config: ConstraintsConfig) -> Callable[[Counts], Any]:
    if name == "flops_per_token":
        return lambda counts: counts.flops_per_token(config.seq_length)
    if name == "memory":
        return lambda counts: memory_bytes(
            counts,
            batch_size=config.batch_size,
            seq_length=config.seq_length,
            bytes_per_value=config.bytes_per_value,
        )
    attribute = f"num_{name}"
    return lambda counts: getattr(counts, attribute)


def _band(
    name: str, band: list[Any], cost: Callable[[Any], Any], source: ModelShape, units: Mapping[str, float]
) -> Constraint:
    """
    Args:
        band: [from, to], either may be None.
    """
    key, whole = f"constraints.{name}", float(np.asarray(cost(source)).item())
    low, high = (None if value is None else limit(value, key, whole, units) for value in band)
    lowest, highest = low or 0.0, math.inf if high is None else high
    require(lowest <= highest, f"{key}={band}: it begins above its end. Exchange the two.")

    def distance(columns: Columns) -> NDArray[np.float64]:
        costs = np.asarray(cost(columns), np.float64)
        return np.where(costs < lowest, costs - lowest, np.where(costs > highest, costs - highest, 0.0))

    def holds(columns: Columns) -> NDArray[np.bool_]:
        costs = np.asarray(cost(columns))
        return (costs >= lowest) & (costs <= highest)

    words = band[1] if band[0] is None else band
    return Constraint(f"{key}={words}", holds, distance, cost)


def limit(value: Any, key: str, whole: float, units: Mapping[str, float] = COUNTS) -> float:
    """A cost as a number: 4.5B, or a share of `whole` up to 1, which has no unit. Raises: Mistake."""
    number = parse_count(str(value), key, units=units)
    return number * whole if number <= 1 and not str(value).strip()[-1].isalpha() else number


def _multiples(multiples: Mapping[str, int]) -> Callable[[Columns], NDArray[np.bool_]]:
    def holds(columns: Columns) -> NDArray[np.bool_]:
        keep = np.ones(columns.numbers.shape, bool)
        for dim, multiple in multiples.items():
            keep &= np.asarray(getattr(columns, dim)) % multiple == 0
        return keep

    return holds


def _whole_heads(columns: Columns) -> NDArray[np.bool_]:
    return np.asarray(columns.hidden_size % columns.num_attention_heads == 0)


def _of_shapes(source: ModelShape, holds: Callable[[ModelShape], bool]) -> Callable[[Columns], NDArray[np.bool_]]:
    """Asked of one shape after the other."""

    def each(columns: Columns) -> NDArray[np.bool_]:
        rows = zip(*(values.tolist() for values in columns.dims.values()), strict=True)
        shapes = (source.pruned_to(**dict(zip(columns.dims, row, strict=True))) for row in rows)
        return np.fromiter((holds(shape) for shape in shapes), bool, len(columns.numbers))

    return each


def _predicate(path: str) -> Callable[[ModelShape], bool]:
    """The user's function. Raises: Mistake: it is not there, or does not answer yes or no."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        mend = "Name a function as package.module.function, and let PYTHONPATH reach it."
        raise Mistake(f"constraints.predicates: {path} is not there ({error}). {mend}") from error

    def ask(shape: ModelShape) -> bool:
        try:
            answer = function(shape)
        except Exception as error:
            dims = ", ".join(f"{dim}={getattr(shape, dim)}" for dim in shape.prunable_dims)
            raise Mistake(
                f"constraints.predicates: {path} raised {type(error).__name__} ({error}) of the shape {dims}. It must "
                "answer for every shape of search.space."
            ) from error
        require(
            isinstance(answer, bool | np.bool_),
            f"constraints.predicates: {path} answered {answer!r}; it must say true or false of a ModelShape.",
        )
        return bool(answer)

    return ask
