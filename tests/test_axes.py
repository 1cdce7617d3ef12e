"""The axis table, against real Megatron-core models and against pruning written out by hand."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from minitron_nemo.axes import full_shape, join_from_tp, parameter_axes, parameter_names, split_for_tp, take
from minitron_nemo.shape import ModelShape
from support.megatron import TINY, TINY_EXPERTS, bare_model

VARIANTS = {
    "llama": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "nemotron": {"normalization": "LayerNorm1p", "gated_linear_unit": False, "activation": "squared_relu"},
    "biases": {"add_bias_linear": True},
    "qwen": {"add_qkv_bias": True, "qk_layernorm": True},
    "biased q/k norms": {"qk_layernorm": True, "normalization": "LayerNorm"},
    "experts": {field: getattr(TINY_EXPERTS, field) for field in TINY_EXPERTS.to_dict()},
    "experts everywhere": {"num_moe_experts": 3, "moe_ffn_hidden_size": 16, "moe_router_topk": 2},
}
LAYER = "decoder.layers.2."


def variant(name: str) -> ModelShape:
    return dataclasses.replace(TINY, **VARIANTS[name])


def numbered(name: str, shape: ModelShape) -> Tensor:
    """A full parameter whose values are all different, so that no row can stand for another."""
    sizes = full_shape(name, shape)
    return torch.arange(torch.Size(sizes).numel()).reshape(sizes)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_names_every_parameter_of_a_real_model_with_its_shape(name: str) -> None:
    shape = variant(name)
    real = {parameter: tuple(value.shape) for parameter, value in bare_model(shape).named_parameters()}
    assert {parameter: full_shape(parameter, shape) for parameter in parameter_names(shape)} == real


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_splits_as_megatron_does(name: str) -> None:
    shape = variant(name)
    for parameter, value in bare_model(shape).named_parameters():
        split = value.partition_dim if getattr(value, "tensor_model_parallel", False) else None
        assert parameter_axes(parameter).tp_dim == split, parameter


def test_an_unknown_parameter_is_named_beside_the_known_patterns() -> None:
    with pytest.raises(ValueError, match=r"Unknown parameter decoder.*mlp\.router\.bias: .*linear_fc1\.weight"):
        parameter_axes("decoder.layers.0.mlp.router.bias")
    with pytest.raises(ValueError, match=r"spec='te' is not known; use 'local' or 'transformer_engine'"):
        parameter_names(TINY, spec="te")


@pytest.mark.parametrize("name", VARIANTS)
def test_shards_join_to_the_full_parameter(name: str) -> None:
    shape = variant(name)
    for parameter in parameter_names(shape):
        full, axes = numbered(parameter, shape), parameter_axes(parameter)
        shards = [split_for_tp(full, axes, shape, rank, 2) for rank in range(2)]
        assert torch.equal(join_from_tp(shards, axes, shape), full), parameter
        if axes.tp_dim is not None:
            assert shards[0].shape[axes.tp_dim] * 2 == full.shape[axes.tp_dim]


def test_each_rank_holds_its_gate_and_its_up() -> None:
    name = LAYER + "mlp.linear_fc1.weight"
    full = numbered(name, TINY)
    gate, up = full[:40], full[40:]
    assert torch.equal(split_for_tp(full, parameter_axes(name), TINY, 1, 2), torch.cat([gate[20:], up[20:]]))


def test_each_rank_holds_whole_query_groups() -> None:
    name = LAYER + "self_attention.linear_qkv.bias"
    full = numbered(name, TINY)
    assert torch.equal(split_for_tp(full, parameter_axes(name), TINY, 1, 2), full[5 * 8 :])  # 3 heads, key, value


def test_a_dim_that_does_not_split_is_refused() -> None:
    name = LAYER + "mlp.linear_fc2.weight"
    with pytest.raises(ValueError, match=r"linear_fc2\.weight: a dim of 40 .*tensor_model_parallel_size=3"):
        split_for_tp(numbered(name, TINY), parameter_axes(name), TINY, 0, 3)


def test_gate_and_up_come_apart_and_together() -> None:
    name = LAYER + "mlp.linear_fc1.weight"
    full, axis = numbered(name, TINY), parameter_axes(name).axes[0]
    gate, up = axis.unfuse(full, TINY)
    assert torch.equal(gate, full[:40])
    assert torch.equal(up, full[40:])
    assert torch.equal(axis.fuse([gate, up], TINY), full)


def test_query_key_and_value_come_apart_and_together() -> None:
    name = LAYER + "self_attention.linear_qkv.weight"
    full, axis = numbered(name, TINY), parameter_axes(name).axes[0]
    query, key, value = axis.unfuse(full, TINY)
    rows = full.reshape(2, 5, 8, 24)  # group, (3 query heads, key, value), channel, hidden
    assert torch.equal(query, torch.cat([rows[0, 0], rows[0, 1], rows[0, 2], rows[1, 0], rows[1, 1], rows[1, 2]]))
    assert torch.equal(key, torch.cat([rows[0, 3], rows[1, 3]]))
    assert torch.equal(value, torch.cat([rows[0, 4], rows[1, 4]]))
    assert torch.equal(axis.fuse([query, key, value], TINY), full)


# ---- pruning ---------------------------------------------------------------------------------------------------------

KEPT = {
    "hidden": torch.tensor([0, 3, 4, 11, 23]),
    "ffn": torch.tensor([1, 2, 39]),
    "head": torch.tensor([0, 2, 4, 5]),  # heads 0, 2 of group 0 and 4, 5 of group 1
}


def pruned_by_hand(name: str, full: Tensor) -> Tensor:
    """The same parameter cut with for loops, one row or column at a time."""
    hidden, ffn, heads = (KEPT[axis].tolist() for axis in ("hidden", "ffn", "head"))
    channels = range(8)
    qkv = []
    for group in range(2):
        for head in heads:
            if head // 3 == group:
                qkv += [(group * 5 + head % 3) * 8 + channel for channel in channels]
        qkv += [(group * 5 + 3) * 8 + channel for channel in channels]  # key
        qkv += [(group * 5 + 4) * 8 + channel for channel in channels]  # value
    projection = [head * 8 + channel for head in heads for channel in channels]
    rows_and_columns = {
        "word_embeddings.weight": (range(66), hidden),
        "output_layer.weight": (range(66), hidden),
        "linear_qkv.weight": (qkv, hidden),
        "linear_proj.weight": (hidden, projection),
        "linear_fc1.weight": (ffn + [40 + neuron for neuron in ffn], hidden),
        "linear_fc2.weight": (hidden, ffn),
        "linear_qkv.bias": (qkv,),
        "linear_fc1.bias": (ffn + [40 + neuron for neuron in ffn],),
        "q_layernorm.weight": (range(8),),
        "k_layernorm.weight": (range(8),),
    }
    kept = next((kept for ending, kept in rows_and_columns.items() if name.endswith(ending)), (hidden,))
    return torch.stack([full[position] for position in itertools.product(*kept)]).reshape([len(k) for k in kept])


def test_pruning_keeps_exactly_the_rows_and_columns_of_what_is_kept() -> None:
    shape = dataclasses.replace(TINY, add_bias_linear=True, qk_layernorm=True)
    target = shape.pruned_to(hidden_size=5, ffn_hidden_size=3, num_attention_heads=4)
    for name in parameter_names(shape):
        full = numbered(name, shape)
        pruned = take(full, name, shape, KEPT)
        assert torch.equal(pruned, pruned_by_hand(name, full)), name
        assert tuple(pruned.shape) == full_shape(name, target), name


def test_pruning_an_expert_layer_keeps_experts_their_neurons_and_channels_apart() -> None:
    kept = {
        "hidden": torch.tensor([0, 3, 23]),
        "ffn": torch.tensor([39]),  # of the dense layers: an expert layer has none
        "expert": torch.tensor([1, 2]),
        "expert_ffn": torch.tensor([4, 19]),
        "shared_expert_ffn": torch.tensor([0, 5, 11]),
    }
    gate_and_up, shared = [4, 19, 24, 39], [0, 5, 11, 12, 17, 23]
    rows_and_columns = {
        "mlp.router.weight": ([1, 2], [0, 3, 23]),
        "mlp.experts.local_experts.1.linear_fc1.weight": (gate_and_up, [0, 3, 23]),
        "mlp.experts.local_experts.1.linear_fc2.weight": ([0, 3, 23], [4, 19]),
        "mlp.shared_experts.linear_fc1.weight": (shared, [0, 3, 23]),
        "mlp.shared_experts.linear_fc2.weight": ([0, 3, 23], [0, 5, 11]),
    }
    for name, (rows, columns) in rows_and_columns.items():
        full = numbered(LAYER + name, TINY_EXPERTS)
        assert torch.equal(take(full, LAYER + name, TINY_EXPERTS, kept), full[rows][:, columns]), name


def test_pruning_a_query_group_takes_its_heads_key_and_value_along() -> None:
    target = TINY.pruned_to(num_attention_heads=3, num_query_groups=1)
    qkv, projection = LAYER + "self_attention.linear_qkv.weight", LAYER + "self_attention.linear_proj.weight"
    kept = {"group": torch.tensor([1])}
    assert torch.equal(take(numbered(qkv, TINY), qkv, TINY, kept), numbered(qkv, TINY)[40:])
    assert torch.equal(take(numbered(projection, TINY), projection, TINY, kept), numbered(projection, TINY)[:, 24:])
    assert full_shape(qkv, target) == (40, 24)


def test_pruning_twice_equals_pruning_once() -> None:
    name = LAYER + "self_attention.linear_qkv.weight"
    full = numbered(name, TINY)
    halfway = TINY.pruned_to(num_attention_heads=4)
    first = take(full, name, TINY, {"head": torch.tensor([0, 2, 3, 5])})
    then = take(first, name, halfway, {"head": torch.tensor([1, 2])})  # heads 2 and 3 of the source
    assert torch.equal(then, take(full, name, TINY, {"head": torch.tensor([2, 3])}))


def test_what_is_not_pruned_is_passed_on_untouched() -> None:
    name = LAYER + "mlp.linear_fc2.weight"
    full = numbered(name, TINY)
    assert take(full, name, TINY, {}) is full


def test_a_transformer_engine_norm_is_pruned_like_the_local_one() -> None:
    full = torch.arange(24)
    pruned = take(full, LAYER + "mlp.linear_fc1.layer_norm_weight", TINY, KEPT)
    assert pruned.tolist() == KEPT["hidden"].tolist()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"head": [0, 1, 3]}, r"\[0, 1\] would keep \[2, 1\] heads: each needs equally many"),
        ({"head": [0, 1]}, r"would keep \[2, 0\] heads"),
        ({"head": [0, 3], "group": [0]}, r"kept heads \[3\] belong to query groups that are not kept"),
    ],
)
def test_heads_that_do_not_fit_their_groups_are_refused(kept: dict[str, list[int]], message: str) -> None:
    name = LAYER + "self_attention.linear_proj.weight"
    with pytest.raises(ValueError, match=message):
        take(numbered(name, TINY), name, TINY, {axis: torch.tensor(indices) for axis, indices in kept.items()})


def test_a_parameter_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[24, 41\], but the source model's is \[24, 40\]"):
        take(torch.zeros(24, 41), LAYER + "mlp.linear_fc2.weight", TINY, {})
