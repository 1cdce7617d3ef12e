"""The norm of a machine without transformer-engine, and the layers it sits in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minitron_nemo.axes import parameter_names
from minitron_nemo.layer_spec import PlainNorm, uneven_stages
from support.megatron import TINY, TINY_EXPERTS, build_gpt, start_alone, transformer_config
from support.ranks import Ranks

HIDDEN_STATES = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0)) * 3 + 1


def norm(normalization: str) -> PlainNorm:
    start_alone()
    return PlainNorm(transformer_config(dataclasses.replace(TINY, normalization=normalization)), 24, eps=1e-3)


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    rms = (HIDDEN_STATES.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm("RMSNorm")(HIDDEN_STATES), (HIDDEN_STATES / rms).float())


@pytest.mark.parametrize("normalization", ["LayerNorm", "LayerNorm1p"])
def test_layer_norm_starts_neutral_whether_or_not_gamma_is_stored_minus_one(normalization: str) -> None:
    centred = HIDDEN_STATES.double() - HIDDEN_STATES.double().mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    fresh = norm(normalization)
    assert fresh.weight.unique().tolist() == [0.0 if normalization == "LayerNorm1p" else 1.0]
    torch.testing.assert_close(fresh(HIDDEN_STATES), expected.float(), rtol=1e-5, atol=1e-5)


def marks_of_norms() -> set[bool]:
    model = build_gpt(TINY)
    return {parameter.sequence_parallel for name, parameter in model.named_parameters() if "layernorm" in name}


@pytest.mark.parametrize(("layout", "marked"), [("tp2", False), ("tp2-sp", True)])
def test_norms_are_marked_for_the_sum_of_their_gradients_under_sequence_parallelism(
    ranks: Ranks, layout: str, marked: bool
) -> None:
    assert ranks(layout).run(marks_of_norms) == [{marked}, {marked}]


def test_checkpoints_carry_every_parameter() -> None:
    model = build_gpt(dataclasses.replace(TINY, qk_layernorm=True))
    saved = {name for name in model.sharded_state_dict() if not name.endswith("_extra_state")}
    assert saved == set(parameter_names(dataclasses.replace(TINY, qk_layernorm=True)))


def test_an_expert_layers_norm_is_saved_under_the_name_transformer_engine_has_for_it() -> None:
    saved = {value.key for value in build_gpt(TINY_EXPERTS).sharded_state_dict().values()}
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in saved
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in saved  # the dense layer


def stage_sizes(num_layers: int, stages: int) -> list[int]:
    split = uneven_stages(num_layers, stages)
    if not split:
        return [num_layers // stages] * stages
    first, last = split["num_layers_in_first_pipeline_stage"], split["num_layers_in_last_pipeline_stage"]
    between = max(stages - 2, 1)
    return [first] + [(num_layers - first - last) // between] * (stages - 2) + [last]


def test_uneven_layers_make_stages_that_are_nearly_even() -> None:
    assert stage_sizes(32, 4) == [8, 8, 8, 8]
    assert stage_sizes(15, 2) == [8, 7]
    assert stage_sizes(31, 4) == [8, 8, 8, 7]
    assert stage_sizes(29, 4) == [7, 8, 8, 6]
    assert stage_sizes(17, 8) == [3, 2, 2, 2, 2, 2, 2, 2]
    for stages in range(1, 9):
        for num_layers in range(stages, 100):
            sizes = stage_sizes(num_layers, stages)
            assert sum(sizes) == num_layers and min(sizes) >= 1, (num_layers, stages)
            assert max(sizes) <= -(-num_layers // stages) + 2, (num_layers, stages, sizes)
