"""The norm of a machine without transformer-engine, and the layers it sits in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minitron_nemo.axes import parameter_names
from minitron_nemo.layer_spec import PlainNorm
from support.megatron import TINY, build_gpt, start_alone, transformer_config
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
