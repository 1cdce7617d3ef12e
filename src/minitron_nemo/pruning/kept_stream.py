"""The student's residual stream inside the teacher's: k coordinates in h channels, the rest of which is silent.

    hidden     plan.hidden: kept channels [k] int64, or a basis [h, k] with orthonormal columns
    x          a stream of the teacher's width      [..., h]
    y          its coordinates                      [..., k]    y = P^T x; x = P y where x is a student's

A norm over h of P y is the norm over k of y, times sqrt(k / h) in its divisor: with gammas times sqrt(h / k)
(`norm_scale=size`) the cut student computes what the uncut model computes on P y, but for epsilon, which weighs h / k
times as much there. Of LayerNorm that holds where P keeps the direction of equal channels (basis.py).

Nothing here communicates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_nemo.places import BuiltNorm


class KeptStream:
    """P, as functions on streams and on weights."""

    def __init__(self, hidden: Tensor, size: int, device: torch.device) -> None:
        """
        Args:
            size: h.
        """
        self.is_basis, self.size = hidden.is_floating_point(), size
        self.keep = hidden.shape[-1]
        self._hidden = hidden.to(device, torch.float64 if self.is_basis else torch.int64)

    @property
    def is_whole(self) -> bool:
        """Whether every channel stays as it is."""
        return not self.is_basis and self.keep == self.size

    def coordinates(self, stream: Tensor) -> Tensor:
        """[..., h] -> [..., k], of the same dtype (of half precision with a basis: float32)."""
        if not self.is_basis:
            return stream if self.is_whole else stream[..., self._hidden]
        values = wide(stream)
        return values @ self._hidden.to(values.dtype)

    def spread(self, coordinates: Tensor) -> Tensor:
        """[..., k] -> [..., h]."""
        if self.is_whole:
            return coordinates
        if self.is_basis:
            return coordinates @ self._hidden.to(coordinates.dtype).t()
        spread = coordinates.new_zeros(*coordinates.shape[:-1], self.size)
        spread[..., self._hidden] = coordinates
        return spread

    def within(self, stream: Tensor) -> Tensor:
        """The part of a stream that a student can hold: P P^T x, [..., h] of the same dtype."""
        return self.spread(self.coordinates(stream)).to(stream.dtype)


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def normalised(norm: BuiltNorm, stream: Tensor) -> Tensor:
    """What a norm makes of a stream [..., h] before its weights come in, in float32 at least."""
    values, epsilon = wide(stream), norm.config.layernorm_epsilon
    if norm.config.normalization == "RMSNorm":
        return F.rms_norm(values, values.shape[-1:], None, epsilon)
    return F.layer_norm(values, values.shape[-1:], None, None, epsilon)
