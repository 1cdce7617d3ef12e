"""Streaming statistics of activations: from tokens to one number per sample, from samples to one score.

Minitron (arXiv:2407.14679, Importance Analysis) reduces an activation first along the sequence, then over the samples,
each time by one of three aggregations. All nine pairs come from one forward pass:

    activation   one micro-batch                                   [s/cp, b, c]   model dtype
    partial      sum |a|, sum a, sum a^2 over this rank's tokens   [3, b, c]      float64, from float32 blocks
    aggregates   mean of |a|, L2, variance of each sample          [3, b, c]      float64
    moments      sum and sum of squares over the samples           [2, 3, c]      float64, all that is kept
    scores       nine, see `aggregate_samples`                     [c]            float32

c is whatever the axis counts: neurons, heads or channels. Memory does not grow with the number of samples.

Communication: only `partial_sums_over` and `mark_tokens_over`, once each, over the groups that split the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.parallel import all_reduce_sum

BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}  # cpu: a float32 block that stays in a core's L2 cache


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

    weight: Tensor | None
    """[s/cp, b] float32, 1 counts and 0 does not; None where every token of this rank counts."""
    num_tokens: Tensor
    """[b] float64, tokens that count in the whole sample, over every rank that holds a part of it."""
    seq_length: int
    """Tokens of a sample on this rank: s/cp."""

    @property
    def is_sample(self) -> Tensor:
        """[b] float64, 1 where the sample has a token that counts."""
        return (self.num_tokens > 0).double()

    def shard(self, index: int, size: int) -> TokenMask:
        """The mask of the `index`-th of `size` equal, contiguous parts of this rank's tokens (sequence parallelism)."""
        assert self.seq_length % size == 0
        length = self.seq_length // size
        weight = None if self.weight is None else self.weight[index * length : (index + 1) * length]
        return TokenMask(weight, self.num_tokens, length)


def mark_tokens_over(loss_mask: Tensor, *, groups: Sequence[ProcessGroup | None]) -> TokenMask:
    """Turn a loss mask into weights and the number of tokens of each whole sample.

    Args:
        loss_mask: [b, s/cp], any dtype, not 0 where the token counts (Megatron's order for `loss_mask`).
        groups: the groups that split the sequence of the mask (cp).
    Communicates: each of `groups`, one all-reduce of [b] float64. Waits once for the device, to see whether the mask
    is all ones: the statistics are faster then.
    """
    weight = (loss_mask != 0).t().contiguous().float()  # [s/cp, b]
    num_tokens = weight.sum(0, dtype=torch.float64)
    for group in groups:
        num_tokens = all_reduce_sum(num_tokens, group=group)
    return TokenMask(None if bool(weight.all()) else weight, num_tokens, weight.size(0))


def partial_sums(activation: Tensor, mask: TokenMask) -> Tensor:
    """sum |a|, sum a and sum a^2 of each sample over this rank's tokens.

    Block by block of tokens in float32, blocks added in float64. Inside a block the squares are taken around the
    block's own mean, so that the variance of a channel with a large constant part (norm outputs have them) survives.

    Args:
        activation: [s/cp, b, c], any float dtype.
    Returns:
        [3, b, c] float64.
    """
    seq_length, batch, channels = activation.shape
    assert seq_length == mask.seq_length, (activation.shape, mask.seq_length)
    total = torch.zeros(3, batch, channels, dtype=torch.float64, device=activation.device)
    block_tokens = max(1, BLOCK_ELEMENTS.get(activation.device.type, 1 << 20) // (batch * channels))
    for start in range(0, seq_length, block_tokens):
        block = activation[start : start + block_tokens].float()
        if mask.weight is None:
            weight, count = None, torch.full((batch, 1), float(block.size(0)), device=block.device)
        else:
            weight = mask.weight[start : start + block_tokens].unsqueeze(-1)  # [block, b, 1]
            count = weight.sum(0)
            block = block * weight
        total[0] += block.abs().sum(0)
        mean = block.sum(0) / count.clamp(min=1)  # [b, c]
        around_mean = block - mean
        if weight is not None:
            around_mean *= weight
        total[1] += count * mean.double()
        total[2] += around_mean.square_().sum(0) + count * mean.double().square()
    return total


def partial_sums_over(activation: Tensor, mask: TokenMask, *, groups: Sequence[ProcessGroup | None]) -> Tensor:
    """`partial_sums` of whole samples, equal on every rank of `groups`.

    Communicates: each of `groups`, one all-reduce of [3, b, c] float64.
    """
    sums = partial_sums(activation, mask)
    for group in groups:
        sums = all_reduce_sum(sums, group=group)
    return sums


def aggregate_sequence(sums: Tensor, num_tokens: Tensor) -> Tensor:
    """mean of |a|, L2 and variance along the sequence, of each sample.

    Args:
        sums: [3, b, c] float64, over whole samples.
        num_tokens: [b] float64.
    Returns:
        [3, b, c] float64 in the order of `Aggregation`; 0 for a sample without tokens.
    """
    count = num_tokens.clamp(min=1).unsqueeze(-1)
    sum_abs, sum_signed, sum_squares = sums
    variance = (sum_squares / count - (sum_signed / count).square()).clamp(min=0)
    return torch.stack([sum_abs / count, sum_squares.sqrt(), variance])


def aggregate_samples(moments: Tensor, num_samples: Tensor) -> dict[tuple[Aggregation, Aggregation], Tensor]:
    """The nine scores, by (batch aggregation, sequence aggregation).

    Args:
        moments: [..., 2, 3, c] float64, over all samples.
        num_samples: scalar.
    Returns:
        nine tensors [..., c], float64; a sequence aggregate is never negative, so the mean needs no absolute value.
    """
    scores = {}
    for index, sequence in enumerate(Aggregation):
        mean = moments[..., 0, index, :] / num_samples
        mean_square = moments[..., 1, index, :] / num_samples
        scores[Aggregation.MEAN, sequence] = mean
        scores[Aggregation.L2, sequence] = mean_square.sqrt()
        scores[Aggregation.VARIANCE, sequence] = (mean_square - mean.square()).clamp(min=0)
    return scores


class SampleMoments:
    """Sum and sum of squares over samples of the sequence aggregates; the whole memory of one hook."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.total = torch.zeros(2, 3, channels, dtype=torch.float64, device=device)

    def add(self, aggregates: Tensor, is_sample: Tensor) -> None:
        """Add the samples of a micro-batch: aggregates [3, b, c], is_sample [b]."""
        counted = aggregates * is_sample.unsqueeze(-1)
        self.total[0] += counted.sum(1)
        self.total[1] += counted.square().sum(1)

    def __repr__(self) -> str:
        return f"SampleMoments(channels={self.total.size(-1)}, device={self.total.device})"
