"""From a shape to NeMo's model of its family, which trains, and whose core is scored and pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from nemo.collections import llm

from minitron_nemo import platform
from minitron_nemo.attention import FusedCausalAttention
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.config.trainer import Layout
from minitron_nemo.layer_spec import PlainNorm
from minitron_nemo.nemo.context import shape_from_context, write_context
from minitron_nemo.nemo.models import (
    CrossEntropyGPTModel,
    build_core,
    meta_core,
    nemo_config,
    new_core,
    plain_nemo_model,
    to_be_loaded,
)
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance, prune_into
from minitron_nemo.published import PUBLISHED
from minitron_nemo.runtime.forward import estimate_importance
from minitron_nemo.runtime.model_artifact import CONTEXT, TOKENIZER
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer import train_tokenizer
from minitron_nemo.weights import load_full_parameters, stream_full_parameters
from support.megatron import TINY, TINY_EXPERTS, build_gpt, random_parameter, run_gpt, smaller, start_alone
from support.ranks import Ranks

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4]])
SHAPES = {
    "llama": TINY,
    "llama tied": smaller(TINY, share_embeddings_and_output_weights=True),
    "llama biases": smaller(TINY, add_bias_linear=True, add_qkv_bias=True),
    "llama scaled": smaller(
        TINY,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": smaller(TINY, family="mistral", layernorm_epsilon=1e-3),
    "nemotron": smaller(
        TINY,
        family="nemotron",
        normalization="LayerNorm1p",
        activation="squared_relu",
        gated_linear_unit=False,
        rotary_percent=0.5,
    ),
    "qwen2": smaller(TINY, family="qwen2", add_qkv_bias=True, rotary_base=1e6),
    "qwen3": smaller(TINY, family="qwen3", qk_layernorm=True, rotary_base=1e6),
    "mixtral": smaller(
        TINY, family="mixtral", num_layers=2, num_moe_experts=4, moe_ffn_hidden_size=20, moe_router_topk=2
    ),
    "qwen3_moe": smaller(TINY_EXPERTS, qk_layernorm=True, moe_router_pre_softmax=True),
}
LLAMA_31_8B = PUBLISHED["Llama-3.1-8B"]


@pytest.fixture(autouse=True)
def _alone() -> None:
    start_alone()


def built(shape: ModelShape) -> CrossEntropyGPTModel:
    """A model with the weights that `build_gpt` gives this shape."""
    model = CrossEntropyGPTModel(shape)
    model.configure_model()
    load_full_parameters(model.core, shape, Groups.from_megatron(), lambda name: random_parameter(name, shape))
    return model


def scored(core: GPTModel, shape: ModelShape) -> Importance:
    return estimate_importance(core, shape, calibration(), ImportanceConfig(num_samples=6))


def pruned(teacher: GPTModel, plan: PruningPlan) -> GPTModel:
    student = new_core(plan.target, Layout(), torch.float32)
    prune_into(teacher, student, plan, Groups.from_megatron())
    return student


def calibration(batches: int = 3) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(batches):
        tokens = torch.randint(0, 66, (2, 9), generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, 8),
            "position_ids": torch.arange(8).repeat(2, 1),
        }


@pytest.mark.parametrize("name", SHAPES)
def test_nemo_builds_as_many_parameters_as_the_shape_counts(name: str) -> None:
    model = built(SHAPES[name])
    assert sum(parameter.numel() for parameter in model.module.parameters()) == SHAPES[name].num_parameters


def test_a_published_size_is_built_without_memory_on_the_meta_device() -> None:
    core = meta_core(LLAMA_31_8B)
    assert {parameter.device.type for parameter in core.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in core.parameters()) == LLAMA_31_8B.num_parameters == 8_030_261_248


@pytest.mark.parametrize("name", SHAPES)
def test_nemos_config_of_the_family_computes_what_the_shape_says(name: str) -> None:
    """Reference: Megatron-core's GPTModel from the shape's own fields, with the same weights."""
    with torch.no_grad():
        found, expected = run_gpt(built(SHAPES[name]).core.eval(), TOKENS), run_gpt(build_gpt(SHAPES[name]), TOKENS)
    assert found is not None and expected is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("llama", llm.LlamaModel),
        ("mistral", llm.MistralModel),
        ("nemotron", llm.NemotronModel),
        ("qwen2", llm.Qwen2Model),
        ("qwen3", llm.Qwen3Model),
        ("mixtral", llm.MixtralModel),
        ("qwen3_moe", llm.Qwen3Model),
    ],
)
def test_a_checkpoint_names_nemos_own_class(family: str, model_class: type) -> None:
    assert type(plain_nemo_model(SHAPES[family], tokenizer=None)) is model_class


class StandIns(LocalSpecProvider):
    """Megatron-core's own modules where transformer-engine has those that it asks for by name."""

    def column_parallel_layer_norm_linear(self) -> type:
        return ColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return PlainNorm


@pytest.fixture
def as_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of a machine with transformer-engine."""
    from megatron.core.models.gpt import gpt_layer_specs
    from nemo.collections.llm.gpt.model import base

    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(base, "HAVE_TE", True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", StandIns, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", PlainNorm, raising=False)


@pytest.mark.usefixtures("as_with_transformer_engine")
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "llama"])
def test_transformer_engines_experts_stand_in_the_layers_that_have_them(name: str) -> None:
    shape, unfused = SHAPES[name], platform.transformer_config_overrides(plain=True)
    if shape.num_moe_experts is not None:
        unfused |= {"moe_grouped_gemm": False, "moe_permute_fusion": False}
    core = nemo_config(shape, init_model_with_meta_device=True, **unfused).configure_model(None)
    found = [isinstance(layer.mlp, MoELayer) for layer in core.decoder.layers]
    assert found == [shape.has_experts(layer) for layer in range(shape.num_layers)]


@pytest.mark.usefixtures("as_with_transformer_engine")
def test_a_plain_core_has_torchs_modules_whatever_is_installed() -> None:
    shape = SHAPES["qwen3_moe"]
    core = new_core(shape, Layout(), torch.float32, plain=True)
    config = core.config
    assert not config.moe_grouped_gemm and not config.moe_permute_fusion and not config.gradient_accumulation_fusion
    assert config.moe_router_dtype == "fp64"  # else Megatron-core's router asks transformer-engine for its products
    norms = [module for name, module in core.named_modules() if name.endswith("norm")]
    norms = [norm for norm in norms if not isinstance(norm, IdentityOp)]
    assert len(norms) == 1 + 4 * shape.num_layers and all(isinstance(norm, PlainNorm) for norm in norms)
    attentions = [module for name, module in core.named_modules() if name.endswith("core_attention")]
    assert len(attentions) == shape.num_layers
    assert all(isinstance(attention, FusedCausalAttention) for attention in attentions)


def test_a_checkpoint_of_experts_beside_dense_layers_names_a_spec_that_knows_which(tmp_path: Path) -> None:
    train_tokenizer(
        ["def read(path):\n    return open(path).read()\n"] * 9, vocab_size=281, output=tmp_path / TOKENIZER
    )
    shape = smaller(SHAPES["qwen3_moe"], padded_vocab_size=281)
    write_context(shape, tmp_path)
    written = tmp_path / CONTEXT / "model.yaml"
    assert "get_gpt_decoder_block_spec" in written.read_text()
    assert shape_from_context(written) == shape


def test_a_checkpoint_of_a_scaled_mistral_names_the_class_that_scales() -> None:
    """NeMo's MistralConfig7B has no fields for it: plain NeMo would load a model with other frequencies."""
    shape = dataclasses.replace(SHAPES["llama scaled"], family="mistral")
    model = plain_nemo_model(shape, tokenizer=None)
    assert type(model) is llm.LlamaModel
    assert (model.config.scale_factor, model.config.old_context_len) == (4.0, 16)


@pytest.mark.parametrize("name", ["llama tied", "nemotron", "qwen2", "qwen3"])
def test_a_model_is_scored_and_pruned_to_the_planned_shape(name: str) -> None:
    shape = SHAPES[name]
    model = built(shape)
    before = {n: tensor.clone() for n, tensor in stream_full_parameters(model.core, shape, Groups.from_megatron())}
    importance = scored(model.core, shape)
    assert importance.num_samples == 6
    target = shape.pruned_to(hidden_size=16, ffn_hidden_size=26, num_attention_heads=4)
    plan = plan_from_importance(importance, shape, target)

    student = pruned(model.core, plan)

    assert sum(parameter.numel() for parameter in student.parameters()) == target.num_parameters
    kept = plan.hidden
    embedding = before["embedding.word_embeddings.weight"][:, kept]
    assert torch.equal(student.embedding.word_embeddings.weight.detach(), embedding)
    for n, tensor in stream_full_parameters(model.core, shape, Groups.from_megatron()):
        assert torch.equal(tensor, before[n]), f"pruning changed the teacher's {n}"
    with torch.no_grad():
        logits = run_gpt(student, TOKENS)
    assert logits is not None and logits.isfinite().all()


def test_a_pruned_model_can_be_pruned_again() -> None:
    first = built(TINY).core
    half = TINY.pruned_to(ffn_hidden_size=20)
    second = pruned(first, plan_from_importance(scored(first, TINY), TINY, half))
    quarter = half.pruned_to(ffn_hidden_size=10, hidden_size=12)
    third = pruned(second, plan_from_importance(scored(second, half), half, quarter))
    assert sum(parameter.numel() for parameter in third.parameters()) == quarter.num_parameters


def test_an_unknown_family_lists_the_known_ones() -> None:
    shape = dataclasses.replace(TINY, family="gpt2")
    with pytest.raises(ValueError, match="family=gpt2 has no NeMo model class here; supported: llama, mistral"):
        nemo_config(shape)


def test_weights_of_an_artifact_are_there_after_configuring(tmp_path: Path) -> None:
    from minitron_nemo.runtime.distributed_checkpoint import save_weights

    source = built(TINY)
    save_weights(source.core, tmp_path)
    loaded = CrossEntropyGPTModel(TINY, initial=tmp_path)
    loaded.configure_model()
    for (name, parameter), (_, expected) in zip(
        loaded.core.named_parameters(), source.core.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    assert build_core(nemo_config(TINY), TINY).state_dict().keys() == source.core.state_dict().keys()


def test_a_model_that_is_to_be_loaded_knows_which_weights_are_split_as_one_that_is_drawn(ranks: Ranks) -> None:
    """Else the norm of its gradient counts the first tensor-parallel rank's part alone."""
    for drawn, loaded in ranks("tp2").run(marks_of_split_weights):
        assert loaded == drawn and True in drawn.values() and False in drawn.values()


def marks_of_split_weights() -> list[dict[str, bool]]:
    """Of a mixture drawn at random, and of one to be loaded: parameter -> whether it says that it is split."""
    marks = []
    for loaded in (False, True):
        config = nemo_config(SHAPES["qwen3_moe"], tensor_model_parallel_size=2, sequence_parallel=True)
        if loaded:
            to_be_loaded(config)
        core = build_core(config, SHAPES["qwen3_moe"])
        marks.append({name: getattr(each, "tensor_model_parallel", False) for name, each in core.named_parameters()})
    return marks
