"""Axis expressions: what one dim of a parameter is made of, and what a cut leaves of it.

    QKV rows       group x (heads per group + 2) x kv_channels: per group its query heads, then key, then value
    head columns   head x kv_channels
    fc1 rows       [gate; up] x ffn where gated, else ffn; each tp rank holds [its gate; its up]
    others         a named axis as it is: hidden, ffn, vocab, kv_channels, expert ...

Every expression knows its length, which of its positions stay and how tensor parallelism splits it. Nothing here
communicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.shape import DIM_OF_AXIS, ModelShape

KeptOfAxes: TypeAlias = Mapping[str, Tensor]
"""Named axis (`hidden`, `ffn`, `head`, `group`, `expert`, `expert_ffn`, `shared_expert_ffn`) -> kept global indices
[k], int64, for one parameter's layer, and for its expert where it has one.
An axis that is absent is kept whole. `hidden` may be a basis instead: [h, k] of a floating dtype, orthonormal columns.
`head_partner` [k] int64 names for each kept head a dropped head of its group that is merged into it, or -1
(`QueryRows`). Of a turned stream `folded` [h] is what a parameter's hidden channels are multiplied by before the basis:
for what reads a norm, the norm's gamma. `norm_scale`, a scalar, multiplies the gamma of a norm (`NormGamma`)."""


class Axis:
    """What one dim of a parameter is made of."""

    def size(self, shape: ModelShape) -> int:
        """Length of the dim in full form."""
        raise NotImplementedError

    def kept_rows(self, shape: ModelShape, kept: KeptOfAxes) -> Tensor | None:
        """Positions along this dim that stay, in the order of the result; None: all of them."""
        raise NotImplementedError

    def stretches(self, shape: ModelShape) -> tuple[int, ...]:
        """Lengths of the consecutive stretches that tensor parallelism splits each by itself."""
        return (self.size(shape),)

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: KeptOfAxes) -> Tensor:
        """`full` with this dim cut down to what is kept: the one place where a plan entry meets a weight."""
        rows = self.kept_rows(shape, kept)
        return full if rows is None else _choose(full, dim, rows)

    def mixes(self, kept: KeptOfAxes) -> bool:
        """Whether `reduce` makes new entries of this dim's, rather than only leaving some out."""
        return False

    def parts(self, shape: ModelShape) -> tuple[Axis, ...]:
        """The axes of the separate matrices fused along dim 0; a plain axis fuses nothing."""
        return (self,)

    def unfuse(self, full: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        """The separate matrices fused along dim 0, one for each of `parts`."""
        return (full,)

    def fuse(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        """Inverse of `unfuse`, for pruned parts too."""
        (full,) = parts
        return full


class Fused(Axis):
    """Several matrices in one, along dim 0: each is cut along its own axis."""

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: KeptOfAxes) -> Tensor:
        assert dim == 0
        whole = self.unfuse(full, shape)
        cut = [part.reduce(piece, 0, shape, kept) for part, piece in zip(self.parts(shape), whole, strict=True)]
        if all(after is before for after, before in zip(cut, whole, strict=True)):
            return full
        return self.fuse(cut, shape)


@dataclass(frozen=True)
class Named(Axis):
    """A named axis as it is."""

    axis: str

    def size(self, shape: ModelShape) -> int:
        return getattr(shape, DIM_OF_AXIS[self.axis])

    def kept_rows(self, shape: ModelShape, kept: KeptOfAxes) -> Tensor | None:
        return kept.get(self.axis)

    def mixes(self, kept: KeptOfAxes) -> bool:
        entry = kept.get(self.axis)
        return entry is not None and entry.is_floating_point()

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: KeptOfAxes) -> Tensor:
        if not self.mixes(kept):
            return super().reduce(full, dim, shape, kept)
        dtype = torch.promote_types(full.dtype, torch.float32)  # products of bf16 entries, over thousands of channels
        entries = full.movedim(dim, -1).to(dtype)
        if "folded" in kept:
            entries = entries * kept["folded"].to(full.device, dtype)
        turned = entries @ kept[self.axis].to(full.device, dtype)
        return turned.to(full.dtype).movedim(-1, dim).contiguous()


@dataclass(frozen=True)
class NormGamma(Named):
    """The channels of a norm's weight; stored as gamma, or as gamma - 1 (LayerNorm1p)."""

    def mixes(self, kept: KeptOfAxes) -> bool:
        return super().mixes(kept) or "norm_scale" in kept

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: KeptOfAxes) -> Tensor:
        """The kept channels' gamma, or 1 in a turned stream, where the readers have taken it in; times the scale."""
        if not self.mixes(kept):
            return super().reduce(full, dim, shape, kept)
        gamma, rows = norm_gamma(full, shape), self.kept_rows(shape, kept)
        if super().mixes(kept):
            gamma = gamma.new_ones(kept[self.axis].size(1))
        elif rows is not None:
            gamma = _choose(gamma, dim, rows)
        if "norm_scale" in kept:
            gamma = gamma * kept["norm_scale"].to(gamma)
        return (gamma - _gamma_offset(shape)).to(full.dtype)


def norm_gamma(stored: Tensor, shape: ModelShape) -> Tensor:
    """What a norm multiplies by, from its weight as it is stored; float32 at least."""
    return stored.to(torch.promote_types(stored.dtype, torch.float32)) + _gamma_offset(shape)


def _gamma_offset(shape: ModelShape) -> float:
    return 1.0 if shape.normalization == "LayerNorm1p" else 0.0


@dataclass(frozen=True)
class HeadColumns(Axis):
    """head x kv_channels: what the output projection reads."""

    def size(self, shape: ModelShape) -> int:
        return shape.query_projection_size

    def kept_rows(self, shape: ModelShape, kept: KeptOfAxes) -> Tensor | None:
        grouped = kept_heads_by_group(shape, kept)
        if grouped is None:
            return None
        return _rows_of_blocks([head for _, heads in grouped for head in heads], shape.kv_channels)


@dataclass(frozen=True)
class QueryRows(HeadColumns):
    """head x kv_channels of the query projection, where a dropped head may leave its difference to a kept one."""

    def mixes(self, kept: KeptOfAxes) -> bool:
        return "head_partner" in kept

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: KeptOfAxes) -> Tensor:
        """Kept heads; one with a partner becomes head + (head - partner) (arXiv:2407.14679, section 2.3)."""
        cut = super().reduce(full, dim, shape, kept)
        partner = kept.get("head_partner")
        if partner is None:
            return cut
        assert dim == 0
        partner = partner.to(full.device)
        paired = partner >= 0
        heads, channels = cut.unflatten(0, (-1, shape.kv_channels)).clone(), (-1, shape.kv_channels)
        theirs = full.unflatten(0, channels).index_select(0, partner[paired])
        heads[paired] = (2 * heads[paired].float() - theirs.float()).to(full.dtype)
        return heads.flatten(0, 1)


@dataclass(frozen=True)
class GroupRows(Axis):
    """group x kv_channels: rows of the key or the value projection."""

    def size(self, shape: ModelShape) -> int:
        return shape.num_query_groups * shape.kv_channels

    def kept_rows(self, shape: ModelShape, kept: KeptOfAxes) -> Tensor | None:
        grouped = kept_heads_by_group(shape, kept)
        return None if grouped is None else _rows_of_blocks([group for group, _ in grouped], shape.kv_channels)


@dataclass(frozen=True)
class Fc1Rows(Fused):
    """[gate; up] x neurons where gated, else neurons."""

    neurons: Named

    def size(self, shape: ModelShape) -> int:
        return sum(self.stretches(shape))

    def stretches(self, shape: ModelShape) -> tuple[int, ...]:
        return tuple(part.size(shape) for part in self.parts(shape))

    def parts(self, shape: ModelShape) -> tuple[Axis, ...]:
        return (self.neurons,) * (2 if shape.gated_linear_unit else 1)

    def unfuse(self, full: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        """gate, up: [f, ...] each; ungated: up alone."""
        return full.split(list(self.stretches(shape)))

    def fuse(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        return torch.cat(list(parts))


@dataclass(frozen=True)
class QkvRows(Fused):
    """group x (heads per group + 2) x kv_channels."""

    def size(self, shape: ModelShape) -> int:
        return shape.qkv_projection_size

    def parts(self, shape: ModelShape) -> tuple[Axis, ...]:
        return (QueryRows(), GroupRows(), GroupRows())

    def unfuse(self, full: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        """query [n*d, ...], key [g*d, ...], value [g*d, ...], each head after head."""
        blocks = full.unflatten(0, (shape.num_query_groups, shape.heads_per_group + 2, shape.kv_channels))
        query, key, value = blocks.split([shape.heads_per_group, 1, 1], dim=1)
        return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)

    def fuse(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        groups = parts[1].shape[0] // shape.kv_channels
        blocks = [part.unflatten(0, (groups, -1, shape.kv_channels)) for part in parts]
        return torch.cat(blocks, dim=1).flatten(0, 2)


def kept_heads_by_group(shape: ModelShape, kept: KeptOfAxes) -> list[tuple[int, list[int]]] | None:
    """Each kept group with its kept heads, global indices, in the order the target model holds them; None: all stay.

    Raises: ValueError: a kept head lies in a group that is not kept, or the groups keep unequal numbers of heads.
    """
    if "head" not in kept and "group" not in kept:
        return None
    per_group = shape.heads_per_group
    groups = kept["group"].tolist() if "group" in kept else list(range(shape.num_query_groups))
    if "head" in kept:
        heads = kept["head"].tolist()
    else:
        heads = [group * per_group + slot for group in groups for slot in range(per_group)]
    homeless = [head for head in heads if head // per_group not in groups]
    require(
        not homeless,
        f"kept heads {homeless} belong to query groups that are not kept (kept groups: {groups}, {per_group} heads per "
        "group). Keep their groups too, or drop these heads.",
    )
    grouped = [(group, [head for head in heads if head // per_group == group]) for group in groups]
    counts = [len(heads_of_group) for _, heads_of_group in grouped]
    require(
        len(set(counts)) == 1 and counts[0] > 0,
        f"the kept query groups {groups} would keep {counts} heads: each needs equally many, at least one. "
        "Rank heads within their group.",
    )
    return grouped


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _choose(full: Tensor, dim: int, rows: Tensor) -> Tensor:
    """`full.index_select(dim, rows)`; columns on CPU through numpy, whose gather is 2 to 4 times faster there."""
    if dim == 0 or dim != full.dim() - 1 or full.device.type != "cpu":
        return full.index_select(dim, rows.to(full.device))
    as_integers = full.detach().view(_INTEGER_OF_SIZE[full.itemsize]).numpy()  # numpy has no bf16
    return torch.from_numpy(as_integers.take(rows.cpu().numpy(), axis=-1)).view(full.dtype)


def _rows_of_blocks(blocks: list[int], channels: int) -> Tensor:
    """Rows of consecutive blocks of `channels` rows each: [len(blocks) * channels]."""
    return (torch.tensor(blocks).unsqueeze(1) * channels + torch.arange(channels)).flatten()
