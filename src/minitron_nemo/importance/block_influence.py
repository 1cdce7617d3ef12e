"""Block influence: how little a contiguous block of layers changes the direction of the residual stream.

    BI_i,n = 1 - E[ cos(x_i, x_i+n) ],   x_i the input of layer i, x_L the output of the last one, before the final norm

(arXiv:2407.14679, section 2.2, for n = 1; blocks as in Gromov et al., arXiv:2403.17887.) The mean is over all tokens
that count, of all samples. Every n comes from one forward pass.

    states   x_0 .. x_L of a micro-batch          [s/cp, b, h] each, [s/(cp*tp), b, h] under sequence parallelism
    sums     of cosines over tokens, all pairs    [L+1, L+1]   float64, all that is kept; each pair once, on one stage

A token's channels lie whole on one rank, so its cosines are local: the sums of a block of tokens are one matrix product
of normalised states with themselves. It is taken in float64, since 1 - cos of an unimportant layer is a small
difference; its cost beside the forward pass is L / (12 h) of the multiplications.

Communication while streaming: pp alone, and only between stages that hold the two ends of a block. Each pair of stages
exchanges the states of one of the two, as they are, around the ring: a stage sends its L/pp states to the pp/2 stages
after it, half of what gathering all of them would move. At the end, once: tp, cp, dp and pp add [L+1, L+1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from minitron_nemo.parallel import (
    Groups,
    all_reduce_sum,
    broadcast_from,
    exchange,
    gather_objects,
    group_rank,
    group_size,
)

BLOCK_ELEMENTS = 1 << 26
"""Values of the float64 copy of a block of tokens' states: 512 MiB; 9 blocks hold 4096 tokens of 33 x 4096 channels."""
CPU_BLOCK_ELEMENTS = 1 << 21  # 16 MiB: a core's cache holds most of it


class BlockInfluence:
    """Sums over one stage's and its neighbours' states; `add` a micro-batch on every stage, then `finish`."""

    def __init__(self, num_layers: int, groups: Groups, *, sequence_parallel: bool, device: torch.device) -> None:
        self.num_layers = num_layers
        self.groups = groups
        self.sequence_parallel = sequence_parallel
        self._sums = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64, device=device)
        self._num_tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._held: list[list[int]] | None = None

    def __repr__(self) -> str:
        return f"BlockInfluence(num_layers={self.num_layers}, device={self._sums.device})"

    def add(self, states: Mapping[int, Tensor], counts: Tensor) -> None:
        """Add one micro-batch.

        Args:
            states: i -> x_i, those this stage holds, the same i each time; any float dtype.
            counts: [s, b] bool, the tokens of `states` that count.
        Communicates: pp, up to half of the stages' states from and to this one.
        """
        rows = sorted(states)
        if self._held is None:
            self._held = cast(list[list[int]], gather_objects(rows, group=self.groups.pp))
        mine = [states[row] for row in rows]
        self._num_tokens += counts.sum()
        self._add_pairs(rows, mine, rows, mine, counts)
        size, rank = group_size(self.groups.pp), group_rank(self.groups.pp)
        for distance in range(1, size // 2 + 1):
            # Half-way round an even ring, two stages are each other's partner: the first half only sends.
            halfway = 2 * distance == size
            sends, receives = not halfway or rank < distance, not halfway or rank >= distance
            theirs_rows = self._held[(rank - distance) % size] if receives else []
            theirs = self._exchange_over_pp(mine if sends else [], len(theirs_rows), distance, like=mine[0])
            if receives:
                self._add_pairs(theirs_rows, theirs, rows, mine, counts)

    def running(self) -> dict[str, Tensor]:
        """By name, every tensor that is added to."""
        return {"sums": self._sums, "num_tokens": self._num_tokens}

    def finish(self) -> dict[int, Tensor]:
        """n -> [L-n+1] float64 for n = 1 .. L-1, entry i for layers i .. i+n-1; equal on every rank.

        Communicates: tp, cp, dp and pp.
        """
        packed = torch.cat([self._sums.flatten(), self._num_tokens.view(1)])
        if self.sequence_parallel:
            packed = all_reduce_sum(packed, group=self.groups.tp)
        else:  # tp ranks hold the same tokens; take one rank's, so that rounding cannot part them
            packed = broadcast_from(packed, source=0, group=self.groups.tp)
        for group in (self.groups.cp, self.groups.dp):
            packed = all_reduce_sum(packed, group=group)
        num_tokens = packed[-1]
        sums = all_reduce_sum(packed[:-1], group=self.groups.pp).view_as(self._sums)
        sums = sums + sums.t()  # each pair was added once, on either side
        return {n: (1 - sums.diagonal(n) / num_tokens).clamp(min=0) for n in range(1, self.num_layers)}

    def _exchange_over_pp(self, mine: list[Tensor], num_theirs: int, distance: int, *, like: Tensor) -> list[Tensor]:
        """Send states to the stage `distance` further round the ring, receive those of the one as far back."""
        group = self.groups.pp
        assert group is not None
        rank, size = group_rank(group), group_size(group)
        to, source = ((rank + step) % size for step in (distance, -distance))
        theirs = [torch.empty_like(like) for _ in range(num_theirs)]
        exchange(mine, theirs, to=to, source=source, group=group)
        return theirs

    def _add_pairs(
        self, rows: list[int], first: list[Tensor], columns: list[int], second: list[Tensor], counts: Tensor
    ) -> None:
        """Add the sum over counting tokens of cos(first_r, second_c) at (r, c); of a stage with itself, where r < c."""
        seq_length, batch, channels = first[0].shape
        elements = CPU_BLOCK_ELEMENTS if first[0].device.type == "cpu" else BLOCK_ELEMENTS
        step = max(1, elements // (batch * channels * len(first)))
        total = self._sums[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # a view: a stage's layers follow on
        for start in range(0, seq_length, step):
            tokens = slice(start, start + step)
            left = _directions(first, tokens, counts)
            total += (left @ left.t()).triu(1) if first is second else left @ _directions(second, tokens, counts).t()


def _directions(states: list[Tensor], tokens: slice, counts: Tensor) -> Tensor:
    """States of some tokens, each token's divided by its length, 0 where it does not count: [k, s*b*h] float64."""
    block = torch.stack([state.detach()[tokens] for state in states]).double()
    block = torch.where(counts[tokens].unsqueeze(-1), block, 0.0)
    lengths = torch.linalg.vector_norm(block, dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return block.div_(lengths).flatten(1)
