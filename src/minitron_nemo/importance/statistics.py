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
from minitron_nemo.parallel import all_reduce_sum

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # cpu: a float32 block of one thread stays in its core's L2 cache
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


def new_scratch(device: torch.device) -> Tensor:
    """Room for one float32 block of `partial_sums`; memory made for each block would cost as much as its sums."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return torch.empty(BLOCK_ELEMENTS[device.type] * threads, device=device)


def partial_sums(activation: Tensor, mask: TokenMask, scratch: Tensor | None = None) -> Tensor:
    """sum |a|, sum a and sum a^2 of each sample over this rank's tokens that count.

    Args:
        activation: [s/cp, b, c], any float dtype.
        scratch: see `new_scratch`, overwritten; None: made for this call.
    Returns:
        [3, b, c] float64.
    """
    seq_length, batch, channels = activation.shape
    assert seq_length == mask.seq_length, (activation.shape, mask.seq_length)
    scratch = new_scratch(activation.device) if scratch is None else scratch
    if mask.kept is None:
        sums = _sums_of_rows(activation.reshape(seq_length, batch * channels), scratch)
        return sums.unflatten(1, (batch, channels))
    samples = zip(activation.unbind(1), mask.kept, strict=True)
    return torch.stack([_sums_of_rows(rows.index_select(0, kept), scratch) for rows, kept in samples], dim=1)


def _sums_of_rows(rows: Tensor, scratch: Tensor) -> Tensor:
    """sum |a|, sum a and sum a^2 over the rows of [t, c]: [3, c] float64.

    Block by block in float32, blocks added in float64. Inside a block the squares are taken around the block's own
    mean, so that the variance of a channel with a large constant part (norm outputs have them) survives.
    """
    num_rows, channels = rows.shape
    sums = torch.zeros(3, channels, dtype=torch.float64, device=rows.device)
    height = min(max(num_rows, 1), max(BLOCK_TOKENS, scratch.numel() // channels), scratch.numel())
    width = scratch.numel() // height
    of_block = torch.empty(3, channels, device=rows.device)  # sum of |a|, mean, variance
    for block in rows.split(height) if num_rows else ():
        for source, result in zip(block.split(width, 1), of_block.split(width, 1), strict=True):
            values = scratch[: source.numel()].view(source.shape).copy_(source)
            _mean_and_variance(values, result)
            torch.sum(values.abs_(), 0, out=result[0])
        block_sums = of_block.double()
        block_sums[2].addcmul_(block_sums[1], block_sums[1])  # mean of a^2
        block_sums[1:] *= len(block)
        sums += block_sums
    return sums


def _mean_and_variance(values: Tensor, result: Tensor) -> None:
    """Mean and variance over the rows of [t, c] float32, contiguous, into rows 1 and 2 of `result`.

    On a CPU by the kernel of batch norm: it reads each row whole and writes nothing in between, where `torch.var_mean`
    walks down each column by itself, thirty times slower.
    """
    if values.device.type == "cpu":
        num_rows, channels = values.shape
        images = values.as_strided((1, channels, num_rows, 1), (values.numel(), 1, channels, 1))  # channels-last
        mean, variance = torch.batch_norm_update_stats(images, None, None, 0.0)
    else:
        variance, mean = torch.var_mean(values, dim=0, correction=0)
    result[1], result[2] = mean, variance


def head_norms(activation: Tensor, heads: int, scratch: Tensor) -> Tensor:
    """L2 norm of each token's heads: [s, b, n*d] of n heads -> [s, b, n] float32."""
    rows = activation.reshape(-1, activation.size(-1))
    norms = torch.empty(rows.size(0), heads, device=rows.device)
    height = max(1, scratch.numel() // rows.size(1))
    for source, result in zip(rows.split(height), norms.split(height), strict=True):
        values = scratch[: source.numel()].view(source.shape).copy_(source).unflatten(1, (heads, -1))
        torch.linalg.vector_norm(values, dim=-1, out=result)
    return norms.view(*activation.shape[:2], heads)


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
    mean_abs, mean, mean_square = (sums / num_tokens.clamp(min=1).unsqueeze(-1)).unbind(-3)
    variance = torch.addcmul(mean_square, mean, mean, value=-1).clamp_(min=0)
    return torch.stack([mean_abs, sums.select(-3, 2).sqrt(), variance], dim=-3)


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


def sum_over_samples(aggregates: Tensor) -> Tensor:
    """Sum and sum of squares over the samples of a micro-batch: [..., 3, b, c] -> [..., 2, 3, c] float64."""
    return torch.stack([aggregates.sum(-2), aggregates.square().sum(-2)], dim=-3)
