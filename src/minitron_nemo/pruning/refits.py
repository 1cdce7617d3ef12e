"""Readers and writers of the residual stream, refitted so that the student says there what the teacher does.

    n_T, n_S   both streams normalised, before gamma         [t, h]
    y          coordinates of n_S                            [t, k]
    a          input of a writer, by the student             [t, f]
    r          what is still missing                         [t, h] at a norm, [t, k] behind a writer

    reader     A = diag(gamma) P + D,   D = X (C + lambda)^-1,   C = sum y y^T,  X = sum r y^T,  r = gamma (n_T - n_S)
               minimises sum |gamma n_T - A y|^2 + lambda |A - diag(gamma) P|^2; what reads the norm becomes W A, and
               gamma 1
    tied       of a tied output layer E the kept columns stay, and gamma g = gamma P + d is what changes:
               (E_P^T E_P * C + lambda) d = diag(E_P^T E X) minimises the squared error of the logits
    writer     W = P^T W_T + X (C + lambda)^-1,   C = sum w a a^T,  X = sum w r a^T,   r = P^T (teacher's stream behind
               it - the student's, by P^T W_T),  w = 1 / mean square of the teacher's stream behind it: least squares
               of the stream, by which a norm divides; of its neurons or heads those stay whose loss raises that error
               least, and take over what the others said (least_squares/fits.py)

lambda = ridge * mean of C's diagonal; the ridge is given, or the one with which the held-out tokens miss least, which
pass through the same student and are fitted nowhere (least_squares/held_out.py). What is missing is taken token by
token and then summed, so where nothing is missing nothing changes, to the last bit.

Communication: a micro-batch as DenseInput, and tp gathers r under sequence parallelism; a solve sums over what splits
tokens (dp, cp, tp under sequence parallelism), once, and gathers a writer's over tp; then the first rank of a pipeline
stage solves, and hands the outcome round (tp, cp, dp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from minitron_nemo.activations.tokens import AnnouncedBatch
from minitron_nemo.checks import require
from minitron_nemo.least_squares.elimination import inputs_of
from minitron_nemo.least_squares.fits import regress
from minitron_nemo.least_squares.held_out import USUAL, Sums, best_ridge
from minitron_nemo.parallel import (
    Groups,
    all_gather_shards,
    all_reduce_sum,
    broadcast_from,
    gather_objects,
    group_rank,
    group_size,
)
from minitron_nemo.places import BuiltNorm
from minitron_nemo.pruning.kept_stream import KeptStream, normalised, wide
from minitron_nemo.pruning.second_moments import DenseInput, SecondMoment, rows_that_count

T = TypeVar("T")
Choose: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(best weight of all inputs [k, f], their second moment [f, f], ridge) -> the neurons or heads that stay, ascending,
and the best weight [k, f] of their inputs alone."""


@dataclass(frozen=True)
class Fit:
    """Least squares of one reader or writer."""

    solution: Tensor
    """Of a reader D [h, k], of a tied output layer d [k], of a writer W [k, f]; float64."""
    plain_error: float
    """Share of the wanted output's sum of squares that is missing with plain selection, over the fitted tokens."""
    error: float
    """The same of the refitted one."""
    held_out_error: float | None
    """The same over the tokens held out; None: there are none."""
    ridge: float
    kept: tuple[int, ...] = ()
    """Of a writer: the neurons or heads that stay."""


class Reader:
    """What the matrices behind one norm read: both streams there, summed over tokens."""

    def __init__(self, name: str, norm: BuiltNorm, stream: KeptStream, groups: Groups, parts: int) -> None:
        """
        Args:
            parts: of the tokens, see two_streams.py.
        """
        self.name = name
        self.norm, self._stream, self._groups = norm, stream, groups
        device = norm.gamma().device
        self._shard = _shard(norm.config, groups)
        self._moments = [SecondMoment(stream.keep, stream.keep, device) for _ in range(parts)]
        self._products = [SecondMoment(stream.size, stream.keep, device) for _ in range(parts)]
        self._powers = torch.zeros(parts, 2, dtype=torch.float64, device=device)  # of what is missing; is wanted

    def see(self, teacher: Tensor, student: Tensor, current: AnnouncedBatch, part: int) -> None:
        """Add both streams as they enter the norm."""
        rows_of = current.mask(*self._shard).rows_of
        theirs, mine = (normalised(self.norm, rows_of(stream)) for stream in (teacher, student))
        gamma, coordinates = self.norm.gamma().to(theirs.dtype), self._stream.coordinates(mine)
        missing = gamma * (theirs - mine)
        self._moments[part].add(coordinates, coordinates)
        self._products[part].add(missing, coordinates)
        self._powers[part] += torch.stack([each.double().square().sum() for each in (missing, gamma * theirs)])

    def solve(self, ridge: float | None) -> Fit:
        """
        Args:
            ridge: None: the one with which the held-out tokens miss least.
        Communicates: see the module's text. Raises: ValueError, on every rank of the stage: see `regress`.
        """
        sums, wanted = self._sums()

        def work() -> tuple[Tensor, tuple[Any, ...]]:
            change, used = _fit(sums, ridge)
            return change, (_share(sums[0].power, wanted[0]), *_missed(sums, change, wanted), used)

        return _as_fit(by_first_rank(self.name, work, sums[0].products, self._groups))

    def solve_tied(self, output: Tensor, ridge: float | None) -> Fit:
        """As `solve`, of the gamma before a tied output layer [v/tp, h]; errors are those of what the layer reads.

        Args:
            ridge: None: `USUAL`, as all logits of all tokens determine k numbers.

        Communicates: also tp, E_P^T E [k, h].
        """
        sums, wanted = self._sums()
        fitted, used = sums[0], USUAL if ridge is None else ridge
        gram = SecondMoment(self._stream.keep, self._stream.size, fitted.moment.device)
        gram.add(self._stream.coordinates(output.detach()), output.detach())
        whole = gram.merge_over([self._groups.tp])

        def work() -> tuple[Tensor, tuple[Any, ...]]:
            change = torch.zeros_like(whole[:, 0])
            if _seen(fitted.moment):
                curvature, wish = self._stream.coordinates(whole) * fitted.moment, (whole @ fitted.products).diagonal()
                change = regress(curvature, wish.unsqueeze(0), used).squeeze(0)
            change_of_all = self._stream.spread(torch.diag(change).t()).t()  # [h, k]
            return change, (_share(fitted.power, wanted[0]), *_missed(sums, change_of_all, wanted), used)

        return _as_fit(by_first_rank(self.name, work, whole[:, 0], self._groups))

    def _sums(self) -> tuple[list[Sums], Tensor]:
        """Of each part of the tokens, and the sum of squares of what is wanted there, [parts]."""
        over = [self._groups.cp, self._groups.dp, *([self._groups.tp] if self._shard[1] > 1 else [])]
        powers = self._powers
        for group in over:
            powers = all_reduce_sum(powers, group=group)
        moments, products = ([each.merge_over(over) for each in some] for some in (self._moments, self._products))
        return [Sums(*each) for each in zip(moments, products, powers[:, 0], strict=True)], powers[:, 1]


class Writer:
    """A linear that tensor parallelism splits by its input, and what its output lacks."""

    def __init__(
        self,
        name: str,
        linear: Any,
        blocks: int,
        stream: KeptStream,
        groups: Groups,
        current: AnnouncedBatch,
        parts: int,
    ) -> None:
        """
        Args:
            blocks: how many neurons or heads its inputs belong to.
            parts: of the tokens, see two_streams.py.
        """
        self._blocks = blocks
        self.name, self._stream, self._groups, self._current = name, stream, groups, current
        self._gathers = groups.tp if linear.config.sequence_parallel else None
        self._epsilon = linear.config.layernorm_epsilon
        self._input = DenseInput(name, linear, groups, current, parts)
        device = linear.weight.device
        self._products = [SecondMoment(stream.keep, linear.weight.shape[1], device) for _ in range(parts)]
        self._powers = torch.zeros(parts, dtype=torch.float64, device=device)
        self._seen_input = torch.empty(0)

    def see_input(self, activation: Tensor) -> None:
        """Take a micro-batch of the student's [s/cp, b, f/tp]; `see_output` adds it."""
        self._seen_input = activation

    def see_output(self, teacher: Tensor, student: Tensor, part: int) -> None:
        """Add what the stream behind it should be, and what it is with the weight as it stands."""
        wanted = wide(teacher)
        per_token = (wanted.square().mean(-1, keepdim=True) + self._epsilon).rsqrt()
        missing = self._stream.coordinates(wanted - wide(student)) * per_token
        both = torch.cat([missing, per_token], dim=-1)
        across = torch.cat(all_gather_shards(both, group=self._gathers))  # [s/cp, b, k + 1]
        inputs = self._input.see(self._seen_input * across[..., -1:], part)
        rows = rows_that_count(across[..., :-1], self._current, self.name)
        self._products[part].add(rows, inputs)
        self._powers[part] += rows.double().square().sum()

    def solve(self, ridge: float | None, choose: Choose) -> Fit:
        """Set the linear's weight, with 0 in the columns of what goes.

        Args:
            ridge: None: the one with which the held-out tokens miss least, all inputs kept.
            choose: which neurons or heads stay.
        Communicates: see the module's text. Raises: ValueError, on every rank of the stage: see `regress`.
        """
        sums = self._sums()
        plain = self._stream.coordinates(self._input.gather_weight().double().t()).t()

        def work() -> tuple[Tensor, tuple[Any, ...]]:
            change, used = _fit(sums, ridge)
            kept, weight = choose(plain + change, sums[0].moment, used)
            columns = inputs_of(kept, plain.shape[1] // self._blocks).to(plain.device)
            cut = torch.zeros_like(plain)
            cut[:, columns] = plain[:, columns]
            wanted = torch.stack([each.missed_by(-plain) for each in sums])
            plain_error = _share(sums[0].missed_by(cut - plain), wanted[0])
            return weight, (plain_error, *_missed(sums, weight - plain, wanted), used, tuple(kept.tolist()))

        fit = _as_fit(by_first_rank(self.name, work, plain, self._groups))
        self._input.set_weight(self._stream.spread(fit.solution.t()).t())
        return fit

    def _sums(self) -> list[Sums]:
        """Of each part of the tokens."""
        over, powers = [self._groups.cp, self._groups.dp], self._powers
        for group in over:
            powers = all_reduce_sum(powers, group=group)
        moments = [self._input.merge_over_ranks(part) for part in range(len(powers))]
        products = [
            torch.cat(all_gather_shards(each.merge_over(over), group=self._groups.tp), dim=1) for each in self._products
        ]
        return [Sums(*each) for each in zip(moments, products, powers, strict=True)]


def by_first_rank(name: str, work: Callable[[], tuple[Tensor, T]], like: Tensor, groups: Groups) -> tuple[Tensor, T]:
    """What `work` returns on the first rank of this pipeline stage: a tensor as `like`, and a small picklable value.

    Equal matrices need not be equal to the last bit on two ranks, and of nearly equal inputs they would drop others.
    Communicates: tp, cp and dp.
    Raises: ValueError: what `work` raises, after `name`, on every rank of the stage.
    """
    over = (groups.tp, groups.cp, groups.dp)
    solution = torch.empty_like(like)
    said: T | None = None
    problem: str | None = None
    if all(group_rank(group) == 0 for group in over):
        try:
            solution, said = work()
        except ValueError as error:
            problem = f"{name}: {error}"
    for group in over:
        said, problem = gather_objects((said, problem), group=group)[0]
    require(problem is None, problem or "")
    solution = solution.contiguous()
    for group in over:
        solution = broadcast_from(solution, source=0, group=group)
    return solution, cast(T, said)


def _fit(sums: Sequence[Sums], ridge: float | None) -> tuple[Tensor, float]:
    """The map, and its ridge; of the fitted tokens and, if there are any, those held out."""
    fitted, seen = sums[0], [_seen(each.moment) for each in sums]
    if not seen[0]:
        return torch.zeros_like(fitted.products), USUAL
    if ridge is None:
        ridge = best_ridge(*sums) if seen[1:] == [True] else USUAL
    return fitted.fit(ridge), ridge


def _missed(sums: Sequence[Sums], change: Tensor, wanted: Tensor) -> tuple[float, float | None]:
    """The shares that `change` misses of the fitted tokens and of those held out, see `Fit`."""
    fitted, *held_out = (_share(each.missed_by(change), power) for each, power in zip(sums, wanted, strict=True))
    return fitted, held_out[0] if held_out and wanted[1] > 0 else None


def _as_fit(outcome: tuple[Tensor, tuple[Any, ...]]) -> Fit:
    solution, said = outcome
    return Fit(solution, *said)


def _shard(config: Any, groups: Groups) -> tuple[int, int]:
    return (group_rank(groups.tp), group_size(groups.tp)) if config.sequence_parallel else (0, 1)


def _seen(moment: Tensor) -> bool:
    """Raises: ValueError: it is not finite."""
    require(
        bool(moment.isfinite().all()),  # waits for the device
        "activations are not finite (NaN or infinity) on the calibration samples; nothing can be fitted to them. Check "
        "the checkpoint and its dtype with the evaluate stage.",
    )
    return bool(moment.diagonal().sum() > 0)


def _share(missing: Tensor, wanted: Tensor) -> float:
    return float(missing / wanted) if wanted > 0 else 0.0
