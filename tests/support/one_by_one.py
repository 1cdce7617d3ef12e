"""Compensated elimination as it is defined: one block at a time, each time the one whose loss raises the refitted error
least, in float64 throughout. What `minitron_nemo.least_squares.fits` is compared with, in tests and in time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_nemo.least_squares.fits import Refit

ROWS_AT_ONCE = 128
"""Dropped inputs whose changes to a matrix are kept beside it."""


def refit(weight: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Refit:
    """The least-squares weight of the kept inputs, and its error from the rounded weight itself."""
    kept = kept.to(moment.device)
    whole = weight.double()
    missing = whole.clone()
    missing[:, kept] = 0
    unexplained = missing @ moment  # [h, f]
    power, plain = ((whole @ moment) * whole).sum(), (unexplained * missing).sum()
    new = whole - missing
    if bool(power > 0):
        factor = _factor(moment[kept][:, kept], moment, ridge)
        new[:, kept] += torch.cholesky_solve(unexplained[:, kept].t(), factor).t()
    rounded = new.to(weight.dtype)
    off = whole - rounded.double()
    after = ((off @ moment) * off).sum()
    share = 1 / power if bool(power > 0) else torch.zeros_like(power)
    return Refit(rounded, float(plain * share), float(after * share))


def eliminate(weight: Tensor, moment: Tensor, pool_of_block: Tensor, keep_of_pool: Tensor, ridge: float) -> Tensor:
    """The blocks that stay, [k] int64 on the host, of n blocks of f/n neighbouring inputs."""
    blocks, features = pool_of_block.numel(), moment.shape[0]
    width = features // blocks
    pool_of_block, left = pool_of_block.to(moment.device), torch.bincount(pool_of_block, minlength=len(keep_of_pool))
    left, keep_of_pool = left.to(moment.device), keep_of_pool.to(moment.device)
    num_drops = int((left - keep_of_pool).sum())
    inverse = torch.cholesky_inverse(_factor(moment.clone(), moment, ridge))  # P
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
        block = int(rise.argmin())
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


def _factor(part: Tensor, moment: Tensor, ridge: float) -> Tensor:
    part.diagonal().add_(ridge * moment.diagonal().mean())
    return torch.linalg.cholesky(part)
