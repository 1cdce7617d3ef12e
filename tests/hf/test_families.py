"""Every supported family, from a checkpoint that transformers saved to a pruned one that transformers loads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from minitron_nemo.hf.check import require_as_transformers_builds
from minitron_nemo.hf.checkpoint import load_hf, save_hf
from minitron_nemo.hf.config import hf_config, shape_from_config, weight_differences
from minitron_nemo.hf.folder import shape_from_hf
from minitron_nemo.parallel import Groups, all_gather_shards
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.shape import ModelShape
from support.hf import ATOL, LLAMA3_SCALING, TOKENS, hf_logits, hf_model, load_with_transformers, tensors_of
from support.megatron import bare_model, run_gpt
from support.ranks import Ranks

DIMS: dict[str, Any] = {
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,  # 9 x 8 = 72 is not the hidden size
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "initializer_range": 0.3}
QWEN3_EXPERTS = EXPERTS | {"num_experts": 6, "moe_intermediate_size": 20, "norm_topk_prob": True}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**DIMS),
    "llama scaled and tied": LlamaConfig(
        **DIMS, rope_scaling=LLAMA3_SCALING, rope_theta=500.0, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**DIMS, sliding_window=None),
    "nemotron": NemotronConfig(**DIMS | {"head_dim": 12}, norm_eps=1e-3),
    "nemotron biases": NemotronConfig(
        **DIMS | {"num_key_value_heads": 9}, attention_bias=True, mlp_bias=True, partial_rotary_factor=0.25
    ),
    "qwen2": Qwen2Config(**DIMS, rope_theta=1e6),
    "qwen2 tied": Qwen2Config(**DIMS | {"head_dim": 6}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**DIMS, rope_theta=1e6),
    "qwen3 tied": Qwen3Config(**DIMS, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**DIMS | EXPERTS, num_local_experts=6),
    "qwen3_moe": Qwen3MoeConfig(**DIMS | QWEN3_EXPERTS),
    "qwen3_moe mixed": Qwen3MoeConfig(**DIMS | QWEN3_EXPERTS | {"norm_topk_prob": False}, mlp_only_layers=[1]),
}

# ---- a plan, and the same cut by hand --------------------------------------------------------------------------------


def some(count: int, of: int, *rows: int, seed: int) -> Tensor:
    """[*rows, count] different indices below `of`, ascending: every row another choice."""
    draws = torch.rand(*rows, of, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(dim=-1)[..., :count].sort(dim=-1).values


def plan_for(source: ModelShape) -> PruningPlan:
    """Every axis cut, another way in each layer and expert; the first layer is dropped."""
    layers, kept = source.num_layers, list(range(1, source.num_layers))
    per_group, groups = source.heads_per_group, (source.num_query_groups - 1) // 2 * 2  # even: some tests split over tp
    group = some(groups, source.num_query_groups, layers, seed=1)
    slots = some(min(2, per_group), per_group, layers, groups, seed=2)
    head = (group.unsqueeze(-1) * per_group + slots).flatten(1)
    dims = {"hidden_size": 17, "num_attention_heads": head.shape[1], "num_query_groups": groups}
    axes: dict[str, Tensor] = {"hidden": some(17, 24, seed=3), "head": head, "group": group}
    if source.has_dense_layers:
        dims["ffn_hidden_size"] = 28
        axes["ffn"] = some(28, 40, layers, seed=4)
    if source.num_moe_experts is not None:
        neurons = source.moe_ffn_hidden_size or 0
        dims |= {"num_moe_experts": 4, "moe_ffn_hidden_size": 14}
        axes["expert"] = some(4, 6, layers, seed=5)
        axes["expert_ffn"] = some(14, neurons, layers, 6, seed=6)
    target = source.keeping_layers(kept).pruned_to(**dims)
    return PruningPlan(source=source, target=target, layer=torch.tensor(kept), **axes)


def cut_by_hand(full: dict[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    """A transformers state dict under the plan, with plain indexing of each tensor by its HF name."""
    hidden, d = plan.hidden.tolist(), plan.source.kv_channels

    def blocks(heads: Sequence[int]) -> list[int]:
        return [head * d + channel for head in heads for channel in range(d)]

    cut = {}
    for name, tensor in full.items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if not found:
            cut[name] = tensor[..., hidden]  # embedding, final norm, output layer
            continue
        layer, rest = int(found[1]), found[2]
        if layer not in plan.layer.tolist():
            continue
        place = f"model.layers.{plan.layer.tolist().index(layer)}."
        heads, groups = blocks(plan.head[layer].tolist()), blocks(plan.group[layer].tolist())
        ffn = plan.ffn[layer].tolist() if plan.ffn is not None else []
        if expert := re.search(r"experts\.(\d+)\.", rest):
            assert plan.expert is not None and plan.expert_ffn is not None
            kept = plan.expert[layer].tolist()
            if int(expert[1]) not in kept:
                continue
            rest = rest.replace(expert[0], f"experts.{kept.index(int(expert[1]))}.")
            ffn = plan.expert_ffn[layer, int(expert[1])].tolist()
        if re.search(r"[qk]_norm", rest):
            cut[place + rest] = tensor
        elif "layernorm" in rest:
            cut[place + rest] = tensor[hidden]
        elif rest.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            cut[place + rest] = tensor[hidden][:, heads if "o_proj" in rest else ffn]
        elif rest.endswith(("o_proj.bias", "down_proj.bias")):
            cut[place + rest] = tensor[hidden]
        else:
            if ".q_proj" in rest:
                rows = heads
            elif ".k_proj" in rest or ".v_proj" in rest:
                rows = groups
            elif rest.endswith(".gate.weight"):
                assert plan.expert is not None
                rows = plan.expert[layer].tolist()
            else:
                rows = ffn
            cut[place + rest] = tensor[rows][:, hidden] if rest.endswith("weight") else tensor[rows]
    return cut


# ---- the whole way ---------------------------------------------------------------------------------------------------


def logits_of(model: Any, groups: Groups) -> Tensor | None:
    """[b, s, 51] on the last stage: without the padded vocabulary."""
    with torch.no_grad():
        logits = run_gpt(model, TOKENS)
    return None if logits is None else torch.cat(all_gather_shards(logits, group=groups.tp), dim=-1)[..., :51]


def import_prune_export(source: Path, target: Path) -> tuple[Tensor | None, Tensor | None]:
    """On every rank: HF -> Megatron -> pruned -> HF; Megatron's logits before and after pruning."""
    shape, groups = shape_from_hf(source, make_vocab_size_divisible_by=4), Groups.from_megatron()
    plan = plan_for(shape)
    teacher, student = bare_model(shape).eval(), bare_model(plan.target).eval()
    load_hf(teacher, source, shape, groups)
    prune_into(teacher, student, plan, groups)
    save_hf(student, target, plan.target, groups, vocab_size=51)
    return logits_of(teacher, groups), logits_of(student, groups)


def require_the_pruned_model(source: Path, target: Path, logits: Tensor | None) -> None:
    """What transformers reads from `target` is `source` cut by hand, and computes Megatron's `logits`."""
    plan = plan_for(shape_from_hf(source, make_vocab_size_divisible_by=4))
    require_as_transformers_builds(target)
    written, expected = tensors_of(target), cut_by_hand(tensors_of(source), plan)
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name]), name
    assert not weight_differences(shape_from_hf(target), plan.target)
    if logits is not None:
        torch.testing.assert_close(hf_logits(load_with_transformers(target)), logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_is_imported_pruned_and_exported_to_the_same_logits(tmp_path: Path, name: str) -> None:
    original = hf_model(CONFIGS[name], tmp_path / "in")
    before, after = import_prune_export(tmp_path / "in", tmp_path / "out")
    torch.testing.assert_close(hf_logits(original), before, rtol=0, atol=ATOL)
    assert after is not None
    require_the_pruned_model(tmp_path / "in", tmp_path / "out", after)


@pytest.mark.parametrize("layout", ["dp2-ep2", "tp2-sp-ep2-etp1", "pp2"])
def test_experts_are_imported_pruned_and_exported_on_every_layout(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    config = Qwen3MoeConfig(
        **DIMS | QWEN3_EXPERTS | {"num_attention_heads": 12, "num_key_value_heads": 4}, mlp_only_layers=[1]
    )
    original = hf_model(config, tmp_path / "in")
    results = ranks(layout).run(import_prune_export, tmp_path / "in", tmp_path / "out")
    for before, after in results:
        if before is not None:
            torch.testing.assert_close(hf_logits(original), before, rtol=0, atol=ATOL)
            require_the_pruned_model(tmp_path / "in", tmp_path / "out", after)


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_familys_shape_survives_its_config_json(tmp_path: Path, name: str) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    shape = shape_from_hf(tmp_path)
    assert shape_from_config(hf_config(shape)) == shape


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nemotron", {"rope_scaling": LLAMA3_SCALING}, r"rope_scaling of a Nemotron is ignored by"),
        ("qwen3", {"attention_bias": True}, r"attention_bias=true is not supported for Qwen3"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, r"layer_types has 2 entries for num_hidden_layers=3"),
        ("qwen2", {"layer_types": ["full_attention", "mamba", "full_attention"]}, r"layer_types has mamba; supported"),
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}, r"mlp_only_layers names layers \[3\], but num_hidden_layers=3"),
        ("mixtral", {"num_experts_per_tok": 7}, r"moe_router_topk=7 must be between 1 and num_moe_experts=6"),
    ],
)
def test_a_config_that_cannot_be_represented_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        shape_from_config(config | changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen2",
            {"add_qkv_bias": False},
            r"add_qkv_bias=False has no place in a HF qwen2 checkpoint, which has .*True",
        ),
        ("llama", {"rotary_percent": 0.5}, r"rotary_percent=0\.5 has no place in a HF llama checkpoint"),
        ("mixtral", {"qk_layernorm": True}, r"qk_layernorm=True has no place in a HF mixtral checkpoint"),
        ("mixtral", {"moe_layer_freq": (1, 0, 1)}, r"moe_layer_freq=\(1, 0, 1\) has no place in a HF mixtral"),
        (
            "qwen3_moe",
            {"moe_shared_expert_intermediate_size": 8},
            r"moe_shared_expert_intermediate_size=8 has no place",
        ),
    ],
)
def test_a_shape_that_config_json_cannot_say_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_config(dataclasses.replace(shape_from_hf(tmp_path), **changes))


def test_a_window_that_no_layer_uses_is_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Qwen2Config(**DIMS, use_sliding_window=False, sliding_window=16).save_pretrained(tmp_path)
    shape_from_hf(tmp_path)
    assert "sliding_window" not in caplog.text
    Qwen2Config(**DIMS, use_sliding_window=True, sliding_window=16, max_window_layers=1).save_pretrained(tmp_path)
    shape_from_hf(tmp_path)
    assert "sliding_window=16 is ignored" in caplog.text


# ---- the last look ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saved_is_what_transformers_builds(tmp_path: Path, name: str) -> None:
    hf_model(CONFIGS[name], tmp_path, max_shard_size="40KB")
    require_as_transformers_builds(tmp_path)


def test_a_tensor_that_config_json_does_not_call_for_is_named(tmp_path: Path) -> None:
    hf_model(CONFIGS["qwen2 tied"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wrong = dict(tensors)
    wrong["model.norm.bias"] = wrong.pop("model.norm.weight")
    wrong["model.layers.2.mlp.down_proj.weight"] = torch.zeros(24, 41)
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"model\.norm\.weight is missing; model\.norm\.bias is not a parameter of the model; "
        r"model\.layers\.2\.mlp\.down_proj\.weight has shape \[24, 41\] where config\.json makes it \[24, 40\]\.",
    ):
        require_as_transformers_builds(tmp_path)
