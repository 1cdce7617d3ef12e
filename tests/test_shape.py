"""ModelShape: the published models' exact counts, and the counts of real Megatron-core models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minitron_nemo.shape import ModelShape
from support.megatron import TINY, bare_model, start_alone

LLAMA_3_1_8B = ModelShape(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    padded_vocab_size=128256,
    rotary_base=500000.0,
)
MISTRAL_NEMO_12B = dataclasses.replace(
    LLAMA_3_1_8B, family="mistral", num_layers=40, hidden_size=5120, padded_vocab_size=131072, rotary_base=1e6
)
NEMOTRON_4_15B = ModelShape(
    family="nemotron",
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    padded_vocab_size=256000,
    normalization="LayerNorm1p",
    activation="squared_relu",
    gated_linear_unit=False,
    rotary_percent=0.5,
)

PUBLISHED = {  # name: shape, all parameters, those that are not embeddings
    "Llama-3.1-8B": (LLAMA_3_1_8B, 8_030_261_248, 6_979_588_096),
    "Llama-3.1-Minitron-4B-Width": (
        LLAMA_3_1_8B.pruned_to(hidden_size=3072, ffn_hidden_size=9216),
        4_512_746_496,
        3_724_741_632,
    ),
    "Llama-3.1-Minitron-4B-Depth": (LLAMA_3_1_8B.pruned_to(num_layers=16), 4_540_469_248, 3_489_796_096),
    "Mistral-NeMo-12B": (MISTRAL_NEMO_12B, 12_247_782_400, 10_905_605_120),
    "MN-Minitron-8B": (
        MISTRAL_NEMO_12B.pruned_to(hidden_size=4096, ffn_hidden_size=11520),
        8_414_105_600,
        7_340_363_776,
    ),
    "Nemotron-4 15B": (NEMOTRON_4_15B, 15_628_775_424, 12_483_047_424),
    "Minitron 8B": (
        NEMOTRON_4_15B.pruned_to(hidden_size=4096, ffn_hidden_size=16384),
        8_271_699_968,
        6_174_547_968,
    ),
    "Minitron 4B": (
        NEMOTRON_4_15B.pruned_to(hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=24),
        4_190_509_056,
        2_617_645_056,
    ),
}

VARIANTS = {  # what else a shape can say, in small
    "tied": {"share_embeddings_and_output_weights": True},
    "biases": {"add_bias_linear": True},
    "qkv bias only": {"add_qkv_bias": True},
    "q/k norms": {"qk_layernorm": True},
    "q/k norms with biases": {"qk_layernorm": True, "normalization": "LayerNorm"},
    "one query group": {"num_query_groups": 1},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_models_are_exact(name: str) -> None:
    shape, total, non_embedding = PUBLISHED[name]
    assert shape.num_parameters == total
    assert shape.num_non_embedding_parameters == non_embedding


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_real_megatron_model_at_full_size(name: str) -> None:
    shape, _, _ = PUBLISHED[name]
    start_alone()
    with torch.device("meta"):
        model = bare_model(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_real_megatron_model_of_every_variant(variant: str) -> None:
    shape = dataclasses.replace(TINY, **VARIANTS[variant])
    model = bare_model(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters


def test_flops_count_two_per_weight_and_half_the_attention_square() -> None:
    weights = TINY.num_layers * (80 * 24 + 24 * 48 + 3 * 40 * 24) + 66 * 24  # qkv, projection, gate, up, down; output
    attention = TINY.num_layers * 2 * 6 * 8 * 10 / 2  # QK^T and AV, 6 heads of 8 channels, 10 tokens, causal
    assert TINY.flops_per_token(10) == 2 * (weights + attention)
    assert TINY.flops_per_token(10, training=True) == 3 * TINY.flops_per_token(10)


def test_key_value_cache_holds_two_values_per_group_channel_and_layer() -> None:
    assert LLAMA_3_1_8B.kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2


def test_heads_that_do_not_fill_their_groups_name_the_groups_that_work() -> None:
    with pytest.raises(
        ValueError, match=r"num_attention_heads=24 .* num_query_groups=7.* 1, 2, 3, 4, 6, 8, 12, 24;.* 21, 28\."
    ):
        dataclasses.replace(TINY, num_attention_heads=24, num_query_groups=7)


def test_a_target_larger_than_its_source_is_refused_with_the_limit() -> None:
    with pytest.raises(ValueError, match=r"target\.ffn_hidden_size=41 is larger .*ffn_hidden_size=40.* at most 40"):
        TINY.pruned_to(ffn_hidden_size=41)


def test_an_unknown_target_dim_suggests_the_known_one() -> None:
    with pytest.raises(ValueError, match=r"target\.ffn_hidden is not a prunable dim; did you mean ffn_hidden_size\?"):
        TINY.pruned_to(ffn_hidden=8)


def test_a_dim_that_does_not_split_names_the_nearest_that_do() -> None:
    shape = dataclasses.replace(TINY, ffn_hidden_size=41)
    with pytest.raises(ValueError, match=r"ffn_hidden_size=41 cannot be split .*=2\. Nearest that can: 40, 42"):
        shape.require_splits_over(2)


def test_a_shape_survives_its_dict_and_refuses_foreign_fields() -> None:
    assert ModelShape.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ValueError, match=r"hidden is not a field of ModelShape; did you mean hidden_size\?"):
        ModelShape.from_dict(TINY.to_dict() | {"hidden": 24})
