"""Which tokens of a micro-batch count, announced before its forward pass.

    loss mask    [b, s/cp]    Megatron's order for `loss_mask`; not 0 where the token counts
    activation   [s/cp, b, c], or [s/(cp*tp), b, c] where the sequence is split over tp: a shard of the mask's tokens

Communication: `mark_tokens_over` alone, over the groups that split the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.parallel import ProcessGroup, all_reduce_sum


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a micro-batch count.

    A sample with no token that counts (a filler of the last micro-batch) is no sample.
    """

    counts: Tensor
    """[b, s/cp] bool on the host, True where the token counts."""
    num_tokens: Tensor
    """[b] float64 on the device, tokens that count in the whole sample, over every rank that holds a part of it."""
    positions: tuple[Tensor, ...] | None
    """Per sample where this rank's tokens that count are, int64 on the device; None where every token counts."""

    @classmethod
    def of(cls, counts: Tensor, num_tokens: Tensor) -> TokenMask:
        if bool(counts.all()):
            return cls(counts, num_tokens, None)
        return cls(counts, num_tokens, tuple(row.nonzero().flatten().to(num_tokens.device) for row in counts))

    @property
    def seq_length(self) -> int:
        """Tokens of a sample on this rank: s/cp."""
        return self.counts.size(1)

    @property
    def is_sample(self) -> Tensor:
        """[b] float64, 1 where the sample has a token that counts."""
        return (self.num_tokens > 0).double()

    def rows_of(self, activation: Tensor) -> Tensor:
        """The tokens that count of [s/cp, b, c], as [t, c]; sample by sample where some do not."""
        if self.positions is None:
            return activation.flatten(0, 1)
        samples = zip(activation.unbind(1), self.positions, strict=True)
        return torch.cat([tokens.index_select(0, here) for tokens, here in samples])

    def of_nothing(self) -> TokenMask:
        """The mask of the same tokens, of which none counts."""
        return TokenMask.of(torch.zeros_like(self.counts), torch.zeros_like(self.num_tokens))

    def shard(self, index: int, size: int) -> TokenMask:
        """The mask of the `index`-th of `size` equal, contiguous parts of this rank's tokens (sequence parallelism)."""
        assert self.seq_length % size == 0
        return self if size == 1 else TokenMask.of(self.counts.chunk(size, dim=1)[index], self.num_tokens)


def mark_tokens_over(
    loss_mask: Tensor, *, groups: Sequence[ProcessGroup | None], device: torch.device | None = None
) -> TokenMask:
    """Turn a loss mask into positions of tokens and the number of tokens of each whole sample.

    Args:
        loss_mask: [b, s/cp], any dtype, not 0 where the token counts (Megatron's order for `loss_mask`).
        groups: the groups that split the sequence of the mask (cp).
        device: of the activations; None: the mask's.
    Communicates: each of `groups`, one all-reduce of [b] float64. Waits once for the device, to read the mask: tokens
    that do not count are left out, so that not even a NaN of theirs comes through.
    """
    counts = (loss_mask != 0).cpu()
    num_tokens = counts.sum(1).double().to(device or loss_mask.device)
    for group in groups:
        num_tokens = all_reduce_sum(num_tokens, group=group)
    return TokenMask.of(counts, num_tokens)


class AnnouncedBatch:
    """The micro-batch whose forward pass comes next; `number` counts from 1, 0 means none was announced."""

    def __init__(self, *, call: str, give: str) -> None:
        """
        Args:
            call: how a caller announces a micro-batch, for messages: "Call estimator.sample(loss_mask)".
            give: how it says which tokens count, for messages: "Give estimator.sample".
        """
        self.number = 0
        self._call, self._give = call, give
        self._masks: dict[tuple[int, int], TokenMask] = {}

    def announce(self, mask: TokenMask) -> None:
        self.number += 1
        self._masks = {(0, 1): mask}

    def mask(self, index: int = 0, size: int = 1) -> TokenMask:
        """The mask of the `index`-th of `size` parts of this rank's tokens."""
        if (index, size) not in self._masks:
            self._masks[index, size] = self._masks[0, 1].shard(index, size)
        return self._masks[index, size]

    def require_is_next(self, name: str, num_seen: int) -> None:
        """RuntimeError unless the forward pass that a place sees now, after `num_seen`, is that of this micro-batch."""
        if num_seen + 1 != self.number:  # no `require` in a hook: it would make the message at every layer
            raise RuntimeError(
                f"{name} saw forward pass {num_seen + 1}, but {self.number} micro-batches were announced. "
                f"{self._call} once before each forward pass, on every pipeline stage."
            )

    def require_holds(self, name: str, activation: Tensor, mask: TokenMask) -> None:
        """ValueError unless an activation [s, b, ...] has the tokens of `mask`."""
        if activation.dim() != 3 or activation.shape[:2] != mask.counts.shape[::-1]:
            raise ValueError(
                f"{name} has activations of shape {list(activation.shape)} [s, b, ...], but the loss mask announced "
                f"{mask.num_tokens.numel()} samples of {mask.seq_length} tokens on this rank. {self.mend_of_mask}"
            )

    @property
    def mend_of_mask(self) -> str:
        return f"{self._give} the mask [b, s] of the micro-batch that is run next."
