"""Which inputs a linear can best do without: blocks of them dropped where the refitted error rises least.

    W', P    the optimal weight of what is left (fits.py) and (C + lambda)^-1 of it    [h, q], [q, q]
    R        upper factor of C + lambda: its rows of the inputs that surely stay                 [f - q, f]

Dropping a block B raises the error by tr(W'_B [P_BB]^-1 W'_B^T) and leaves W' - W'_B [P_BB]^-1 P_B and
P - P_B^T [P_BB]^-1 P_B (optimal brain surgeon, Hassibi and Stork 1993, for all outputs at once). What makes it fast:

- *Candidates.* Single inputs that would cost too much even if the sure ones stood in for them are sure themselves. A
  blocked Cholesky factorisation takes them for pivots; the others are the candidates, and only they have a P.
- *Rounds.* The `POOL` cheapest blocks of a round are dropped one by one, exactly, by their own small P and W'^T W', up
  to half of them; everything else learns of it in one product of matrices.
- W' of the sure inputs follows in the end from R.

Everything is local; nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.least_squares.ridge import STRIP, cholesky, shift_of

CANDIDATES = 1.25
"""Inputs that may be dropped, at least, for each that is; `POOL` more are."""
MARGIN = 1.4
"""How many times what the last one to be dropped may cost an input has to cost to stay for sure. Of inputs that differ
in size nothing is lost already at 1.2; of 1536 inputs all alike, where it matters least what is kept, 1.2 left an error
up to 3% above that of one-by-one elimination from all inputs and 1.4 up to 1%."""
PANEL = 512
"""Pivots found at once."""
POOL, POOL_BLOCKS = 512, 16
"""Inputs of a round's pool, and at least so many blocks."""
ROWS_AT_ONCE = 128
"""Dropped inputs whose changes to a pool's matrices are kept beside them; more make a drop slower, fewer rewrite them
more often."""
COMPACT_BELOW = 0.875
"""Share of P that is alive when what is dead is left out of it."""


@dataclass
class Elimination:
    """What is left of a linear while blocks of its inputs go."""

    width: int
    """Inputs of a block, c."""
    order: Tensor
    """[f] int64, the inputs: first those that surely stay, then the candidates, ascending."""
    rows: Tensor
    """R [f - q, f], columns in that order."""
    weight: Tensor
    """W' of the candidates in `blocks`, [h, n*c]; where dropped, 0 up to rounding, as in `inverse`."""
    inverse: Tensor
    """P of the same, [n*c, n*c]."""
    blocks: Tensor
    """[n] int64, candidates by their place among all candidates."""
    alive: Tensor
    """[n] bool, which of them are left."""
    pool_of_block: Tensor
    """[n] int64."""
    left: Tensor
    """[pools] int64, candidates that are left of each pool."""
    keep: Tensor
    """[pools] int64, candidates that stay in the end."""
    cost: Tensor
    """Sum of the rises so far, a float64 scalar: the objective's minimum."""

    def kept_inputs(self) -> Tensor:
        """[k] int64, ascending, on the device."""
        sure, candidates = self._parts()
        return torch.cat([sure, candidates[self._inputs_of(self.blocks[self.alive])]]).sort().values

    def refitted(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The optimal weight that reads the kept inputs alone, [h, f] in the precision of the elimination, and
        tr(W (C + lambda) W^T), a float64 scalar."""
        sure, candidates = self._parts()
        whole = weight.to(self.rows.dtype)
        own, others = self.rows.split([len(sure), len(candidates)], dim=1)
        said = others @ whole[:, candidates].t()  # [f - q, h]
        power = _energy_by_factor(own, whole[:, sure].t(), said)
        here, kept = self._inputs_of(self.alive), self._inputs_of(self.blocks[self.alive])
        new = torch.zeros_like(whole)
        new[:, candidates[kept]] = left = self.weight[:, here]
        # Dropped too, what is left would cost W'_A [P_AA]^-1 W'_A^T, and all that candidates say would be lost.
        factor = torch.linalg.cholesky(self.inverse[here][:, here].double()).to(left.dtype)
        last = torch.linalg.solve_triangular(factor, left.t(), upper=False)
        power += self.cost + last.square().sum(dtype=torch.float64)
        said.addmm_(others[:, kept], left.t(), alpha=-1)
        new[:, sure] = whole[:, sure] + _solve_upper(own, said).t()
        return new, power

    def drop(self, blocks: Tensor) -> None:
        """Leave these blocks [m] (places in `blocks`) out of W' and P."""
        gone = self._inputs_of(blocks)
        theirs = self.inverse[gone]
        own = theirs[:, gone].double()
        update = torch.linalg.solve(own, theirs.double()).to(theirs.dtype)
        self.inverse.addmm_(theirs.t(), update, alpha=-1)
        self.weight.addmm_(self.weight[:, gone], update, alpha=-1)
        self.alive[blocks] = False
        self.left -= torch.bincount(self.pool_of_block[blocks], minlength=len(self.left))
        if self.alive.float().mean() < COMPACT_BELOW:
            inputs = self._inputs_of(self.alive)
            self.inverse, self.weight = self.inverse[inputs][:, inputs], self.weight[:, inputs]
            self.blocks, self.pool_of_block = self.blocks[self.alive], self.pool_of_block[self.alive]
            self.alive = self.alive[self.alive]

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.order[: len(self.rows)], self.order[len(self.rows) :]

    def _inputs_of(self, blocks: Tensor) -> Tensor:
        """Places of the inputs of these blocks, given by place or by mask."""
        return inputs_of(blocks.nonzero().flatten() if blocks.dtype == torch.bool else blocks, self.width)


def inputs_of(blocks: Tensor, width: int) -> Tensor:
    """The inputs of blocks [k] of `width` neighbouring inputs each: [k * width], in their order."""
    return (blocks.unsqueeze(1) * width + torch.arange(width, device=blocks.device)).flatten()


def eliminate_blocks(
    weight: Tensor, moment: Tensor, pool_of_block: Tensor, keep_of_pool: Tensor, ridge: float, dtype: torch.dtype
) -> Elimination:
    """Drop blocks until each pool keeps its number.

    Args: as of `fits.eliminate`; dtype: of W', P and R.
    Raises: NotDefinite: C + lambda is not positive definite.
    """
    now = _begin(weight, moment, pool_of_block.to(moment.device), keep_of_pool.to(moment.device), ridge, dtype)
    while True:
        to_drop = int((now.left - now.keep).sum())  # waits for the device, as does each drop
        if to_drop == 0:
            return now
        may_go = now.alive & (now.left > now.keep)[now.pool_of_block]
        num_free, size = int(may_go.sum()), max(POOL // now.width, POOL_BLOCKS)
        cheapest = _rises(now).masked_fill(~may_go, torch.inf).argsort(stable=True)[: min(num_free, size)]
        in_pool = torch.bincount(now.pool_of_block[cheapest], minlength=len(now.left))
        most = int(in_pool.minimum(now.left - now.keep).sum())
        if num_free > size:
            most = min(most, max(size // 2, 1))
        now.drop(_drop_one_by_one(now, cheapest, min(most, to_drop)))


def _begin(
    weight: Tensor, moment: Tensor, pool_of_block: Tensor, keep_of_pool: Tensor, ridge: float, dtype: torch.dtype
) -> Elimination:
    blocks, features = pool_of_block.numel(), len(moment)
    left, shift = torch.bincount(pool_of_block, minlength=len(keep_of_pool)), shift_of(moment, ridge)
    if blocks < features or len(left) > 1:
        order, rows = torch.arange(features, device=moment.device), moment.new_empty(0, features, dtype=dtype)
    else:
        order, rows = _sure_inputs(weight, moment, int(left - keep_of_pool), ridge, dtype)
    num_sure = len(rows)
    candidate = order[num_sure:]
    matrix = torch.cat([moment[some].to(dtype)[:, candidate] for some in candidate.split(STRIP)])
    matrix.diagonal().add_(shift)
    theirs = rows[:, num_sure:]
    for start in range(0, len(matrix) if num_sure else 0, STRIP):
        some = theirs[:, start : start + STRIP]
        matrix[start:, start : start + STRIP].addmm_(theirs[:, start:].t(), some, alpha=-1)
    return Elimination(
        width=features // blocks,
        order=order,
        rows=rows,
        weight=weight[:, candidate].to(dtype),
        inverse=torch.cholesky_inverse(cholesky(matrix, ridge, features)),
        blocks=torch.arange(blocks - num_sure, device=moment.device),
        alive=torch.ones(blocks - num_sure, dtype=torch.bool, device=moment.device),
        pool_of_block=pool_of_block[num_sure:],
        left=left - num_sure,
        keep=keep_of_pool - num_sure,
        cost=moment.new_zeros(()),
    )


def _sure_inputs(
    weight: Tensor, moment: Tensor, to_drop: int, ridge: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The inputs in order, first those that surely stay, and R of these.

    What an input costs here is |W_i|^2 times what the sure inputs leave of its variance. It is sure where that is
    `MARGIN` times what the `to_drop`-th cheapest costs. Such inputs are taken a panel at a time, the costliest first,
    and put back if they cost less beside those before them: of two copies of one input, the second.
    """
    features, shift = len(moment), shift_of(moment, ridge)
    most, done = features - int(CANDIDATES * to_drop) - POOL, 0
    order, variance = torch.arange(features, device=moment.device), moment.diagonal() + shift
    power, rows = weight.double().square().sum(0), moment.new_zeros(max(most, 0), features, dtype=dtype)
    while to_drop and done < most:
        rest = order[done:]
        cost = power[rest] * variance
        enough = MARGIN * cost.kthvalue(to_drop).values
        panel = cost.argsort(descending=True, stable=True)[: min(PANEL, most - done)]
        panel = panel[cost[panel] >= enough]
        if not len(panel):  # waits for the device
            break
        block = moment[rest[panel]].to(dtype)[:, rest]
        block[torch.arange(len(panel), device=panel.device), panel] += shift
        block.addmm_(rows[:done, done:][:, panel].t(), rows[:done, done:], alpha=-1)
        own, found, left_over = _panel_rows(block, panel, variance, ridge, features)
        cost = power[rest] * left_over
        cost[panel] = power[rest[panel]] * own.diagonal().square()
        stays = cost[panel] >= MARGIN * cost.kthvalue(to_drop).values
        if not bool(stays.any()):
            break
        if not bool(stays.all()):
            panel = panel[stays]
            _, found, left_over = _panel_rows(block[stays], panel, variance, ridge, features)
        turned = _to_the_front(panel, len(rest))
        moved = (turned != torch.arange(len(rest), device=rest.device)).nonzero().flatten()
        rows[:done, done + moved] = rows[:done, done + turned[moved]]
        rows[done : done + len(panel), done:] = found[:, turned]
        order[done:], variance = rest[turned], left_over[turned[len(panel) :]]
        done += len(panel)
    ascending = order[done:].argsort()
    rows = rows[:done]
    rows[:, done:] = rows[:, done:][:, ascending]
    return torch.cat([order[:done], order[done:][ascending]]), rows


def _to_the_front(some: Tensor, number: int) -> Tensor:
    """A permutation of `number` places that begins with `some` of them and moves few others."""
    turned, width = torch.arange(number, device=some.device), len(some)
    in_the_way = torch.ones(width, dtype=torch.bool, device=some.device)
    in_the_way[some[some < width]] = False
    turned[some[some >= width]] = turned[:width][in_the_way]
    turned[:width] = some
    return turned


def _panel_rows(
    block: Tensor, panel: Tensor, variance: Tensor, ridge: float, inputs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The factor of a panel's own part of `block` [b, n], its rows of R and what they leave of `variance` [n]."""
    own = cholesky(block[:, panel].double(), ridge, inputs)
    rows = torch.linalg.solve_triangular(own.to(block.dtype), block, upper=False)
    return own, rows, (variance - rows.square().sum(0, dtype=torch.float64)).clamp_min(0)


def _rises(now: Elimination) -> Tensor:
    """What the loss of each block raises the error by, [n] float64; of a dropped one, anything."""
    if now.width == 1:
        own, squares = now.inverse.diagonal(), sum(rows.square().sum(0) for rows in now.weight.split(64))
        return squares / own.where(now.alive, 1)
    weights = now.weight.view(len(now.weight), -1, now.width).movedim(1, 0)  # [n, h, c]
    squares, own = (weights.mT @ weights).double(), _diagonal_blocks(now.inverse, now.width).double()
    one = torch.eye(now.width, dtype=own.dtype, device=own.device)
    return torch.linalg.solve(own.where(now.alive[:, None, None], one), squares).diagonal(dim1=1, dim2=2).sum(1)


def _drop_one_by_one(now: Elimination, pool: Tensor, number: int) -> Tensor:
    """Which `number` of the blocks `pool` go, [number] places in `now.blocks`, when each time the one whose loss raises
    the error least does; the rises are added to `now.cost`.

    Cost: to drop a block of c inputs takes O(c^2 f) operations, f the pool's inputs, on what the last `ROWS_AT_ONCE`
        dropped inputs changed, which is then written into the matrices at once: six f^2 operations for each.
    """
    width, inputs = now.width, now._inputs_of(pool)
    inverse, mine = now.inverse[inputs][:, inputs].double(), now.weight[:, inputs]
    gram = (mine.t() @ mine).double()  # G = W'^T W'
    pool_of_block, left = now.pool_of_block[pool], now.left.clone()
    own, squares = (_diagonal_blocks(matrix, width) for matrix in (inverse, gram))
    alive = torch.ones_like(pool, dtype=torch.bool)
    one = torch.eye(width, dtype=torch.float64, device=own.device)
    # Without block B: W' - W'_B U with U = [P_BB]^-1 P_B, so P - U^T P_B and G - U^T R - R^T U, R = G_B - G_BB U / 2.
    changes = inverse.new_empty(3, max(ROWS_AT_ONCE // width, 1) * width, len(inverse))  # U, P_B, R
    filled, gone = 0, []
    for _ in range(number):
        safe = own.where(alive[:, None, None], one)
        lost = squares / safe if width == 1 else torch.linalg.solve(safe, squares)
        may_go = alive & (left > now.keep)[pool_of_block]
        rise = lost.diagonal(dim1=1, dim2=2).sum(1).masked_fill(~may_go, torch.inf)
        block = int(rise.argmin())  # waits for the device
        here = slice(block * width, (block + 1) * width)
        u, p, r = changes[:, :filled]
        p_row = inverse[here] - u[:, here].t() @ p
        g_row = gram[here] - u[:, here].t() @ r - r[:, here].t() @ u
        update = p_row / own[block] if width == 1 else torch.linalg.solve(own[block], p_row)
        change = torch.stack((update, p_row, g_row - g_row[:, here] @ update / 2))
        changes[:, filled : filled + width] = change
        u, p, r = change.unflatten(2, (len(pool), width)).movedim(2, 1)  # [n, c, c] each
        own -= u.mT @ p
        squares -= u.mT @ r + r.mT @ u
        now.cost += rise[block]
        alive[block] = False
        left[pool_of_block[block]] -= 1
        gone.append(block)
        filled += width
        if filled == changes.shape[1]:
            u, p, r = changes
            inverse.addmm_(u.t(), p, alpha=-1)
            gram.addmm_(u.t(), r, alpha=-1).addmm_(r.t(), u, alpha=-1)
            filled = 0
    return pool[gone]


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """[f, f] -> a copy of the blocks along its diagonal, [n, c, c]."""
    blocks = len(matrix) // width
    return matrix.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _solve_upper(factor: Tensor, right: Tensor) -> Tensor:
    """[n, n] upper, [n, m] -> factor^-1 right, written over it: mostly products, which a BLAS makes faster."""
    for start in reversed(range(0, len(factor), PANEL)):
        here = slice(start, start + PANEL)
        right[here] = torch.linalg.solve_triangular(factor[here, here], right[here], upper=True)
        right[:start].addmm_(factor[:start, here], right[here], alpha=-1)
    return right


def _energy_by_factor(factor: Tensor, right: Tensor, plus: Tensor) -> Tensor:
    """|factor right + plus|^2, of [n, n] upper and [n, m], a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=factor.device)
    for start in range(0, len(factor), STRIP):
        here = slice(start, start + STRIP)
        total += torch.addmm(plus[here], factor[here, start:], right[start:]).square().sum(dtype=torch.float64)
    return total
