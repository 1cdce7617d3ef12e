"""Targets: dims, fractions and budgets become a shape."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

from minitron_nemo.config.pruning import BudgetConfig
from minitron_nemo.pruning.targets import memory_bytes, resolve_target
from minitron_nemo.shape import ModelShape

LLAMA_8B = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256)
MISTRAL_8B = dataclasses.replace(LLAMA_8B, family="mistral")
MISTRAL_12B = ModelShape("mistral", 40, 5120, 14336, 32, 8, 128, 131072)
NEMOTRON_15B = ModelShape(
    "nemotron",
    32,
    6144,
    24576,
    48,
    8,
    128,
    256000,
    normalization="LayerNorm1p",
    activation="squared_relu",
    gated_linear_unit=False,
)


def resolve(source: ModelShape = LLAMA_8B, **given: Any) -> ModelShape:
    values = {"target": {}, "keep": {}, "multiple_of": {}} | given
    return resolve_target(source, **values | {"budget": BudgetConfig(**given.get("budget", {}))})


@pytest.mark.parametrize(
    ("source", "budget", "expected"),
    [
        # arXiv:2408.11796, table of architectures
        (LLAMA_8B, {"parameters": "4.5B", "dims": {"hidden_size": 1, "ffn_hidden_size": 1.5}}, (32, 3072, 9216, 32)),
        (
            LLAMA_8B,
            {"non_embedding_parameters": "3.7B", "dims": {"hidden_size": 1, "ffn_hidden_size": 1.5}},
            (32, 3072, 9216, 32),
        ),
        (LLAMA_8B, {"parameters": "4.5B", "dims": {"num_layers": 1}}, (16, 4096, 14336, 32)),
        (MISTRAL_12B, {"parameters": "8.4B"}, (40, 4096, 11520, 32)),
        # arXiv:2407.14679, the family made from Nemotron-4 15B
        (NEMOTRON_15B, {"parameters": "8.27B", "tolerance": 0.001}, (32, 4096, 16384, 48)),
        (
            NEMOTRON_15B,
            {"parameters": "4.19B", "dims": {"hidden_size": 1, "ffn_hidden_size": 1.4, "num_attention_heads": 1}},
            (32, 3072, 9216, 24),
        ),
    ],
)
def test_the_papers_budgets_resolve_to_the_papers_shapes(
    source: ModelShape, budget: dict[str, Any], expected: tuple[int, ...]
) -> None:
    shape = resolve(source, budget=budget)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads) == expected


@pytest.mark.parametrize(
    ("budget", "cost", "limit"),
    [
        ({"parameters": "5B", "tolerance": 0.0}, lambda s: s.num_parameters, 5e9),
        ({"non_embedding_parameters": "3e9", "tolerance": 0.0}, lambda s: s.num_non_embedding_parameters, 3e9),
        ({"flops_per_token": "9G", "seq_length": 8192, "tolerance": 0.0}, lambda s: s.flops_per_token(8192), 9e9),
        (
            {"memory": "12GiB", "seq_length": 8192, "batch_size": 4},
            lambda s: memory_bytes(s, batch_size=4, seq_length=8192),
            12 * 2**30,
        ),
    ],
)
def test_every_budget_is_met_and_no_step_is_left_that_would_still_fit(
    budget: dict[str, Any], cost: Any, limit: float
) -> None:
    shape = resolve(budget=budget)
    assert cost(shape) <= limit
    for dim in ("hidden_size", "ffn_hidden_size"):
        larger = LLAMA_8B.pruned_to(
            **{name: getattr(shape, name) for name in ("hidden_size", "ffn_hidden_size")}
            | {dim: getattr(shape, dim) + 256}
        )
        assert cost(larger) > limit


@pytest.mark.parametrize("share", [0.65, 0.75, 0.85])
def test_a_budget_is_spent_where_few_hidden_sizes_open(share: float) -> None:
    """SmolLM2-135M: of 576 channels in 9 heads only 288 is a multiple of 32 that opens."""
    smol = ModelShape(
        "llama", 30, 576, 1536, 9, 3, 64, padded_vocab_size=49152, seq_length=8192,
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    shape = resolve(smol, budget={"parameters": str(round(share * smol.num_parameters))})
    assert 0.97 < shape.num_parameters / (share * smol.num_parameters) <= 1.01
    assert shape.hidden_size % 9 == 0 and 288 < shape.hidden_size < 576 and shape.ffn_hidden_size < 1536 * 1.01


def test_memory_is_weights_and_key_value_cache() -> None:
    cache = 2 * 3 * 1000 * 32 * 8 * 128 * 2  # batch, tokens, layers, groups, channels, key and value, bytes
    assert memory_bytes(LLAMA_8B, batch_size=3, seq_length=1000) == 2 * 8_030_261_248 + cache


def test_explicit_dims_stand_and_the_budget_resolves_the_rest() -> None:
    shape = resolve(target={"hidden_size": 3072}, keep={"num_layers": 0.75}, budget={"parameters": "3.5B"})
    assert (shape.hidden_size, shape.num_layers) == (3072, 24)
    assert shape.ffn_hidden_size % 256 == 0 and shape.num_parameters <= 3.5e9 * 1.01


def test_fractions_keep_heads_in_their_groups() -> None:
    """Four groups of at most the four heads they had."""
    shape = resolve(keep={"num_attention_heads": 0.7, "num_query_groups": 0.5})
    assert (shape.num_attention_heads, shape.num_query_groups) == (16, 4)


@pytest.mark.parametrize(
    ("share", "multiple_of", "expected"),
    [
        (0.7, {}, 2880),  # 2867.2 of 4096
        (0.5, {}, 2048),
        (0.7, {"hidden_size": 1}, None),
        (0.7, {"hidden_size": 256}, 2816),
        (1.0, {}, 4096),
    ],
)
def test_shares_of_wide_dims_become_multiples_that_hardware_likes(
    share: float, multiple_of: dict[str, int], expected: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    shape = resolve(MISTRAL_8B, keep={"hidden_size": share}, multiple_of=multiple_of)
    assert shape.hidden_size == (expected or 2867)
    said = f"hidden_size=2,867 becomes {shape.hidden_size:,}, a multiple of {multiple_of.get('hidden_size', 64)}."
    assert (said in caplog.text) is (shape.hidden_size in (2880, 2816))


def test_shares_of_a_small_model_become_multiples_of_the_power_of_two_it_has() -> None:
    small = ModelShape("mistral", 4, 48, 90, 6, 2, 8, 512)
    shape = resolve(small, keep={"hidden_size": 0.7, "ffn_hidden_size": 0.5})
    assert (shape.hidden_size, shape.ffn_hidden_size) == (32, 44)  # of 16 and of 2; 33.6 and 45
    assert resolve(small, target={"hidden_size": 33}).hidden_size == 33


@pytest.mark.parametrize(
    "given",
    [
        {"keep": {"num_attention_heads": 0.75}},  # 24 heads
        {"keep": {"hidden_size": 0.72}, "target": {"num_attention_heads": 24}},
        {"keep": {"hidden_size": 0.6, "num_attention_heads": 0.8}},
        {"keep": {"hidden_size": 0.31}, "multiple_of": {"hidden_size": 100}},
        {"budget": {"parameters": "3.4B", "dims": {"hidden_size": 1, "num_attention_heads": 1}}},
        {"budget": {"parameters": "3.4B"}, "target": {"num_attention_heads": 24}},
        {"budget": {"parameters": "7.7B", "dims": {"num_attention_heads": 1}}},
    ],
)
def test_what_keep_and_budget_choose_is_a_shape_that_its_family_opens(given: dict[str, Any]) -> None:
    shape = resolve(**given)
    assert shape.hidden_size % shape.num_attention_heads == 0
    assert shape != LLAMA_8B and shape.hidden_size % given.get("multiple_of", {}).get("hidden_size", 64) == 0
    other = resolve(MISTRAL_8B, **given)
    assert other.hidden_size % other.num_attention_heads  # and one that opens anyhow is left as it was asked for


def test_rounding_to_a_multiple_says_what_it_cost(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        shape = resolve(target={"ffn_hidden_size": 9217}, multiple_of={"ffn_hidden_size": 256})
    assert shape.ffn_hidden_size == 9216
    assert "ffn_hidden_size=9,217 becomes 9,216, a multiple of 256" in caplog.text
    assert "from 6,017,388,544 to 6,016,995,328 parameters (-0.01%)" in caplog.text


def test_a_budget_that_the_model_meets_changes_nothing() -> None:
    assert resolve(budget={"parameters": "9B"}) == LLAMA_8B


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": {"parameters": "plenty"}}, "budget.parameters=plenty is not a number above 0"),
        ({"budget": {"parameters": "1M"}}, "cannot be met by shrinking hidden_size, ffn_hidden_size: even"),
        (
            {"budget": {"parameters": "4B", "memory": "8GiB"}},
            "parameters and memory; one model cannot be fitted to two",
        ),
        ({"budget": {"parameters": "4B", "dims": {"hiden_size": 1}}}, "did you mean hidden_size"),
        ({"budget": {"parameters": "4B", "dims": {"num_query_groups": 1}}}, "Set target.num_query_groups"),
        ({"budget": {"parameters": "4B", "dims": {"num_moe_experts": 1}}}, "llama model does not have it"),
        ({"budget": {"parameters": "4B", "dims": {"hidden_size": 0}}}, "budget.dims.hidden_size=0 must be above 0"),
        ({"budget": {"parameters": "4B", "tolerance": 2}}, "budget.tolerance=2 must be at least 0 and below 1"),
        (
            {"target": {"hidden_size": 2048, "ffn_hidden_size": 2048}, "budget": {"parameters": "1B"}},
            "budget.parameters has no dim left to shrink",
        ),
        ({"keep": {"hidden_size": 1.5}}, "keep.hidden_size=1.5 must be above 0 and at most 1"),
        ({"keep": {"hidden": 0.5}}, "keep.hidden is not a prunable dim; did you mean hidden_size"),
        ({"keep": {"hidden_size": 0.5}, "target": {"hidden_size": 64}}, "hidden_size stands in target and in keep"),
        ({"multiple_of": {"ffn_hidden_size": 20000}}, "multiple_of.ffn_hidden_size=20000 must be between 1 and"),
    ],
)
def test_what_cannot_be_resolved_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(**given)
    assert words in str(caught.value)
