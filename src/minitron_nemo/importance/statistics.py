"""Streaming statistics of activations: from tokens to sums of a sample, from samples to moments.

    activation   one micro-batch                                   [s/cp, b, c]   model dtype
    partial      sum |a|, sum a, sum a^2 over this rank's tokens   [3, b, c]      float64, from float32 blocks
    moments      sum and sum of squares over the samples of what   [2, 3, c]      float64, all that is kept
                 `aggregation.aggregate_sequence` makes of them

All nine scores of aggregation.py come from these, in one forward pass. c is whatever the axis counts: neurons, heads or
channels. Memory does not grow with the number of samples.

Communication: only `add_over`, over the groups that split the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minitron_nemo.activations.tokens import TokenMask
from minitron_nemo.aggregation import aggregate_sequence
from minitron_nemo.importance import cpu_kernels
from minitron_nemo.parallel import ProcessGroup, all_reduce_sum

BLOCK_ELEMENTS = 1 << 26  # a float32 block of 256 MiB
BLOCK_TOKENS = 256  # where there are so many: with fewer, adding the blocks costs as much as making them


def partial_sums(activation: Tensor, mask: TokenMask) -> Tensor:
    """sum |a|, sum a and sum a^2 of each sample over this rank's tokens that count.

    Args:
        activation: [s/cp, b, c], any float dtype.
    Returns:
        [3, b, c] float64.
    """
    assert activation.size(0) == mask.seq_length, (activation.shape, mask.seq_length)
    if activation.device.type == "cpu":
        return cpu_kernels.sums_of_tokens(activation, None if mask.positions is None else mask.counts)
    return sums_of_tokens(activation, mask.positions)


def sums_of_tokens(activation: Tensor, positions: tuple[Tensor, ...] | None) -> Tensor:
    """`partial_sums` by torch's own operations, as a GPU takes them; `positions` as in TokenMask."""
    if positions is None:
        return _sums_of_rows(activation.flatten(1)).unflatten(1, activation.shape[1:])
    samples = zip(activation.unbind(1), positions, strict=True)
    return torch.stack([_sums_of_rows(rows.index_select(0, here)) for rows, here in samples], dim=1)


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
