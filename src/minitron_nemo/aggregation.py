"""From many values to one: an activation along a sample's tokens, then the samples.

Minitron (arXiv:2407.14679, Importance Analysis) reduces an activation first along the sequence, then over the samples,
each time by one of three aggregations:

    sums         sum |a|, sum a, sum a^2 of each sample's tokens   [3, b, c]      float64
    aggregates   mean of |a|, L2, variance of each sample          [3, b, c]      float64
    moments      mean and mean square over the samples             [2, 3, c]      float64
    score        one of nine, see `aggregate_samples`              [c]            float64

c is whatever the axis counts: neurons, heads or channels. Nothing here communicates.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from minitron_nemo.checks import did_you_mean, require


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
