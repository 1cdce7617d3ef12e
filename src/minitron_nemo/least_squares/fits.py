"""What a linear's kept inputs can still say of its whole output: the least-squares arithmetic of compensation.

    W        weight of the linear that reads the inputs                 [h, f]
    C        sum of a a^T over the tokens that count, a its input       [f, f] float64
    S, D     inputs that are kept and that are dropped

The new weight W' reads S alone and minimises, over the calibration tokens,

    sum |W a - W' a|^2 + lambda |W - W'|^2,      lambda = ridge * mean of C's diagonal,

whose solution is W'_S = W_S + W_D C_DS (C_SS + lambda)^-1, W'_D = 0: a large ridge leaves the plain selection, and with
nothing dropped W' is W. Which inputs are dropped, where that is free, is elimination.py's.

Large products and factors are float32 where that is enough (`ridge.in_least_precision`), sums are float64. Everything
is local; nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.least_squares.elimination import Elimination, eliminate_blocks
from minitron_nemo.least_squares.ridge import cholesky, energy, in_least_precision, shift_of


@dataclass(frozen=True)
class Refit:
    """A linear after some of its inputs are dropped."""

    weight: Tensor
    """[h, f] in the linear's dtype: kept columns refitted, dropped columns 0."""
    plain_error: float
    """sum |W a - W_S a_S|^2 / sum |W a|^2: the dropped inputs simply gone."""
    error: float
    """The same of `weight`, rounded to its dtype."""


def refit(weight: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Refit:
    """Reproduce `weight`'s output from the `kept` inputs.

    Args:
        weight: [h, f], any dtype.
        moment: [f, f] float64, the second moment C; all 0 (nothing was seen) leaves the plain selection.
        kept: [k] int64, ascending.
    Memory: beside C, [k, f], [k, k] and [h, f] four times, float32, or float64 by `in_least_precision`.
    Raises: ValueError: C_SS + lambda is not positive definite.
    """
    kept = kept.to(moment.device)
    gone = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
    gone[kept] = False
    dropped = gone.nonzero().flatten()

    def solve(dtype: torch.dtype) -> Refit:
        whole = weight.to(dtype)
        new = whole.masked_fill(gone, 0)
        power = energy(whole, moment, dtype)
        if bool(power > 0):  # reading the value waits for the device; so does the factorisation
            own = moment[kept][:, kept].to(dtype)
            own.diagonal().add_(shift_of(moment, ridge))
            unexplained = moment[kept][:, dropped].to(dtype) @ whole[:, dropped].t()  # [k, h]
            new[:, kept] += torch.cholesky_solve(unexplained, cholesky(own, ridge, len(kept))).t()
        rounded = new.to(weight.dtype)
        after = energy(weight.double() - rounded.double(), moment, dtype)
        return _shares(rounded, _energy_of(weight, dropped, moment, dtype), after, power)

    return in_least_precision(solve, weight, ridge)


def eliminate(weight: Tensor, moment: Tensor, pool_of_block: Tensor, keep_of_pool: Tensor, ridge: float) -> Tensor:
    """Drop blocks of inputs one after the other, each time one whose loss raises the refitted error least.

    Of no more than a pool of inputs (elimination.py) exactly the one; of more, the minimum that this leads to was at
    most 1% above that of exactly the one, on every spectrum measured.

    Args:
        weight, moment: as in `refit`.
        pool_of_block: [n] int64, the pool each block of f/n neighbouring inputs belongs to; a neuron is a block of one,
            a head of kv_channels, its pool the query group.
        keep_of_pool: [pools] int64, how many blocks each pool keeps.
    Returns: [k] int64 on the host, the kept blocks in ascending order.
    Memory: beside C, [f - q, f], [q, q] twice and [h, q] of q candidates, in the dtype of `in_least_precision`.
    Raises: ValueError: C + lambda is not positive definite.
    """

    def solve(dtype: torch.dtype) -> Tensor:
        return _kept_blocks(eliminate_blocks(weight, moment, pool_of_block, keep_of_pool, ridge, dtype))

    return in_least_precision(solve, weight, ridge)


def eliminate_and_refit(
    weight: Tensor, moment: Tensor, pool_of_block: Tensor, keep_of_pool: Tensor, ridge: float
) -> tuple[Tensor, Refit]:
    """What `eliminate` keeps, and what `refit` makes of it, which the elimination knows by then without a factorisation
    of its own.

    Its `error` is the sum of what each drop cost, less what the ridge did; of the rounding to `weight`'s dtype it
    counts what each input's column loses by itself. In float32 its errors are unsure by 1e-3 of
    themselves and by 1e-6 of the output's energy.
    """

    def solve(dtype: torch.dtype) -> tuple[Tensor, Refit]:
        done = eliminate_blocks(weight, moment, pool_of_block, keep_of_pool, ridge, dtype)
        (new, power), shift = done.refitted(weight), shift_of(moment, ridge)
        rounded = new.to(weight.dtype)
        dropped = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
        dropped[done.kept_inputs()] = False
        off, rounding = weight.to(dtype) - new, new - rounded.to(dtype)
        # off (C + lambda) is 0 at every kept input, and `rounding` at every dropped one
        after = done.cost - shift * (off.square() + 2 * off * rounding).sum(dtype=torch.float64)
        after = after.clamp_min(0) + (rounding.square().sum(0) * moment.diagonal()).sum()
        plain = _energy_of(weight, dropped.nonzero().flatten(), moment, dtype)
        power -= shift * weight.to(dtype).square().sum(dtype=torch.float64)
        return _kept_blocks(done), _shares(rounded, plain, after, power)

    return in_least_precision(solve, weight, ridge)


def _kept_blocks(done: Elimination) -> Tensor:
    return done.kept_inputs()[:: done.width].div(done.width, rounding_mode="floor").cpu()


def _energy_of(weight: Tensor, some: Tensor, moment: Tensor, dtype: torch.dtype) -> Tensor:
    """`energy` of what `some` inputs [m] say alone."""
    return energy(weight[:, some], moment[some][:, some], dtype)


def _shares(rounded: Tensor, plain: Tensor, after: Tensor, power: Tensor) -> Refit:
    share = 1 / power if bool(power > 0) else torch.zeros_like(power)
    return Refit(rounded, float(plain * share), float(after * share))


def regress(moment: Tensor, products: Tensor, ridge: float) -> Tensor:
    """The linear map of a that is nearest to d: X (C + lambda)^-1, [h, f] float64.

    Args:
        moment: sum of a a^T [f, f] float64.
        products: X, sum of d a^T [h, f] float64.
    Raises: ValueError: C + lambda is not positive definite.
    """
    matrix = moment.clone()
    matrix.diagonal().add_(shift_of(moment, ridge))
    return torch.cholesky_solve(products.t(), cholesky(matrix, ridge, len(matrix))).t()


def multiple_of(weight: Tensor, moment: Tensor, products: Tensor) -> Tensor:
    """As `regress`, among the multiples of `weight` [h, f]."""
    whole = weight.double()
    return whole * ((products * whole).sum() / ((whole @ moment) * whole).sum())
