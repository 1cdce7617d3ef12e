"""ModelShape: the published models' exact counts, and the counts of real Megatron-core models."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from minitron_nemo.published import PUBLISHED
from minitron_nemo.shape import ModelShape
from support.megatron import TINY, TINY_EXPERTS, bare_model, start_alone

LLAMA_3_1_8B = PUBLISHED["Llama-3.1-8B"]
MIXTRAL_8X7B = PUBLISHED["Mixtral-8x7B"]
QWEN3_30B_A3B = ModelShape(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_query_groups=4,
    kv_channels=128,
    padded_vocab_size=151936,
    qk_layernorm=True,
    num_moe_experts=128,
    moe_ffn_hidden_size=768,
    moe_router_topk=8,
)

COUNTS = {  # all parameters, those that are not embeddings
    "Llama-3.1-8B": (8_030_261_248, 6_979_588_096),
    "Llama-3.1-Minitron-4B-Width": (4_512_746_496, 3_724_741_632),
    "Llama-3.1-Minitron-4B-Depth": (4_540_469_248, 3_489_796_096),
    "Mistral-NeMo-12B": (12_247_782_400, 10_905_605_120),
    "MN-Minitron-8B": (8_414_105_600, 7_340_363_776),
    "Nemotron-4 15B": (15_628_775_424, 12_483_047_424),
    "Minitron 8B": (8_271_699_968, 6_174_547_968),
    "Minitron 4B": (4_190_509_056, 2_617_645_056),
    "Qwen3-8B": (8_190_735_360, 6_946_075_648),
    "Mixtral-8x7B": (46_702_792_704, 46_440_648_704),
}
VARIANTS = {  # what else a shape can say, in small
    "tied": {"share_embeddings_and_output_weights": True},
    "biases": {"add_bias_linear": True},
    "qkv bias only": {"add_qkv_bias": True},
    "q/k norms": {"qk_layernorm": True},
    "q/k norms with biases": {"qk_layernorm": True, "normalization": "LayerNorm"},
    "one query group": {"num_query_groups": 1},
    "experts": {"num_moe_experts": 4, "moe_ffn_hidden_size": 20, "moe_router_topk": 2},
    "experts in some layers": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_layer_freq": (0, 1, 0, 1),
        "moe_shared_expert_intermediate_size": 12,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_models_are_exact(name: str) -> None:
    shape = PUBLISHED[name]
    assert (shape.num_parameters, shape.num_non_embedding_parameters) == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_real_megatron_model_at_full_size(name: str) -> None:
    shape = PUBLISHED[name]
    start_alone()
    with torch.device("meta"):
        model = bare_model(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_real_megatron_model_of_every_variant(variant: str) -> None:
    shape = dataclasses.replace(TINY, **VARIANTS[variant])
    model = bare_model(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters


@pytest.mark.parametrize(
    ("shape", "total", "active"),
    [(MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248), (QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704)],
    ids=["Mixtral-8x7B", "Qwen3-30B-A3B"],
)
def test_active_parameters_are_those_one_token_meets(shape: ModelShape, total: int, active: int) -> None:
    assert (shape.num_parameters, shape.num_active_parameters) == (total, active)
    assert LLAMA_3_1_8B.num_active_parameters == LLAMA_3_1_8B.num_parameters


def test_flops_count_two_per_weight_and_half_the_attention_square() -> None:
    weights = TINY.num_layers * (80 * 24 + 24 * 48 + 3 * 40 * 24) + 66 * 24  # qkv, projection, gate, up, down; output
    attention = TINY.num_layers * 2 * 6 * 8 * 10 / 2  # QK^T and AV, 6 heads of 8 channels, 10 tokens, causal
    assert TINY.flops_per_token(10) == 2 * (weights + attention)
    assert TINY.flops_per_token(10, training=True) == 3 * TINY.flops_per_token(10)


def test_flops_count_the_experts_a_token_is_routed_to() -> None:
    attention = 3 * (80 * 24 + 24 * 48 + 6 * 8 * 10)  # qkv, projection, half a square of 10 tokens, in three layers
    expert_layer = 4 * 24 + 2 * 3 * 20 * 24 + 3 * 12 * 24  # router, two experts, the shared one
    dense_layer = 3 * 40 * 24
    assert TINY_EXPERTS.flops_per_token(10) == 2 * (attention + 2 * expert_layer + dense_layer + 66 * 24)


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


def test_every_stage_needs_a_layer_but_not_equally_many() -> None:
    TINY.require_splits_over(1, 3)
    with pytest.raises(
        ValueError, match=r"num_layers=4 cannot be split over .*size=5: each stage needs a layer.*most 4"
    ):
        TINY.require_splits_over(1, 5)


# ---- experts ---------------------------------------------------------------------------------------------------------


def test_what_is_absent_is_resolved_before_pruning_changes_it() -> None:
    """None for the size of an expert means the dense size, at construction and no later."""
    shape = dataclasses.replace(TINY, num_moe_experts=4, moe_router_topk=2, moe_layer_freq=(0, 1, 0, 1))
    assert shape.moe_ffn_hidden_size == 40
    assert shape.pruned_to(ffn_hidden_size=32).moe_ffn_hidden_size == 40
    assert dataclasses.replace(shape, moe_layer_freq=(1, 1, 1, 1)).moe_layer_freq is None


def test_a_model_has_only_its_own_prunable_dims() -> None:
    assert not [dim for dim in TINY.prunable_dims if "moe" in dim]
    everywhere = dataclasses.replace(TINY, num_moe_experts=4, moe_router_topk=2)
    assert "ffn_hidden_size" not in everywhere.prunable_dims
    assert "ffn_hidden_size" in TINY_EXPERTS.prunable_dims
    with pytest.raises(ValueError, match=r"target\.num_moe_experts=2 is a dim this llama model does not have"):
        TINY.pruned_to(num_moe_experts=2)
    with pytest.raises(ValueError, match=r"target\.moe_shared_expert_intermediate_size=2 is a dim .* does not have"):
        everywhere.pruned_to(moe_shared_expert_intermediate_size=2)


def test_layers_take_along_what_is_said_layer_by_layer() -> None:
    kept = TINY_EXPERTS.keeping_layers([1, 2])
    assert (kept.num_layers, kept.moe_layer_freq) == (2, (0, 1))
    assert [kept.has_experts(layer) for layer in range(2)] == [False, True]
    with pytest.raises(ValueError, match=r"target\.num_layers=2 does not say which of the dense and expert layers"):
        TINY_EXPERTS.pruned_to(num_layers=2)
    assert TINY.keeping_layers([0, 3]) == TINY.pruned_to(num_layers=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_topk": 5}, r"moe_router_topk=5 must be between 1 and num_moe_experts=4.*Keep at least 5 experts"),
        ({"moe_router_topk": 1}, r"moe_router_topk=1 with weights normalised over one expert"),
        ({"moe_layer_freq": (1, 0)}, r"moe_layer_freq=\[1, 0\] must have one entry.*num_layers=3"),
        ({"moe_layer_freq": (0, 0, 0)}, r"at least one 1"),
        ({"num_moe_experts": None}, r"moe_ffn_hidden_size, .* is set, but num_moe_experts is not"),
        ({"add_bias_linear": True}, r"add_bias_linear=true is not supported in a model with experts"),
        ({"moe_ffn_hidden_size": 0}, r"moe_ffn_hidden_size=0 must be a whole number"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY_EXPERTS, **changes)


def test_experts_that_do_not_split_are_refused_with_what_does() -> None:
    TINY_EXPERTS.require_splits_over(2, 2, 2)
    with pytest.raises(
        ValueError, match=r"num_moe_experts=4 cannot be split over trainer\.expert_model_parallel_size=3"
    ):
        TINY_EXPERTS.require_splits_over(1, 1, 3)
    with pytest.raises(ValueError, match=r"expert_model_parallel_size=2 spreads experts, and this model has none"):
        TINY.require_splits_over(1, 1, 2)
    with pytest.raises(ValueError, match=r"moe_ffn_hidden_size=21 cannot be split over trainer\.tensor"):
        dataclasses.replace(TINY_EXPERTS, moe_ffn_hidden_size=21).require_splits_over(2)


def test_a_shape_with_experts_survives_json() -> None:
    assert ModelShape.from_dict(json.loads(json.dumps(TINY_EXPERTS.to_dict()))) == TINY_EXPERTS
