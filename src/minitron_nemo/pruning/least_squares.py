"""What a linear's kept inputs can still say of its whole output: the least-squares arithmetic of compensation.

    W        weight of the linear that reads the inputs                 [h, f]
    C        sum of a a^T over the tokens that count, a its input       [f, f] float64
    S, D     inputs that are kept and that are dropped

The new weight W' reads S alone and minimises, over the calibration tokens,

    sum |W a - W' a|^2 + lambda |W - W'|^2,      lambda = ridge * mean of C's diagonal,

whose solution is W'_S = W_S + W_D C_DS (C_SS + lambda)^-1, W'_D = 0: a large ridge leaves the plain selection, and with
nothing dropped W' is W. Dropping a set B of inputs raises that minimum by tr(W_B [P_BB]^-1 W_B^T) with
P = (C + lambda)^-1 (optimal brain surgeon, Hassibi and Stork 1993, for all of the linear's outputs at once), which
`eliminate` follows from the whole set down.

Everything is float64 and local; nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.checks import require

ROWS_AT_ONCE = 128
"""Dropped inputs whose changes to a matrix are kept beside it; more make a drop slower, fewer rewrite it more often."""


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
    Memory: beside C, [k, f], [k, k] twice and [h, f] five times, float64.
    Raises: ValueError: C_SS + lambda is not positive definite.
    """
    kept = kept.to(moment.device)
    whole = weight.double()
    missing = whole.clone()
    missing[:, kept] = 0
    unexplained = missing @ moment  # [h, f]
    power, plain = ((whole @ moment) * whole).sum(), (unexplained * missing).sum()
    new = whole - missing
    if bool(power > 0):  # reading the value waits for the device; so does the factorisation
        factor = _cholesky(moment[kept][:, kept], _shift(moment, ridge), ridge)
        new[:, kept] += torch.cholesky_solve(unexplained[:, kept].t(), factor).t()
    rounded = new.to(weight.dtype)
    off = whole - rounded.double()
    after = ((off @ moment) * off).sum()
    share = 1 / power if bool(power > 0) else torch.zeros_like(power)
    return Refit(rounded, float(plain * share), float(after * share))


def eliminate(weight: Tensor, moment: Tensor, pool_of_block: Tensor, keep_of_pool: Tensor, ridge: float) -> Tensor:
    """Drop blocks of inputs one after the other, each time the one whose loss raises the refitted error least.

    Args:
        weight, moment: as in `refit`.
        pool_of_block: [n] int64, the pool each block of f/n neighbouring inputs belongs to; a neuron is a block of one,
            a head of kv_channels, its pool the query group.
        keep_of_pool: [pools] int64, how many blocks each pool keeps.
    Returns: [k] int64 on the host, the kept blocks in ascending order.
    Cost: to drop a block of c inputs takes O(c^2 f) operations on what the last `ROWS_AT_ONCE` dropped inputs changed,
        which is then written into the matrices at once: six f^2 operations for each.
    Memory: beside C, [f, f] twice, float64.
    Raises: ValueError: C + lambda is not positive definite.
    """
    blocks, features = pool_of_block.numel(), moment.shape[0]
    width = features // blocks
    pool_of_block, left = pool_of_block.to(moment.device), torch.bincount(pool_of_block, minlength=len(keep_of_pool))
    left, keep_of_pool = left.to(moment.device), keep_of_pool.to(moment.device)
    num_drops = int((left - keep_of_pool).sum())
    inverse = torch.cholesky_inverse(_cholesky(moment.clone(), _shift(moment, ridge), ridge))  # P
    gram = weight.double().t() @ weight.double()  # G = W^T W
    own, squares = (_diagonal_blocks(matrix, width) for matrix in (inverse, gram))
    alive = torch.ones(blocks, dtype=torch.bool, device=moment.device)
    one = torch.eye(width, dtype=torch.float64, device=moment.device)
    # Without block B: W - W_B U with U = [P_BB]^-1 P_B, so P - U^T P_B and G - U^T R - R^T U with R = G_B - G_BB U / 2.
    changes = moment.new_empty(3, max(ROWS_AT_ONCE // width, 1) * width, features)  # U, P_B, R
    filled = 0
    for _ in range(num_drops):
        safe = torch.where(alive[:, None, None], own, one)
        lost = squares / safe if width == 1 else torch.linalg.solve(safe, squares)
        may_go = alive & (left > keep_of_pool)[pool_of_block]
        rise = lost.diagonal(dim1=1, dim2=2).sum(1).masked_fill(~may_go, torch.inf)
        block = int(rise.argmin())  # waits for the device
        here = slice(block * width, (block + 1) * width)
        u, p, r = changes[:, :filled]
        p_row = inverse[here] - u[:, here].t() @ p
        g_row = gram[here] - u[:, here].t() @ r - r[:, here].t() @ u
        update = torch.linalg.solve(own[block], p_row)
        change = torch.stack((update, p_row, g_row - g_row[:, here] @ update / 2))
        changes[:, filled : filled + width] = change
        u, p, r = change.unflatten(2, (blocks, width)).movedim(2, 1)  # [n, c, c] each
        own -= u.mT @ p
        squares -= u.mT @ r + r.mT @ u
        alive[block] = False
        left[pool_of_block[block]] -= 1
        filled += width
        if filled == changes.shape[1]:
            u, p, r = changes
            inverse.addmm_(u.t(), p, alpha=-1)
            gram.addmm_(u.t(), r, alpha=-1).addmm_(r.t(), u, alpha=-1)
            filled = 0
    return alive.nonzero().flatten().cpu()


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """[f, f] -> a copy of the blocks along its diagonal, [n, c, c]."""
    blocks = len(matrix) // width
    return matrix.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def regress(moment: Tensor, products: Tensor, ridge: float) -> Tensor:
    """The linear map of a that is nearest to d: X (C + lambda)^-1, [h, f] float64.

    Args:
        moment: sum of a a^T [f, f] float64.
        products: X, sum of d a^T [h, f] float64.
    Raises: ValueError: C + lambda is not positive definite.
    """
    return torch.cholesky_solve(products.t(), _cholesky(moment.clone(), _shift(moment, ridge), ridge)).t()


def multiple_of(weight: Tensor, moment: Tensor, products: Tensor) -> Tensor:
    """As `regress`, among the multiples of `weight` [h, f]."""
    whole = weight.double()
    return whole * ((products * whole).sum() / ((whole @ moment) * whole).sum())


def _shift(moment: Tensor, ridge: float) -> Tensor:
    return ridge * moment.diagonal().mean()


def _cholesky(moment: Tensor, shift: Tensor, ridge: float) -> Tensor:
    """Lower factor of moment + shift; `moment` is overwritten. Raises: ValueError: it is not positive definite."""
    moment.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(moment)
    require(
        int(failed) == 0,
        f"the second moment of its {len(moment)} inputs is not positive definite with ridge={ridge:g}: the calibration "
        "tokens leave some directions unseen. Raise ridge (0.01, say) or num_samples.",
    )
    return factor
