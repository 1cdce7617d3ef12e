"""The axis table: for every parameter of a Megatron-core GPT model, which named axes its dims are.

    decoder.layers.{i}.self_attention.linear_qkv.weight    (QKV rows, hidden)      tp splits dim 0
    decoder.layers.{i}.mlp.linear_fc2.weight               (hidden, ffn)           tp splits dim 1
    ...mlp.experts.local_experts.{e}.linear_fc2.weight     (hidden, expert_ffn)    expert tp splits dim 1

Pruning, tensor-parallel splitting, import, export and counting all read this table, so a new architecture is new rows.
A dim is an axis expression: a named axis as it is (`hidden`, `ffn`, `vocab`, `kv_channels`), or one spelled out, as
axis_expressions.py does.

Full means not split: what one rank holds at tensor_model_parallel_size=1, under its global layer and expert index.
Names are those of the bare `megatron.core` GPTModel, in the local spec; places.py knows the other. Nothing here
communicates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.axis_expressions import Axis, Fc1Rows, HeadColumns, KeptOfAxes, Named, NormGamma, QkvRows
from minitron_nemo.checks import require
from minitron_nemo.places import (
    EMBEDDING,
    EXPERT,
    FINAL_NORM,
    LAYER,
    NORMS_OF_LAYER,
    OUTPUT,
    layer_of,
    name_in_spec,
    pattern_of,
)
from minitron_nemo.shape import ModelShape

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
_ATTENTION, _DENSE_MLP = LAYER + "self_attention.", LAYER + "mlp."
_ROUTER, _SHARED, _ONE_EXPERT = _DENSE_MLP + "router.", _DENSE_MLP + "shared_experts.", _DENSE_MLP + EXPERT
_INPUT_NORM, _MLP_NORM = (LAYER + norm.name + ".weight" for norm in NORMS_OF_LAYER)
_INPUT_NORM_BIAS, _MLP_NORM_BIAS = (LAYER + norm.name + ".bias" for norm in NORMS_OF_LAYER)
_FINAL_NORM, _FINAL_NORM_BIAS = FINAL_NORM + ".weight", FINAL_NORM + ".bias"


def _expert_row(
    pattern: str, axes: tuple[Axis, ...], tp_dim: int | None = None, norm: str | None = None
) -> ParameterAxes:
    return ParameterAxes(pattern, axes, tp_dim, norm, present=_experts, in_layer=ModelShape.has_experts)


def _shared_row(
    pattern: str, axes: tuple[Axis, ...], tp_dim: int | None = None, norm: str | None = None
) -> ParameterAxes:
    return ParameterAxes(pattern, axes, tp_dim, norm, present=_shared_expert, in_layer=ModelShape.has_experts)


AXIS_TABLE: tuple[ParameterAxes, ...] = (
    ParameterAxes(EMBEDDING, (_VOCAB, _HIDDEN), tp_dim=0),
    ParameterAxes(_INPUT_NORM, (_GAMMA,)),
    ParameterAxes(_INPUT_NORM_BIAS, (_HIDDEN,), norm=_INPUT_NORM, present=_biased_norm),
    ParameterAxes(_ATTENTION + "linear_qkv.weight", (_QKV, _HIDDEN), tp_dim=0, norm=_INPUT_NORM),
    ParameterAxes(_ATTENTION + "linear_qkv.bias", (_QKV,), tp_dim=0, present=_qkv_bias),
    ParameterAxes(_ATTENTION + "q_layernorm.weight", (_CHANNELS,), present=_qk_norm),
    ParameterAxes(_ATTENTION + "q_layernorm.bias", (_CHANNELS,), present=_biased_qk_norm),
    ParameterAxes(_ATTENTION + "k_layernorm.weight", (_CHANNELS,), present=_qk_norm),
    ParameterAxes(_ATTENTION + "k_layernorm.bias", (_CHANNELS,), present=_biased_qk_norm),
    ParameterAxes(_ATTENTION + "linear_proj.weight", (_HIDDEN, _HEADS), tp_dim=1),
    ParameterAxes(_ATTENTION + "linear_proj.bias", (_HIDDEN,), present=_linear_bias),
    ParameterAxes(_MLP_NORM, (_GAMMA,)),
    ParameterAxes(_MLP_NORM_BIAS, (_HIDDEN,), norm=_MLP_NORM, present=_biased_norm),
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
    ParameterAxes(_FINAL_NORM_BIAS, (_HIDDEN,), norm=_FINAL_NORM, present=_biased_norm),
    ParameterAxes(OUTPUT, (_VOCAB, _HIDDEN), tp_dim=0, norm=_FINAL_NORM, present=_untied),
)
"""Every parameter of a Megatron-core GPT model, in the order they are streamed; layers repeat as a block, and the
experts within a layer."""

_ROW_OF_PATTERN = {row.pattern: row for row in AXIS_TABLE}


# ---- by name ---------------------------------------------------------------------------------------------------------


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
    row = _ROW_OF_PATTERN.get(pattern_of(name))
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


def take(full: Tensor, name: str, source_shape: ModelShape, kept: KeptOfAxes) -> Tensor:
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
