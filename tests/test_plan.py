"""Pruning plans: what they keep, what they refuse, and their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.axes import take
from minitron_nemo.plan import PruningPlan
from minitron_nemo.shape import PRUNABLE_AXES
from support.megatron import TINY
from support.plans import SMALLER, random_plan

EXPERTS = dataclasses.replace(
    TINY,
    family="mixtral",
    num_moe_experts=4,
    moe_ffn_hidden_size=10,
    moe_shared_expert_intermediate_size=8,
    moe_router_topk=2,
    moe_layer_freq=(1, 0, 1, 1),
)


def test_a_plan_may_hold_a_basis_of_the_residual_stream(tmp_path: Path) -> None:
    basis = torch.linalg.qr(torch.randn(24, 14, generator=torch.Generator().manual_seed(0))).Q
    plan = edited(hidden=basis)
    plan.save(tmp_path)
    again = PruningPlan.load(tmp_path)
    assert again.has_basis and torch.equal(again.hidden, basis)
    matrix = torch.randn(40, 24)
    turned = take(matrix.t(), "decoder.layers.1.mlp.linear_fc2.weight", TINY, {"hidden": again.hidden})
    torch.testing.assert_close(turned, basis.t() @ matrix.t())
    with pytest.raises(ValueError, match="columns are not orthonormal"):
        edited(hidden=2 * basis)


def test_a_plan_round_trips_through_files(tmp_path: Path) -> None:
    plan = random_plan(EXPERTS, num_attention_heads=4, moe_ffn_hidden_size=3)
    plan = dataclasses.replace(plan, head_partner=torch.full((4, 4), -1))
    plan.save(tmp_path / "plan")
    again = PruningPlan.load(tmp_path / "plan")
    assert (again.source, again.target, again.origin) == (plan.source, plan.target, plan.origin)
    for axis in (*PRUNABLE_AXES, "head_partner"):
        assert torch.equal(getattr(again, axis), getattr(plan, axis))


def test_a_description_shows_dims_and_counts() -> None:
    text = random_plan(num_layers=3, **SMALLER).describe()
    assert ["hidden_size", "24", "14", "58.3%"] in [line.split() for line in text.splitlines()]
    assert f"{TINY.num_parameters:,}" in text
    assert "layers dropped: 2" in text
    assert "data=text" in text


def edited(**indices: Any) -> PruningPlan:
    return dataclasses.replace(random_plan(num_layers=2, **SMALLER), **indices)


def test_edited_plans_are_checked() -> None:
    with pytest.raises(ValueError, match=r"plan.layer keeps index 4, outside 0 to 3 \(num_layers=4"):
        edited(layer=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"plan.layer must name each kept index once, .*; 2 stands after"):
        edited(layer=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=r"plan.hidden has shape \[3\] .* hidden_size=14 needs \[14\]"):
        edited(hidden=torch.arange(3))
    with pytest.raises(ValueError, match=r"plan.ffn is missing, but the source has ffn_hidden_size"):
        edited(ffn=None)
    with pytest.raises(ValueError, match=r"plan.head_partner must name, for each of \[4, 4\] kept heads, a dropped"):
        edited(head_partner=edited().head)
    with pytest.raises(ValueError, match=r"plan.head of layer 0 keeps heads \[0, 1, 2, 3\].* 2 heads each"):
        edited(head=torch.tensor([[0, 1, 2, 3]] * 4))


def test_a_folder_without_a_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no pruning plan: plan.safetensors is missing"):
        PruningPlan.load(tmp_path)


def test_a_misspelt_field_of_an_edited_file_is_an_error(tmp_path: Path) -> None:
    random_plan().save(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    description = json.loads(text)
    description["target"]["hiden_size"] = description["target"].pop("hidden_size")
    (tmp_path / "plan.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"hiden_size is not a field of ModelShape; did you mean hidden_size\?"):
        PruningPlan.load(tmp_path)
