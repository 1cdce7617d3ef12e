"""Where the width scores are read in a Megatron-core GPT model, by hooks that leave its outputs untouched.

    axis     what is read                                            shape                     split over
    ffn      input of mlp.linear_fc2 (after the activation), or      [s/cp, b, f/tp]           cp
             the gate half of linear_fc1's output (before it)
    head     input of self_attention.linear_proj, L2 over d          [s/cp, b, (n/tp)*d]       cp
    hidden   outputs of input_layernorm and pre_mlp_layernorm        [s/(cp*tp), b, h]         cp, and tp if sequence
                                                                     or [s/cp, b, h]           parallel

The linears' inputs hold the full sequence of the tensor-parallel group also under sequence parallelism; the norms'
outputs do not. A norm fused into a transformer-engine linear is computed once more from the linear's input. With
metric=contributions it is read how much each neuron, head and channel adds to the stream, see `_written_by_heads`.

Communication: that of watches.py. Neurons and heads are split over tp and stay so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron_nemo.activations.hooks import on_input, on_output
from minitron_nemo.activations.tokens import AnnouncedBatch
from minitron_nemo.checks import require
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance.statistics import head_norms
from minitron_nemo.importance.watches import AxisWatches
from minitron_nemo.parallel import Groups, group_rank, group_size
from minitron_nemo.places import READERS, in_layer, norms_in
from minitron_nemo.shape import ModelShape

PLACES = ("hidden (input norm)", "head", "hidden (pre-MLP norm)", "ffn", "shared_expert_ffn")
"""What is read in a layer, by axis, in the order of the forward pass; a watch's place is layer x 5 + index here."""


def watch_layers(
    model: Any,
    shape: ModelShape,
    groups: Groups,
    current: AnnouncedBatch,
    handles: list[RemovableHandle],
    config: ImportanceConfig,
) -> dict[str, AxisWatches]:
    """Hook every layer of this rank's pipeline stage: axis -> its places, one a layer, for hidden two.

    Args:
        model: the bare megatron.core GPTModel; `decoder.layers[i].layer_number` is global, from 1.
        handles: gets the hooks, also where an error ends the call half-way.
        config: its metric, head_norm and neurons say what is read.
    """
    axes = _axes_of(model, shape, groups, current, config)
    _watch_norms(model, shape, axes["hidden"], handles, config)
    for layer in model.decoder.layers:
        _watch_heads(layer, shape.num_attention_heads // group_size(groups.tp), axes["head"], handles, config)
        axis = "shared_expert_ffn" if shape.has_experts(layer.layer_number - 1) else "ffn"
        if axis in axes:
            _watch_neurons(layer, axis, axes[axis], handles, config)
    return axes


def _axes_of(
    model: Any, shape: ModelShape, groups: Groups, current: AnnouncedBatch, config: ImportanceConfig
) -> dict[str, AxisWatches]:
    """The axes that a model of this shape has, without their places."""
    tp, device = group_size(groups.tp), next(model.parameters()).device
    heads = shape.num_attention_heads // tp
    per_head = 1 if config.head_norm == "before" else shape.kv_channels
    split, norm_groups = (0, 1), [groups.cp]
    if model.config.sequence_parallel:
        split, norm_groups = (group_rank(groups.tp), tp), [groups.cp, groups.tp]
    axes = {
        "hidden": AxisWatches(shape.hidden_size, device, current, norm_groups, shard=split),
        "head": AxisWatches(heads * per_head, device, current, [groups.cp]),
    }
    if shape.has_dense_layers:
        axes["ffn"] = AxisWatches(shape.ffn_hidden_size // tp, device, current, [groups.cp])
    if shape.moe_shared_expert_intermediate_size is not None:
        shared = shape.moe_shared_expert_intermediate_size // tp
        axes["shared_expert_ffn"] = AxisWatches(shared, device, current, [groups.cp])
    return axes


def _watch_norms(
    model: Any, shape: ModelShape, axis: AxisWatches, handles: list[RemovableHandle], config: ImportanceConfig
) -> None:
    """What the norms of the layers say, the final one left out; of contributions, what enters them."""
    contributions = config.metric == "contributions"
    for row, norm in norms_in(model).items():
        if row == 2 * shape.num_layers:
            continue
        layer, number = divmod(row, 2)
        normalise = norm.recomputed() if norm.is_fused and not contributions else None
        watch = axis.add(norm.name, row, layer * len(PLACES) + 2 * number, normalise)
        if norm.is_fused or contributions:
            handles.append(norm.module.register_forward_pre_hook(on_input(watch.see)))
        else:
            handles.append(norm.module.register_forward_hook(on_output(watch.see)))


def _watch_heads(
    layer: Any, heads: int, axis: AxisWatches, handles: list[RemovableHandle], config: ImportanceConfig
) -> None:
    """What a layer's `heads` heads of this rank say."""
    projection = layer.get_submodule(READERS["head"])
    measure: Callable[[Tensor], Tensor] | None = None
    if config.metric == "contributions":
        measure = _written_by_heads(projection, heads)
    elif config.head_norm == "before":
        measure = _norms_of_heads(heads)
    index = layer.layer_number - 1
    place = index * len(PLACES) + PLACES.index("head")
    watch = axis.add(in_layer(index, READERS["head"]), index, place, measure)
    handles.append(projection.register_forward_pre_hook(on_input(watch.see)))


def _watch_neurons(
    layer: Any, name: str, axis: AxisWatches, handles: list[RemovableHandle], config: ImportanceConfig
) -> None:
    """What a layer's neurons say, those of the axis `name`."""
    index = layer.layer_number - 1
    place = index * len(PLACES) + PLACES.index(name)
    path, _, linear_fc2 = READERS[name].rpartition(".")
    mlp = layer.get_submodule(path)
    require(
        hasattr(mlp, linear_fc2),
        f"{in_layer(index, path)} is a {type(mlp).__name__} without linear_fc2, whose input scores its neurons. Use "
        "Megatron's local or transformer-engine GPT layer spec.",
    )
    if config.neurons == "pre_activation":
        watch = axis.add(in_layer(index, f"{path}.linear_fc1"), index, place)
        handles.append(mlp.linear_fc1.register_forward_hook(_on_gate(watch.see, axis.channels)))
    else:
        written = _written_by_neurons(mlp.linear_fc2) if config.metric == "contributions" else None
        watch = axis.add(in_layer(index, READERS[name]), index, place, written)
        handles.append(mlp.linear_fc2.register_forward_pre_hook(on_input(watch.see)))


def _on_gate(
    see: Callable[[Tensor], None], neurons: int
) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, Tensor | None]], None]:
    """Shows what linear_fc1 gives the activation function: its first half where gated, plus the bias it holds back."""

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        value, bias = output
        see(value[..., :neurons] if bias is None else value[..., :neurons] + bias[:neurons])

    return hook


def _norms_of_heads(heads: int) -> Callable[[Tensor], Tensor]:
    """[s, b, (n/tp)*d] -> L2 norm of each head [s, b, n/tp], float32."""
    return lambda activation: head_norms(activation, heads)


def _written_by_neurons(linear_fc2: Any) -> Callable[[Tensor], Tensor]:
    """[s, b, f/tp] -> |what each neuron adds to the stream|, with the sign of its activation."""
    column_norms = linear_fc2.weight.detach().float().norm(dim=0)  # [f/tp], over all of h: row-parallel keeps it whole
    return lambda activation: activation.float() * column_norms


def _written_by_heads(linear_proj: Any, heads: int) -> Callable[[Tensor], Tensor]:
    """[s, b, (n/tp)*d] -> L2 norm of what each head adds to the stream [s, b, n/tp], float32.

    ||W_i a|| = ||R_i a|| with W_i = Q_i R_i, so that a token costs d^2 a head, not d h.
    """
    columns = linear_proj.weight.detach().float().unflatten(1, (heads, -1)).movedim(1, 0)  # [n/tp, h, d]
    triangles = torch.linalg.qr(columns, mode="r").R  # [n/tp, d, d]

    def norms(activation: Tensor) -> Tensor:
        by_head = activation.float().unflatten(-1, (heads, -1))
        return torch.einsum("sbnd,nkd->sbnk", by_head, triangles).norm(dim=-1)

    return norms
