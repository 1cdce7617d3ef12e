"""The axis table: for every parameter of a Megatron-core GPT model, which named axes its dims are.

    decoder.layers.{i}.self_attention.linear_qkv.weight    (QKV rows, hidden)      tp splits dim 0
    decoder.layers.{i}.mlp.linear_fc2.weight               (hidden, ffn)           tp splits dim 1
    ...mlp.experts.local_experts.{e}.linear_fc2.weight     (hidden, expert_ffn)    expert tp splits dim 1

Pruning, tensor-parallel splitting, import, export and counting all read this table, so a new architecture is new rows.
A dim is an axis expression: a named axis as it is (`hidden`, `ffn`, `vocab`, `kv_channels`), or one spelled out

    QKV rows       group x (heads per group + 2) x kv_channels: per group its query heads, then key, then value
    head columns   head x kv_channels
    fc1 rows       [gate; up] x ffn where gated, else ffn; each tp rank holds [its gate; its up]

Full means not split: what one rank holds at tensor_model_parallel_size=1, under its global layer and expert index.
Names are those of the bare `megatron.core` GPTModel, in the local spec; the transformer-engine spec keeps the two layer
norms inside the linear that follows and numbers the weights of experts (`local_name`, `name_in_spec`). Nothing here
communicates.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.shape import ModelShape

Kept = Mapping[str, Tensor]
"""Named axis (`hidden`, `ffn`, `head`, `group`, `expert`, `expert_ffn`, `shared_expert_ffn`) -> kept global indices
[k], int64, for one parameter's layer, and for its expert where it has one.
An axis that is absent is kept whole. `hidden` may be a basis instead: [h, k] of a floating dtype, orthonormal columns.
`head_partner` [k] int64 names for each kept head a dropped head of its group that is merged into it, or -1
(`QueryRows`). Of a turned stream `folded` [h] is what a parameter's hidden channels are multiplied by before the basis:
for what reads a norm, the norm's gamma. `norm_scale`, a scalar, multiplies the gamma of a norm (`NormGamma`)."""

# ---- axis expressions ------------------------------------------------------------------------------------------------


class Axis:
    """What one dim of a parameter is made of."""

    def size(self, shape: ModelShape) -> int:
        """Length of the dim in full form."""
        raise NotImplementedError

    def kept_rows(self, shape: ModelShape, kept: Kept) -> Tensor | None:
        """Positions along this dim that stay, in the order of the result; None: all of them."""
        raise NotImplementedError

    def stretches(self, shape: ModelShape) -> tuple[int, ...]:
        """Lengths of the consecutive stretches that tensor parallelism splits each by itself."""
        return (self.size(shape),)

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: Kept) -> Tensor:
        """`full` with this dim cut down to what is kept: the one place where a plan entry meets a weight."""
        rows = self.kept_rows(shape, kept)
        return full if rows is None else _choose(full, dim, rows)

    def mixes(self, kept: Kept) -> bool:
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

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: Kept) -> Tensor:
        assert dim == 0
        whole = self.unfuse(full, shape)
        cut = [part.reduce(piece, 0, shape, kept) for part, piece in zip(self.parts(shape), whole, strict=True)]
        if all(after is before for after, before in zip(cut, whole, strict=True)):
            return full
        return self.fuse(cut, shape)


_DIM_OF_AXIS = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "vocab": "padded_vocab_size",
    "kv_channels": "kv_channels",
    "expert": "num_moe_experts",
    "expert_ffn": "moe_ffn_hidden_size",
    "shared_expert_ffn": "moe_shared_expert_intermediate_size",
}


@dataclass(frozen=True)
class Named(Axis):
    """A named axis as it is."""

    axis: str

    def size(self, shape: ModelShape) -> int:
        return getattr(shape, _DIM_OF_AXIS[self.axis])

    def kept_rows(self, shape: ModelShape, kept: Kept) -> Tensor | None:
        return kept.get(self.axis)

    def mixes(self, kept: Kept) -> bool:
        entry = kept.get(self.axis)
        return entry is not None and entry.is_floating_point()

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: Kept) -> Tensor:
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

    def mixes(self, kept: Kept) -> bool:
        return super().mixes(kept) or "norm_scale" in kept

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: Kept) -> Tensor:
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

    def kept_rows(self, shape: ModelShape, kept: Kept) -> Tensor | None:
        grouped = kept_heads_by_group(shape, kept)
        if grouped is None:
            return None
        return _rows_of_blocks([head for _, heads in grouped for head in heads], shape.kv_channels)


@dataclass(frozen=True)
class QueryRows(HeadColumns):
    """head x kv_channels of the query projection, where a dropped head may leave its difference to a kept one."""

    def mixes(self, kept: Kept) -> bool:
        return "head_partner" in kept

    def reduce(self, full: Tensor, dim: int, shape: ModelShape, kept: Kept) -> Tensor:
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

    def kept_rows(self, shape: ModelShape, kept: Kept) -> Tensor | None:
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


def kept_heads_by_group(shape: ModelShape, kept: Kept) -> list[tuple[int, list[int]]] | None:
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


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterAxes:
    """One row of the table."""

    pattern: str
    """Name in the local spec, `{i}` for the global layer index, `{e}` for the global expert index."""
    axes: tuple[Axis, ...]
    """What each dim is."""
    tp_dim: int | None = None
    """The dim tensor parallelism splits (of an expert: expert tensor parallelism); None: every such rank holds all."""
    norm: str | None = None
    """Pattern of the norm weight that goes into it where the residual stream is turned: for a matrix that of the norm
    it reads, for a norm's bias its own norm's."""
    present: Callable[[ModelShape], bool] = lambda shape: True
    """Whether a model of this shape has the parameter, in some layer at least."""
    in_layer: Callable[[ModelShape, int], bool] = lambda shape, layer: True
    """Whether a layer of a model that has the parameter does."""

    @property
    def of_expert(self) -> bool:
        """Whether every routed expert has one, and expert parallelism says which rank holds it."""
        return "{e}" in self.pattern


def _biased_norm(shape: ModelShape) -> bool:
    return shape.normalization != "RMSNorm"


def _qkv_bias(shape: ModelShape) -> bool:
    return shape.add_bias_linear or shape.add_qkv_bias


def _linear_bias(shape: ModelShape) -> bool:
    return shape.add_bias_linear


def _qk_norm(shape: ModelShape) -> bool:
    return shape.qk_layernorm


def _biased_qk_norm(shape: ModelShape) -> bool:
    return shape.qk_layernorm and _biased_norm(shape)


def _untied(shape: ModelShape) -> bool:
    return not shape.share_embeddings_and_output_weights


def _experts(shape: ModelShape) -> bool:
    return shape.num_moe_experts is not None


def _shared_expert(shape: ModelShape) -> bool:
    return shape.moe_shared_expert_intermediate_size is not None


def _dense(shape: ModelShape, layer: int) -> bool:
    return not shape.has_experts(layer)


_HIDDEN, _FFN, _VOCAB, _CHANNELS = Named("hidden"), Named("ffn"), Named("vocab"), Named("kv_channels")
_GAMMA = NormGamma("hidden")
_QKV, _HEADS, _FC1 = QkvRows(), HeadColumns(), Fc1Rows(_FFN)
_EXPERT, _EXPERT_FFN, _SHARED_FFN = Named("expert"), Named("expert_ffn"), Named("shared_expert_ffn")
_LAYER = "decoder.layers.{i}."
_ATTENTION, _DENSE_MLP = _LAYER + "self_attention.", _LAYER + "mlp."
_ROUTER, _SHARED = _LAYER + "mlp.router.", _LAYER + "mlp.shared_experts."
_ONE_EXPERT = _LAYER + "mlp.experts.local_experts.{e}."
_INPUT_NORM, _MLP_NORM = _LAYER + "input_layernorm.weight", _LAYER + "pre_mlp_layernorm.weight"
_FINAL_NORM = "decoder.final_layernorm.weight"


def _expert_row(
    pattern: str, axes: tuple[Axis, ...], tp_dim: int | None = None, norm: str | None = None
) -> ParameterAxes:
    return ParameterAxes(pattern, axes, tp_dim, norm, present=_experts, in_layer=ModelShape.has_experts)


def _shared_row(
    pattern: str, axes: tuple[Axis, ...], tp_dim: int | None = None, norm: str | None = None
) -> ParameterAxes:
    return ParameterAxes(pattern, axes, tp_dim, norm, present=_shared_expert, in_layer=ModelShape.has_experts)


AXIS_TABLE: tuple[ParameterAxes, ...] = (
    ParameterAxes("embedding.word_embeddings.weight", (_VOCAB, _HIDDEN), tp_dim=0),
    ParameterAxes(_INPUT_NORM, (_GAMMA,)),
    ParameterAxes(_LAYER + "input_layernorm.bias", (_HIDDEN,), norm=_INPUT_NORM, present=_biased_norm),
    ParameterAxes(_ATTENTION + "linear_qkv.weight", (_QKV, _HIDDEN), tp_dim=0, norm=_INPUT_NORM),
    ParameterAxes(_ATTENTION + "linear_qkv.bias", (_QKV,), tp_dim=0, present=_qkv_bias),
    ParameterAxes(_ATTENTION + "q_layernorm.weight", (_CHANNELS,), present=_qk_norm),
    ParameterAxes(_ATTENTION + "q_layernorm.bias", (_CHANNELS,), present=_biased_qk_norm),
    ParameterAxes(_ATTENTION + "k_layernorm.weight", (_CHANNELS,), present=_qk_norm),
    ParameterAxes(_ATTENTION + "k_layernorm.bias", (_CHANNELS,), present=_biased_qk_norm),
    ParameterAxes(_ATTENTION + "linear_proj.weight", (_HIDDEN, _HEADS), tp_dim=1),
    ParameterAxes(_ATTENTION + "linear_proj.bias", (_HIDDEN,), present=_linear_bias),
    ParameterAxes(_MLP_NORM, (_GAMMA,)),
    ParameterAxes(_LAYER + "pre_mlp_layernorm.bias", (_HIDDEN,), norm=_MLP_NORM, present=_biased_norm),
    ParameterAxes(_DENSE_MLP + "linear_fc1.weight", (_FC1, _HIDDEN), tp_dim=0, norm=_MLP_NORM, in_layer=_dense),
    ParameterAxes(_DENSE_MLP + "linear_fc1.bias", (_FC1,), tp_dim=0, present=_linear_bias, in_layer=_dense),
    ParameterAxes(_DENSE_MLP + "linear_fc2.weight", (_HIDDEN, _FFN), tp_dim=1, in_layer=_dense),
    ParameterAxes(_DENSE_MLP + "linear_fc2.bias", (_HIDDEN,), present=_linear_bias, in_layer=_dense),
    _expert_row(_ROUTER + "weight", (_EXPERT, _HIDDEN), norm=_MLP_NORM),
    _expert_row(_ONE_EXPERT + "linear_fc1.weight", (Fc1Rows(_EXPERT_FFN), _HIDDEN), tp_dim=0, norm=_MLP_NORM),
    _expert_row(_ONE_EXPERT + "linear_fc2.weight", (_HIDDEN, _EXPERT_FFN), tp_dim=1),
    _shared_row(_SHARED + "linear_fc1.weight", (Fc1Rows(_SHARED_FFN), _HIDDEN), tp_dim=0, norm=_MLP_NORM),
    _shared_row(_SHARED + "linear_fc2.weight", (_HIDDEN, _SHARED_FFN), tp_dim=1),
    ParameterAxes(_FINAL_NORM, (_GAMMA,)),
    ParameterAxes("decoder.final_layernorm.bias", (_HIDDEN,), norm=_FINAL_NORM, present=_biased_norm),
    ParameterAxes("output_layer.weight", (_VOCAB, _HIDDEN), tp_dim=0, norm=_FINAL_NORM, present=_untied),
)
"""Every parameter of a Megatron-core GPT model, in the order they are streamed; layers repeat as a block, and the
experts within a layer."""

_ROW_OF_PATTERN = {row.pattern: row for row in AXIS_TABLE}

_TRANSFORMER_ENGINE_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

# ---- names -----------------------------------------------------------------------------------------------------------

_LAYER_INDEX = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT_INDEX = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")


def layer_of(name: str) -> int | None:
    """Global layer index, from 0, of a parameter; None outside the layers."""
    found = _LAYER_INDEX.match(name)
    return int(found.group(1)) if found else None


def with_layer(name: str, index: int) -> str:
    """The same parameter of layer `index`; a name outside the layers stays as it is."""
    return _LAYER_INDEX.sub(f"decoder.layers.{index}.", name)


def expert_of(name: str) -> int | None:
    """Index, from 0, of the routed expert a parameter belongs to; None outside the experts."""
    found = _EXPERT_INDEX.search(local_name(name))
    return int(found.group(1)) if found else None


def with_expert(name: str, index: int) -> str:
    """The same parameter of expert `index`, local spec; a name outside the experts stays as it is."""
    return _EXPERT_INDEX.sub(f".experts.local_experts.{index}.", local_name(name))


def local_name(name: str) -> str:
    """The local-spec name of a parameter named in either spec."""
    for local, fused in _TRANSFORMER_ENGINE_NAMES.items():
        name = name.replace(fused, local)
    return _GROUPED_EXPERT.sub(r".experts.local_experts.\2.\1.weight", name)


def name_in_spec(name: str, spec: str, shape: ModelShape) -> str:
    """A local-spec name as it is called in `spec`: "local" or "transformer_engine" (with grouped experts)."""
    require(
        spec in ("local", "transformer_engine"), f"spec={spec!r} is not known; use 'local' or 'transformer_engine'."
    )
    if spec == "local":
        return name
    layer = layer_of(name)
    for local, fused in _TRANSFORMER_ENGINE_NAMES.items():
        if "mlp" in fused and layer is not None and shape.has_experts(layer):
            continue  # nothing to fuse it with: the router and every expert read this norm
        name = name.replace(local, fused)
    return re.sub(r"\.local_experts\.(\d+)\.(linear_fc[12])\.weight$", r".\2.weight\1", name)


def parameter_names(shape: ModelShape, spec: str = "local") -> list[str]:
    """Names of every parameter of a model of this shape, embedding first, output layer last."""
    rows = [row for row in AXIS_TABLE if row.present(shape)]
    names: list[str] = []
    for in_layers, block in itertools.groupby(rows, lambda row: "{i}" in row.pattern):
        repeated = list(block)
        for layer in range(shape.num_layers) if in_layers else (0,):
            of_layer = [row for row in repeated if row.in_layer(shape, layer)]
            for of_experts, patterns in itertools.groupby(of_layer, lambda row: row.of_expert):
                block_patterns = [row.pattern.replace("{i}", str(layer)) for row in patterns]
                experts = range(shape.num_moe_experts or 0) if of_experts else (0,)
                names += [pattern.replace("{e}", str(expert)) for expert in experts for pattern in block_patterns]
    return [name_in_spec(name, spec, shape) for name in names]


def parameter_axes(name: str) -> ParameterAxes:
    """The table's row for a parameter, named in either spec.

    Raises: ValueError: the table has no such parameter; lists those it has.
    """
    pattern = _EXPERT_INDEX.sub(".experts.local_experts.{e}.", _LAYER_INDEX.sub(_LAYER, local_name(name)))
    row = _ROW_OF_PATTERN.get(pattern)
    require(
        row is not None,
        f"Unknown parameter {name}: the axis table has no row for it, so it can neither be split nor pruned. "
        f"Known patterns: {', '.join(_ROW_OF_PATTERN)}.",
    )
    assert row is not None
    return row


def norm_of(name: str) -> str | None:
    """The norm weight that a parameter takes in where the residual stream is turned, see `ParameterAxes.norm`."""
    norm, layer = parameter_axes(name).norm, layer_of(name)
    return norm if norm is None or layer is None else norm.replace("{i}", str(layer))


def norm_number(name: str, shape: ModelShape) -> int | None:
    """Place of a norm of the residual stream, named by its weight, among the model's 2 l + 1; None: not such a norm."""
    row, layer = parameter_axes(name), layer_of(name)
    if not isinstance(row.axes[0], NormGamma):
        return None
    return 2 * shape.num_layers if layer is None else 2 * layer + (row.pattern == _MLP_NORM)


def part_axes(name: str, shape: ModelShape) -> list[tuple[Axis, ...]]:
    """The axes of each separate matrix a parameter is fused from: one tuple for each of its first axis's `parts`."""
    first, *others = parameter_axes(name).axes
    return [(part, *others) for part in first.parts(shape)]


def full_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Sizes of a parameter in full form."""
    return tuple(axis.size(shape) for axis in parameter_axes(name).axes)


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def split_for_tp(full: Tensor, axes: ParameterAxes, shape: ModelShape, rank: int, size: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a full parameter; a view where one stretch is split.

    Raises: ValueError: the dim does not divide by `size`.
    """
    if axes.tp_dim is None:
        return full
    axis = axes.axes[axes.tp_dim]
    for length in axis.stretches(shape):
        require(
            length % size == 0,
            f"{axes.pattern}: a dim of {length} cannot be split over tensor_model_parallel_size={size}. "
            "Use a size that divides it.",
        )
    stretches = full.split(list(axis.stretches(shape)), dim=axes.tp_dim)
    pieces = [stretch.chunk(size, dim=axes.tp_dim)[rank] for stretch in stretches]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axes.tp_dim)


def join_from_tp(shards: Sequence[Tensor], axes: ParameterAxes, shape: ModelShape) -> Tensor:
    """The full parameter from every tensor-parallel rank's shard, in rank order; inverse of `split_for_tp`."""
    if axes.tp_dim is None or len(shards) == 1:
        return shards[0]
    lengths = [length // len(shards) for length in axes.axes[axes.tp_dim].stretches(shape)]
    pieces = [shard.split(lengths, dim=axes.tp_dim) for shard in shards]
    return torch.cat([rank[i] for i in range(len(lengths)) for rank in pieces], dim=axes.tp_dim)


# ---- pruning ---------------------------------------------------------------------------------------------------------


def take(full: Tensor, name: str, source_shape: ModelShape, kept: Kept) -> Tensor:
    """A full parameter pruned along its named axes: rows and columns in the target model's order.

    Args:
        full: the source's parameter, `full_shape(name, source_shape)`, any dtype and device.
        kept: for the parameter's layer, named axis -> kept global indices [k]; absent axes stay whole. Heads stay in
            their group; every kept group keeps equally many.
    Returns:
        a new tensor, or `full` itself where nothing along its axes is pruned.
    Raises: ValueError: unknown parameter, another shape than the source's, or heads that do not fit their groups.
    """
    row = parameter_axes(name)
    require(
        tuple(full.shape) == full_shape(name, source_shape),
        f"{name} has shape {list(full.shape)}, but the source model's is {list(full_shape(name, source_shape))}. "
        "Prune full parameters of the plan's source model.",
    )
    for dim, axis in enumerate(row.axes):
        full = axis.reduce(full, dim, source_shape, kept)
    return full
