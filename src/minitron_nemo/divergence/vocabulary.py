"""A vocabulary that is split over tp, and what its ranks agree on.

    logits     of n tokens        [n, v/tp]    v real entries of the padded vocabulary, padding last
    reduced    values of tokens   [..., n]     equal on every tp rank

Communication: tp, in `Reductions` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.parallel import (
    ProcessGroup,
    all_gather_shards,
    all_reduce_max,
    all_reduce_sum,
    group_rank,
    group_size,
)


@dataclass(frozen=True)
class Vocabulary:
    """The real entries, global and here; padding comes last and does not exist for a loss."""

    size: int
    first: int
    """Global index of this rank's first column."""
    columns: int
    """Columns of every rank, padding included."""
    local: int
    """Real columns of this rank; 0 where it holds padding alone."""
    group: ProcessGroup | None

    @classmethod
    def split(cls, local_columns: int, vocab_size: int | None, group: ProcessGroup | None) -> Vocabulary:
        """Of logits with `local_columns` columns on each rank. Raises: ValueError: vocab_size is not within them."""
        padded = local_columns * group_size(group)
        size = padded if vocab_size is None else vocab_size
        require(
            0 < size <= padded,
            f"vocab_size={vocab_size} must be between 1 and the logits' padded vocabulary of {padded}.",
        )
        first = group_rank(group) * local_columns
        return cls(size, first, local_columns, min(max(size - first, 0), local_columns), group)

    def local_columns(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these global indices are here, and their columns; for those elsewhere, any column of this rank."""
        column = index - self.first if self.first else index
        nearest = column.clamp(0, max(self.local - 1, 0))
        return (column == nearest) if self.local > 0 else torch.zeros_like(index, dtype=torch.bool), nearest

    def entries(self, rows: Tensor, index: Tensor) -> Tensor:
        """rows [n, v/tp] at the global `index` [n, k]; 0 where it is on another rank."""
        here, columns = self.local_columns(index)
        return torch.where(here, rows.gather(-1, columns), 0.0) if self.local > 0 else rows.new_zeros(index.shape)


Reduced: TypeAlias = list[Tensor]
"""[..., n] each, in the order of the reductions of n tokens."""


class Reductions:
    """What the ranks agree on, chunk by chunk: reduced and stored in the forward pass, read again in the backward pass.

    Values have the tokens in their last dimension. They are stored in one tensor for all chunks: many small ones, made
    between the large temporaries, would leave the CPU's heap full of holes.
    """

    def __init__(self, group: ProcessGroup | None, num_tokens: int, reduced: Reduced | None = None) -> None:
        """
        Args:
            reduced: those of the forward pass, for its backward pass: nothing is communicated.
        """
        self.group = group
        self.reduced: Reduced = reduced if reduced is not None else []
        self._num_tokens, self.again = num_tokens, reduced is not None
        self._chunk, self._next = slice(None), 0

    def at(self, chunk: slice) -> Reductions:
        """The same, about to reduce for these tokens."""
        self._chunk, self._next = chunk, 0
        return self

    def max(self, local: Callable[[], Tensor]) -> Tensor:
        return self._agree(all_reduce_max, local)

    def sum(self, local: Callable[[], Tensor]) -> Tensor:
        return self._agree(all_reduce_sum, local)

    def logsumexp(self, local: Callable[[], Tensor]) -> Tensor:
        return self._agree(lambda value, group: torch.stack(all_gather_shards(value, group=group)).logsumexp(0), local)

    def store_local(self, local: Callable[[], Tensor]) -> Tensor:
        """This rank's own value, stored and not reduced."""
        return self._agree(lambda value, group: value, local)

    def _agree(self, reduce: Callable[..., Tensor], local: Callable[[], Tensor]) -> Tensor:
        number, self._next = self._next, self._next + 1
        if not self.again:
            value = reduce(local(), group=self.group)
            if number == len(self.reduced):
                self.reduced.append(value.new_empty(*value.shape[:-1], self._num_tokens))
            self.reduced[number][..., self._chunk] = value
        return self.reduced[number][..., self._chunk]


def row_max(rows: Tensor) -> Tensor:
    """[n]; -inf where this rank holds padding alone."""
    return rows.amax(-1) if rows.shape[1] > 0 else rows.new_full(rows.shape[:1], float("-inf"))


def column(per_token: Tensor, like: Tensor) -> Tensor:
    """[n] of any dtype as [n, 1] of the dtype of `like`."""
    return per_token.to(like.dtype).unsqueeze(-1)
