"""What a rank is reckoned to hold is what Megatron-core's own model has there, to the parameter."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from minitron_nemo.config.trainer import Layout
from minitron_nemo.published import PUBLISHED
from minitron_nemo.shape import ModelShape
from minitron_nemo.sizing.parts import Part
from support.door import environment
from support.patience import run_patiently

ODD = ModelShape(
    family="qwen2",
    num_layers=7,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=6,
    padded_vocab_size=52,
    add_qkv_bias=True,
    share_embeddings_and_output_weights=True,
)
EXPERTS: dict[str, Any] = {
    "family": "qwen3_moe",
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 12,
    "moe_router_topk": 2,
    "qk_layernorm": True,
    "add_qkv_bias": False,
    "share_embeddings_and_output_weights": False,
}
MIXED = ModelShape(**{**ODD.to_dict(), **EXPERTS, "moe_layer_freq": (0, 1, 1, 0, 1, 0, 0)})
SHARED = ModelShape(**{**ODD.to_dict(), **EXPERTS, "moe_shared_expert_intermediate_size": 20})

CASES: dict[str, tuple[ModelShape, dict[str, Any], int]] = {
    "Llama-3.1-8B on TP 4 x PP 2": (
        PUBLISHED["Llama-3.1-8B"],
        {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
        32,
    ),
    "Nemotron-4 15B on TP 8": (PUBLISHED["Nemotron-4 15B"], {"tensor_model_parallel_size": 8}, 16),
    "Qwen3-8B on PP 8, 36 layers": (PUBLISHED["Qwen3-8B"], {"pipeline_model_parallel_size": 8}, 8),
    "tied with biases, 7 layers on PP 3": (
        ODD,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3},
        12,
    ),
    "tied on one stage": (ODD, {"tensor_model_parallel_size": 4}, 4),
    "experts in some layers on EP 4": (
        MIXED,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 4,
            "sequence_parallel": True,
        },
        16,
    ),
    "experts in all layers beside one that sees every token": (SHARED, {"expert_model_parallel_size": 2}, 4),
}


@pytest.fixture(scope="module")
def on_meta() -> dict[str, list[dict[str, int]]]:
    """Of each case, what Megatron's model has on a rank of each pipeline stage."""
    asked = []
    for shape, layout, world in CASES.values():
        stages = Layout(**layout).pipeline_model_parallel_size
        ranks = [stage * world // stages for stage in range(stages)]  # stages are the outermost of Megatron's ranks
        asked.append({"shape": shape.to_dict(), "layout": layout, "world": world, "ranks": ranks})
    command = [sys.executable, "-m", "support.meta_ranks", json.dumps(asked)]
    done = run_patiently(command, env=environment(), stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_as_many_parameters_as_megatrons_own_model_has_there(
    on_meta: dict[str, list[dict[str, int]]], case: str
) -> None:
    shape, layout, _ = CASES[case]
    for stage, found in enumerate(on_meta[case]):
        part = Part(shape, Layout(**layout), stage)
        assert found["stage"] == stage
        assert (part.num_held_parameters, part.num_expert_parameters) == (found["parameters"], found["of_experts"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_rank_alone_holds_the_whole_model(name: str) -> None:
    assert Part(PUBLISHED[name], Layout(), 0).num_held_parameters == PUBLISHED[name].num_parameters
