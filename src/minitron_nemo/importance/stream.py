"""Second moments of the residual stream as the norms see it, for turning it into another basis.

    stream   [h, h]      float64   sum over all norms and tokens that count of x x^T, x [h] the stream entering a norm
    norm     [2l+1, h]   float64   sum over the tokens of x^2, norm by norm: of a layer its input norm, then its pre-MLP
                                   norm; the final norm last

x is the stream divided by its root mean square over the channels, as an RMSNorm divides it, so that every token weighs
the same ("normalised"), or as it is ("raw"); of a LayerNorm, less its mean. Products are float32, their sums float64.
A micro-batch costs 2 h^2 FLOPs a token and norm.

Communication: none while streaming; `merge` sums once over what splits tokens (cp, dp, tp under sequence parallelism)
and layers (pp).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from minitron_nemo.activations.hooks import on_input
from minitron_nemo.activations.products import product_over_tokens
from minitron_nemo.activations.tokens import AnnouncedBatch
from minitron_nemo.parallel import Groups, all_reduce_sum, broadcast_from, group_rank, group_size
from minitron_nemo.places import norms_in
from minitron_nemo.scores import NORM, STREAM, stream_sizes
from minitron_nemo.shape import ModelShape


class StreamMoments:
    """Sums of this rank; hooks what enters every norm of its pipeline stage."""

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        groups: Groups,
        current: AnnouncedBatch,
        handles: list[RemovableHandle],
        *,
        kind: str,
    ) -> None:
        """
        Args:
            model: the bare megatron.core GPTModel.
            current: its masks say which tokens count.
            handles: gets the hooks.
        """
        self._shape, self._groups, self._current, self._kind = shape, groups, current, kind
        sequence_parallel = model.config.sequence_parallel
        self._shard = (group_rank(groups.tp), group_size(groups.tp)) if sequence_parallel else (0, 1)
        device = next(model.parameters()).device
        self._stream, self._norm = (
            torch.zeros(size, dtype=torch.float64, device=device) for size in stream_sizes(shape).values()
        )
        for row, norm in norms_in(model).items():
            handles.append(norm.module.register_forward_pre_hook(on_input(partial(self._see, row))))

    @torch.no_grad()
    def _see(self, row: int, entering: Tensor) -> None:
        """Add what enters a norm, [s/cp, b, h], or [s/(cp*tp), b, h] under sequence parallelism."""
        with torch._C.DisableTorchFunction():  # the CPU platform's function mode costs as much as a small op
            values = self._current.mask(*self._shard).rows_of(entering).float()
            if self._shape.normalization != "RMSNorm":
                values = values - values.mean(1, keepdim=True)
            if self._kind == "normalised":
                root = values.square().mean(1, keepdim=True).sqrt_()
                values = values / root.clamp_(min=torch.finfo(torch.float32).tiny)
            product = product_over_tokens(values, values, may_round=True)
            self._stream += product
            self._norm[row] += product.diagonal()

    def running(self) -> dict[str, Tensor]:
        """By name, every tensor that is added to."""
        return {STREAM: self._stream, NORM: self._norm}

    def merge(self) -> dict[str, Tensor]:
        """The sums over all ranks, equal on every rank. Communicates: tp, cp, dp and pp, once for each of the two."""
        merged = {}
        for name, sums in ((STREAM, self._stream), (NORM, self._norm)):
            if self._shard[1] == 1:  # tp ranks hold the same sums; one rank's, so that rounding cannot part them
                sums = broadcast_from(sums, source=0, group=self._groups.tp)
            else:
                sums = all_reduce_sum(sums, group=self._groups.tp)
            for group in (self._groups.cp, self._groups.dp, self._groups.pp):
                sums = all_reduce_sum(sums, group=group)
            merged[name] = sums
        return merged
