"""Streaming statistics of activations: from tokens to one number per sample, from samples to one score.

Minitron (arXiv:2407.14679, Importance Analysis) reduces an activation first along the sequence, then over the samples,
each time by one of three aggregations. All nine pairs come from one forward pass:

    activation   one micro-batch                                   [s/cp, b, c]   model dtype
    partial      sum |a|, sum a, sum a^2 over this rank's tokens   [3, b, c]      float64, from float32 blocks
    aggregates   mean of |a|, L2, variance of each sample          [3, b, c]      float64
    moments      sum and sum of squares over the samples           [2, 3, c]      float64, all that is kept
    score        one of nine, see `aggregate_samples`              [c]            float64

c is whatever the axis counts: neurons, heads or channels. Memory does not grow with the number of samples.

Communication: only `add_over` and `mark_tokens_over`, once each, over the groups that split the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.importance import cpu_kernels
from minitron_nemo.parallel import all_reduce_sum

BLOCK_ELEMENTS = 1 << 26  # a float32 block of 256 MiB
BLOCK_TOKENS = 256  # where there are so many: with fewer, adding the blocks costs as much as making them


class Aggregation(str, Enum):
    """How many values become one; the order is that of the first dim of `aggregates`."""

    MEAN = "mean"
    """mean of the absolute values"""
    L2 = "l2"
    """along the sequence sqrt(sum a^2), as in the paper; over samples sqrt(mean a^2), which ranks as the paper's sum
    does and does not grow with the number of samples"""
    VARIANCE = "variance"
    """mean of (a - mean a)^2, with sign"""

    @classmethod
    def parse(cls, name: str | Aggregation, key: str) -> Aggregation:
        """The aggregation a person named under the config key `key`."""
        known = [member.value for member in cls]
        value = name.value if isinstance(name, Aggregation) else name
        require(value in known, f"{key}={value} is not an aggregation; {did_you_mean(str(value), known)}")
        return cls(value)


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a micro-batch count.

    A sample with no token that counts (a filler of the last micro-batch) is no sample.
    """

    counts: Tensor
    """[b, s/cp] bool on the host, True where the token counts."""
    num_tokens: Tensor
    """[b] float64 on the device, tokens that count in the whole sample, over every rank that holds a part of it."""
    kept: tuple[Tensor, ...] | None
    """Per sample the places of this rank's tokens that count, int64 on the device; None where every token counts."""

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
        if self.kept is None:
            return activation.flatten(0, 1)
        samples = zip(activation.unbind(1), self.kept, strict=True)
        return torch.cat([tokens.index_select(0, kept) for tokens, kept in samples])

    def shard(self, index: int, size: int) -> TokenMask:
        """The mask of the `index`-th of `size` equal, contiguous parts of this rank's tokens (sequence parallelism)."""
        assert self.seq_length % size == 0
        return self if size == 1 else TokenMask.of(self.counts.chunk(size, dim=1)[index], self.num_tokens)


def mark_tokens_over(
    loss_mask: Tensor, *, groups: Sequence[ProcessGroup | None], device: torch.device | None = None
) -> TokenMask:
    """Turn a loss mask into places of tokens and the number of tokens of each whole sample.

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


def partial_sums(activation: Tensor, mask: TokenMask) -> Tensor:
    """sum |a|, sum a and sum a^2 of each sample over this rank's tokens that count.

    Args:
        activation: [s/cp, b, c], any float dtype.
    Returns:
        [3, b, c] float64.
    """
    assert activation.size(0) == mask.seq_length, (activation.shape, mask.seq_length)
    if activation.device.type == "cpu":
        return cpu_kernels.sums_of_tokens(activation, None if mask.kept is None else mask.counts)
    return sums_of_tokens(activation, mask.kept)


def sums_of_tokens(activation: Tensor, kept: tuple[Tensor, ...] | None) -> Tensor:
    """`partial_sums` by torch's own operations, as a GPU takes them; `kept` as in TokenMask."""
    if kept is None:
        return _sums_of_rows(activation.flatten(1)).unflatten(1, activation.shape[1:])
    samples = zip(activation.unbind(1), kept, strict=True)
    return torch.stack([_sums_of_rows(rows.index_select(0, places)) for rows, places in samples], dim=1)


def _sums_of_rows(rows: Tensor) -> Tensor:
    """sum |a|, sum a and sum a^2 over the rows of [t, c]: [3, c] float64.

    Block by block in float32, blocks added in float64. Inside a block the squares are taken around the block's own
    mean, so that the variance of a channel with a large constant part (norm outputs have them) survives.
    """
    num_rows, channels = rows.shape
    sums = torch.zeros(3, channels, dtype=torch.float64, device=rows.device)
    for block in rows.split(max(BLOCK_TOKENS, BLOCK_ELEMENTS // channels)) if num_rows else ():
        values = block.float()
        variance, mean = (each.double() for each in torch.var_mean(values, dim=0, correction=0))
        absolute = torch.linalg.vector_norm(values, 1, dim=0).double()
        sums += torch.stack([absolute, len(block) * mean, len(block) * torch.addcmul(variance, mean, mean)])
    return sums


def head_norms(activation: Tensor, heads: int) -> Tensor:
    """L2 norm of each token's heads: [s, b, n*d] of n heads -> [s, b, n] float32."""
    if activation.device.type == "cpu":
        return cpu_kernels.head_norms(activation, heads)
    return torch.linalg.vector_norm(activation.unflatten(-1, (heads, -1)), dim=-1, dtype=torch.float32)


def add_over(sums: Tensor, *, groups: Sequence[ProcessGroup | None]) -> Tensor:
    """`partial_sums` of several places -> those of whole samples, equal on every rank of `groups`.

    Communicates: each of `groups`, one all-reduce of [..., 3, b, c] float64.
    """
    for group in groups:
        sums = all_reduce_sum(sums, group=group)
    return sums


def aggregate_sequence(sums: Tensor, num_tokens: Tensor) -> Tensor:
    """mean of |a|, L2 and variance along the sequence, of each sample.

    Args:
        sums: [..., 3, b, c] float64, over whole samples.
        num_tokens: [b] float64.
    Returns:
        [..., 3, b, c] float64 in the order of `Aggregation`; 0 for a sample without tokens.
    """
    aggregates = sums / num_tokens.clamp(min=1).unsqueeze(-1)
    _, mean, mean_square = aggregates.unbind(-3)
    mean_square.addcmul_(mean, mean, value=-1).clamp_(min=0)  # now the variance
    torch.sqrt(sums.select(-3, 2), out=mean)  # now L2
    return aggregates


def aggregate_samples(moments: Tensor, batch: Aggregation, sequence: Aggregation) -> Tensor:
    """One of the nine scores.

    Args:
        moments: [..., 2, 3, c] float64, mean and mean square over all samples.
    Returns:
        [..., c] float64; a sequence aggregate is never negative, so the mean needs no absolute value.
    """
    mean, mean_square = moments[..., list(Aggregation).index(sequence), :].unbind(-2)
    if batch is Aggregation.MEAN:
        return mean
    if batch is Aggregation.L2:
        return mean_square.sqrt()
    return (mean_square - mean.square()).clamp(min=0)


def add_samples(sums: Sequence[Tensor], num_tokens: Tensor, moments: Tensor) -> Tensor:
    """Add the samples of a micro-batch to the moments of several places.

    Args:
        sums: of each place [3, b, c] float64, over whole samples.
        num_tokens: [b] float64.
        moments: [places, 2, 3, c] float64, sum and sum of squares over samples of `aggregate_sequence`; changed.
    Returns:
        [places, b] bool, whether all activations of a sample were finite.
    """
    if moments.device.type == "cpu":
        return cpu_kernels.add_samples(sums, num_tokens, moments)
    aggregates = aggregate_sequence(torch.stack(list(sums)), num_tokens)
    moments += torch.stack([aggregates.sum(-2), aggregates.square().sum(-2)], dim=-3)
    return aggregates.sum((1, 3)).isfinite()  # none is negative: no infinity cancels another
