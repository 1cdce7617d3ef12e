"""Names in both layer specs, and the norms of built models, whichever module they are in."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from minitron_nemo.axes import full_shape, norm_number, parameter_names
from minitron_nemo.places import (
    NORMS_OF_LAYER,
    READERS,
    expert_of,
    layer_of,
    local_name,
    name_in_spec,
    norm_in,
    norms_in,
    with_expert,
    with_layer,
)
from minitron_nemo.shape import ModelShape
from support.megatron import TINY, TINY_EXPERTS, build_gpt, fuse_norms

LAYER = "decoder.layers.2."


def test_transformer_engine_keeps_the_norms_inside_the_linear_that_follows() -> None:
    shape = dataclasses.replace(TINY, normalization="LayerNorm1p", gated_linear_unit=False)
    names = parameter_names(shape, spec="transformer_engine")
    assert "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_bias" in names
    assert "decoder.final_layernorm.weight" in names
    assert not any(".input_layernorm" in name or ".pre_mlp_layernorm" in name for name in names)
    assert [local_name(name) for name in names] == parameter_names(shape)
    assert [full_shape(name, shape) for name in names] == [full_shape(n, shape) for n in parameter_names(shape)]
    assert name_in_spec(LAYER + "input_layernorm.weight", "local", shape) == LAYER + "input_layernorm.weight"


def test_transformer_engine_numbers_the_weights_of_experts_and_keeps_their_norm_apart() -> None:
    names = parameter_names(TINY_EXPERTS, spec="transformer_engine")
    assert LAYER + "mlp.experts.linear_fc2.weight3" in names
    assert LAYER + "pre_mlp_layernorm.weight" in names  # an expert layer
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names  # a dense one
    assert [local_name(name) for name in names] == parameter_names(TINY_EXPERTS)


def test_layer_indices_are_read_and_replaced() -> None:
    assert layer_of("decoder.layers.12.mlp.linear_fc2.weight") == 12
    assert layer_of("output_layer.weight") is None
    assert with_layer("decoder.layers.12.mlp.linear_fc2.weight", 3) == "decoder.layers.3.mlp.linear_fc2.weight"
    assert with_layer("output_layer.weight", 3) == "output_layer.weight"


def test_expert_indices_are_read_and_replaced_in_either_spec() -> None:
    third = "decoder.layers.12.mlp.experts.local_experts.3.linear_fc2.weight"
    assert expert_of(third) == expert_of("decoder.layers.12.mlp.experts.linear_fc2.weight3") == 3
    assert expert_of("decoder.layers.12.mlp.shared_experts.linear_fc2.weight") is None
    assert with_expert(third, 10) == third.replace("experts.3.", "experts.10.")
    assert with_expert("decoder.layers.12.mlp.router.weight", 10) == "decoder.layers.12.mlp.router.weight"


@pytest.mark.parametrize("shape", [TINY, TINY_EXPERTS], ids=["dense", "experts"])
def test_the_norms_of_a_model_are_numbered_as_in_the_axis_table(shape: ModelShape) -> None:
    found = {number: norm.name for number, norm in norms_in(build_gpt(shape)).items()}
    in_table = {name: norm_number(name, shape) for name in parameter_names(shape)}
    assert found == {number: name.removesuffix(".weight") for name, number in in_table.items() if number is not None}


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm", "LayerNorm1p"])
def test_a_norm_inside_a_linear_is_computed_as_the_one_before_it(normalization: str) -> None:
    shape = dataclasses.replace(TINY, normalization=normalization)
    apart, fused = build_gpt(shape), fuse_norms(build_gpt(shape))
    entering = torch.randn(5, 2, shape.hidden_size, generator=torch.Generator().manual_seed(0))
    for norm in NORMS_OF_LAYER:
        plain, inside = (norm_in(model.decoder.layers[1], norm) for model in (apart, fused))
        assert (plain.is_fused, plain.name) == (False, f"decoder.layers.1.{norm.name}")
        assert (inside.is_fused, inside.name) == (True, f"decoder.layers.1.{norm.linear}")
        assert torch.equal(inside.gamma(), plain.gamma())
        assert_close(inside.recomputed()(entering), plain.module(entering), rtol=1e-6, atol=1e-6)


def test_a_layer_without_a_norm_says_which_spec_has_one() -> None:
    layer = fuse_norms(build_gpt(TINY)).decoder.layers[3]
    del layer.mlp.linear_fc1.layer_norm_weight
    message = r"decoder.layers.3.mlp.linear_fc1 has no norm before it and none inside \(no layer_norm_weight\)"
    with pytest.raises(ValueError, match=message):
        norm_in(layer, NORMS_OF_LAYER[1]).recomputed()


def test_the_linears_that_read_an_axis_are_in_the_axis_table() -> None:
    known = set(parameter_names(TINY_EXPERTS))
    for layer, axes in ((1, ("head", "ffn")), (2, ("head", "shared_expert_ffn"))):
        assert all(f"decoder.layers.{layer}.{READERS[axis]}.weight" in known for axis in axes)
