"""What a validation measures of each source of a blend: sources recover unevenly.

    source   [b]                    int64: of each sample the place of its source, as Megatron-core's blends number them
    values   [b, s/cp]              of each token
    sums     [parts, sources, 2]    float64: over the tokens that count, of the values and of the tokens' weights

Σsum / Σcount is the mean over a source's tokens on any layout, whatever the size of a micro-batch.

Communication: none; whoever closes the sums adds them up over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SOURCE = "dataset_id"
"""Megatron-core's name for `source` in a sample; there where text of several sources is blended."""


class SourceSums:
    """Of this rank: what its last pipeline stage has seen."""

    def __init__(self, parts: Sequence[str], sources: int, device: torch.device) -> None:
        self.parts = list(parts)
        self.sums = torch.zeros(len(parts), sources, 2, dtype=torch.float64, device=device)

    def add(self, values: Mapping[str, Tensor], weights: Tensor, source: Tensor) -> None:
        """Add a micro-batch.

        Args:
            values: part -> [b, s/cp].
            weights: [b, s/cp], the loss mask; a token whose weight is 0 does not exist.
        """
        weight = weights.double()
        for part, per_token in values.items():
            weighted = torch.where(weight != 0, per_token.detach().double() * weight, 0.0)
            of_samples = torch.stack([weighted.sum(1), weight.sum(1)], dim=1)
            self.sums[self.parts.index(part)].index_add_(0, source, of_samples)
