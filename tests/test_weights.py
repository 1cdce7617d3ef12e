"""Full parameters out of and into models that are split over ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from minitron_nemo.axes import parameter_names
from minitron_nemo.parallel import Groups, all_gather_shards
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import bare_gpt, load_full_parameters, local_parameters, stream_full_parameters
from support.megatron import TINY, TINY_EXPERTS, bare_model, build_gpt, random_parameter, run_gpt
from support.ranks import Ranks

SHAPES = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, share_embeddings_and_output_weights=True),
    "nemotron": dataclasses.replace(
        TINY, normalization="LayerNorm1p", gated_linear_unit=False, activation="squared_relu", add_bias_linear=True
    ),
    "qwen": dataclasses.replace(TINY, add_qkv_bias=True, qk_layernorm=True),
    "three layers": dataclasses.replace(TINY, num_layers=3, share_embeddings_and_output_weights=True),
    "experts": TINY_EXPERTS,
}
EXPERT_LAYOUTS = ["dp2-ep2", "tp2-sp-ep2-etp1"]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def stream_and_run(shape: ModelShape) -> tuple[list[tuple[str, Tensor]], Tensor | None]:
    """What every rank streams, and the logits [b, s, v] where they come out."""
    model, groups = build_gpt(shape), Groups.from_megatron()
    streamed = list(stream_full_parameters(model, shape, groups))
    with torch.no_grad():
        logits = run_gpt(model, TOKENS)
    if logits is None:
        return streamed, None
    return streamed, torch.cat(all_gather_shards(logits, group=groups.tp), dim=-1)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in SHAPES for layout in ["single", "tp2", "pp2", "dp2", "tp2-sp"]]
    + [("experts", layout) for layout in EXPERT_LAYOUTS],
)
def test_every_layout_streams_the_same_full_parameters_and_computes_the_same_logits(
    ranks: Ranks, layout: str, name: str
) -> None:
    shape = SHAPES[name]
    with torch.no_grad():
        expected = run_gpt(build_gpt(shape), TOKENS)
    outputs = 0
    for rank, (streamed, logits) in enumerate(ranks(layout).run(stream_and_run, shape)):
        assert [parameter for parameter, _ in streamed] == parameter_names(shape)
        for parameter, full in streamed:
            assert torch.equal(full, random_parameter(parameter, shape)), f"{parameter} on rank {rank} of {layout}"
        if logits is not None:
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # order of float32 sums
            outputs += 1
    assert outputs == (1 if layout in ("single", "pp2") else 2)


def stream_split_experts() -> list[tuple[str, Tensor]]:
    shape = dataclasses.replace(TINY_EXPERTS, num_layers=2, moe_layer_freq=(0, 1))
    return list(stream_full_parameters(build_gpt(shape), shape, Groups.from_megatron()))


def test_experts_split_every_way_at_once_are_streamed_whole(ranks: Ranks) -> None:
    """Of the second stage, every rank of four holds one half of two experts."""
    shape = dataclasses.replace(TINY_EXPERTS, num_layers=2, moe_layer_freq=(0, 1))
    for streamed in ranks("tp2-sp-dp2-ep2").run(stream_split_experts):
        assert [name for name, _ in streamed] == parameter_names(shape)
        for name, full in streamed:
            assert torch.equal(full, random_parameter(name, shape)), name


def names_of_reads(shape: ModelShape) -> list[str]:
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return random_parameter(name, shape)

    load_full_parameters(bare_model(shape), shape, Groups.from_megatron(), read)
    return asked


def test_a_rank_reads_only_what_its_pipeline_stage_holds(ranks: Ranks) -> None:
    first, last = ranks("pp2").run(names_of_reads, TINY)
    assert first[0] == "embedding.word_embeddings.weight"
    assert not set(first) & set(last)
    assert set(first) | set(last) == set(parameter_names(TINY))
    assert "decoder.layers.2.mlp.linear_fc1.weight" in last  # global index: the last stage's first layer


def test_a_rank_reads_only_its_own_experts(ranks: Ranks) -> None:
    first, second = (set(names) for names in ranks("dp2-ep2").run(names_of_reads, TINY_EXPERTS))
    assert {name for name in first if ".local_experts." in name and "layers.2" in name} == {
        f"decoder.layers.2.mlp.experts.local_experts.{expert}.linear_fc{half}.weight"
        for expert in (0, 1)
        for half in (1, 2)
    }
    assert not {name for name in first & second if ".local_experts." in name}
    assert first | second == set(parameter_names(TINY_EXPERTS))


def test_the_last_stage_fills_its_copy_of_tied_embeddings(ranks: Ranks) -> None:
    first, last = ranks("pp2").run(names_of_reads, SHAPES["tied"])
    assert first[0] == last[-1] == "embedding.word_embeddings.weight"


def stream_wrapped_bf16(shape: ModelShape) -> list[tuple[str, Tensor]]:
    model = build_gpt(shape, dtype=torch.bfloat16)
    wrapped = Float16Module(model.config, model)
    assert bare_gpt(wrapped) is model
    return list(stream_full_parameters(wrapped, shape, Groups.from_megatron()))


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_bf16_models_stay_bf16_through_their_wrapper(ranks: Ranks, layout: str) -> None:
    for streamed in ranks(layout).run(stream_wrapped_bf16, TINY):
        for name, full in streamed:
            assert full.dtype is torch.bfloat16
            assert torch.equal(full, random_parameter(name, TINY).bfloat16())


def test_a_shape_with_other_layers_than_the_model_is_refused() -> None:
    model, shallow = build_gpt(TINY), dataclasses.replace(TINY, num_layers=3)
    with pytest.raises(ValueError, match=r"lacks parameters that its shape promises: decoder\.layers\.4"):
        list(stream_full_parameters(model, dataclasses.replace(TINY, num_layers=5), Groups()))
    with pytest.raises(ValueError, match=r"has parameters that its shape does not: decoder\.layers\.3"):
        load_full_parameters(model, shallow, Groups(), lambda name: random_parameter(name, shallow))


def test_a_full_parameter_of_another_size_is_refused_by_name() -> None:
    model = build_gpt(TINY)
    wider = dataclasses.replace(TINY, ffn_hidden_size=48)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight has shape \[96, 24\] where \[80, 24\] is expected"):
        load_full_parameters(model, TINY, Groups(), lambda name: random_parameter(name, wider))
    with pytest.raises(ValueError, match=r"linear_fc1\.weight has shape \[80, 24\] where \[96, 24\] is expected"):
        list(stream_full_parameters(model, wider, Groups()))


def test_a_model_that_is_not_built_is_named() -> None:
    with pytest.raises(TypeError, match=r"Linear holds no megatron\.core GPTModel.*configure_model\(\)"):
        local_parameters(torch.nn.Linear(2, 2))
