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
    writer     W = P^T W_T + X (C + lambda)^-1,   C = sum a a^T,  X = sum r a^T,   r = P^T (teacher's stream behind it
               - the student's, by P^T W_T): least squares of the stream; of its neurons or heads those stay whose
               loss raises that error least, and take over what the others said (least_squares/fits.py)

lambda = ridge * mean of C's diagonal. What is missing is taken token by token and then summed, so where nothing is
missing nothing changes, to the last bit.

Communication: a micro-batch as DenseInput, and tp gathers r under sequence parallelism; a solve sums over what splits
tokens (dp, cp, tp under sequence parallelism), once, and gathers a writer's over tp; then the first rank of a pipeline
stage solves, and hands the outcome round (tp, cp, dp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from minitron_nemo.activations.tokens import AnnouncedBatch
from minitron_nemo.checks import require
from minitron_nemo.least_squares.elimination import inputs_of
from minitron_nemo.least_squares.fits import regress
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


@dataclass(frozen=True)
class Fit:
    """Least squares of one reader or writer."""

    solution: Tensor
    """Of a reader D [h, k], of a tied output layer d [k], of a writer W [k, f]; float64."""
    plain_error: float
    """Share of the wanted output's sum of squares that is missing with plain selection, over the calibration tokens."""
    error: float
    """The same of the refitted one."""
    kept: tuple[int, ...] = ()
    """Of a writer: the neurons or heads that stay."""

    @classmethod
    def of(cls, outcome: tuple[Tensor, tuple[Any, ...]]) -> Fit:
        solution, (plain_error, error, *kept) = outcome
        return cls(solution, plain_error, error, tuple(kept[0]) if kept else ())


class Reader:
    """What the matrices behind one norm read: both streams there, summed over tokens."""

    def __init__(self, name: str, norm: BuiltNorm, stream: KeptStream, groups: Groups) -> None:
        self.name = name
        self.norm, self._stream, self._groups = norm, stream, groups
        device = norm.gamma().device
        self._shard = _shard(norm.config, groups)
        self._moment = SecondMoment(stream.keep, stream.keep, device)
        self._products = SecondMoment(stream.size, stream.keep, device)
        self._powers = torch.zeros(2, dtype=torch.float64, device=device)  # of what is missing, of what is wanted

    def see(self, teacher: Tensor, student: Tensor, current: AnnouncedBatch) -> None:
        """Add both streams as they enter the norm."""
        rows_of = current.mask(*self._shard).rows_of
        theirs, mine = (normalised(self.norm, rows_of(stream)) for stream in (teacher, student))
        gamma, coordinates = self.norm.gamma().to(theirs.dtype), self._stream.coordinates(mine)
        missing = gamma * (theirs - mine)
        self._moment.add(coordinates, coordinates)
        self._products.add(missing, coordinates)
        self._powers += torch.stack([each.double().square().sum() for each in (missing, gamma * theirs)])

    def solve(self, ridge: float) -> Fit:
        """Communicates: see the module's text. Raises: ValueError, on every rank of the stage: see `regress`."""
        moment, products, powers = self._sums()

        def work() -> tuple[Tensor, tuple[float, float]]:
            change = regress(moment, products, ridge) if _seen(moment) else torch.zeros_like(products)
            gain = 2 * (products * change).sum() - ((change @ moment) * change).sum()
            return change, _shares(powers[1], powers[0], powers[0] - gain)

        return Fit.of(by_first_rank(self.name, work, products, self._groups))

    def solve_tied(self, output: Tensor, ridge: float) -> Fit:
        """As `solve`, of the gamma before a tied output layer [v/tp, h]; errors are those of what the layer reads.

        Communicates: also tp, E_P^T E [k, h].
        """
        moment, products, powers = self._sums()
        gram = SecondMoment(self._stream.keep, self._stream.size, moment.device)
        gram.add(self._stream.coordinates(output.detach()), output.detach())
        whole = gram.merge_over([self._groups.tp])

        def work() -> tuple[Tensor, tuple[float, float]]:
            change = torch.zeros_like(whole[:, 0])
            if _seen(moment):
                curvature, wanted = self._stream.coordinates(whole) * moment, (whole @ products).diagonal()
                change = regress(curvature, wanted.unsqueeze(0), ridge).squeeze(0)
            missed = self._stream.coordinates(products.t()).diagonal()
            gain = 2 * (missed * change).sum() - (moment.diagonal() * change.square()).sum()
            return change, _shares(powers[1], powers[0], powers[0] - gain)

        return Fit.of(by_first_rank(self.name, work, whole[:, 0], self._groups))

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        over = [self._groups.cp, self._groups.dp, *([self._groups.tp] if self._shard[1] > 1 else [])]
        powers = self._powers
        for group in over:
            powers = all_reduce_sum(powers, group=group)
        moment, products = self._moment.merge_over(over), self._products.merge_over(over)
        return moment, products, powers


class Writer:
    """A linear that tensor parallelism splits by its input, and what its output lacks."""

    def __init__(
        self, name: str, linear: Any, blocks: int, stream: KeptStream, groups: Groups, current: AnnouncedBatch
    ) -> None:
        """
        Args:
            blocks: how many neurons or heads its inputs belong to.
        """
        self._blocks = blocks
        self.name, self._stream, self._groups, self._current = name, stream, groups, current
        self._gathers = groups.tp if linear.config.sequence_parallel else None
        self._input = DenseInput(name, linear, groups, current)
        self._products = SecondMoment(stream.keep, linear.weight.shape[1], linear.weight.device)
        self._power = torch.zeros((), dtype=torch.float64, device=linear.weight.device)
        self._rows = torch.empty(0)

    def see_input(self, activation: Tensor) -> None:
        """Add a micro-batch of the student's [s/cp, b, f/tp]."""
        self._rows = self._input.see(activation)

    def see_output(self, teacher: Tensor, student: Tensor) -> None:
        """Add what the stream behind it should be, and what it is with the weight as it stands."""
        missing = self._stream.coordinates(wide(teacher) - wide(student))
        whole = torch.cat(all_gather_shards(missing.contiguous(), group=self._gathers))  # [s/cp, b, k]
        rows = rows_that_count(whole, self._current, self.name)
        self._products.add(rows, self._rows)
        self._power += rows.double().square().sum()

    def solve(self, ridge: float, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Fit:
        """Set the linear's weight, with 0 in the columns of what goes.

        Args:
            choose: from the best weight of all inputs [k, f] and their second moment [f, f] to the neurons or
                heads that stay, ascending, and the best weight [k, f] of their inputs alone.
        Communicates: see the module's text. Raises: ValueError, on every rank of the stage: see `regress`.
        """
        moment, power = self._input.merge_over_ranks(), self._power
        over = [self._groups.cp, self._groups.dp]
        products = torch.cat(all_gather_shards(self._products.merge_over(over), group=self._groups.tp), dim=1)
        for group in over:
            power = all_reduce_sum(power, group=group)
        plain = self._stream.coordinates(self._input.gather_weight().double().t()).t()

        def missing(weight: Tensor) -> Tensor:
            change = weight - plain
            return power - 2 * (products * change).sum() + ((change @ moment) * change).sum()

        def work() -> tuple[Tensor, tuple[float, float, list[int]]]:
            best = plain + regress(moment, products, ridge) if _seen(moment) else plain
            kept, weight = choose(best, moment)
            columns = inputs_of(kept, len(moment) // self._blocks).to(moment.device)
            cut = torch.zeros_like(plain)
            cut[:, columns] = plain[:, columns]
            shares = _shares(missing(torch.zeros_like(plain)), missing(cut), missing(weight))
            return weight, (*shares, kept.tolist())

        fit = Fit.of(by_first_rank(self.name, work, plain, self._groups))
        self._input.set_weight(self._stream.spread(fit.solution.t()).t())
        return fit


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


def _shares(wanted: Tensor, *missing: Tensor) -> tuple[float, float]:
    plain, after = (float(each / wanted) if wanted > 0 else 0.0 for each in missing)
    return plain, after
