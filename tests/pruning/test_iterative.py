"""Pruning in rounds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.pruning.composition import compose
from minitron_nemo.pruning.iterative import targets_of_rounds
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import stream_full_parameters
from support.megatron import TINY, build_gpt
from support.plans import random_plan

NEMOTRON = ModelShape("nemotron", 32, 6144, 24576, 48, 8, 128, 256000, gated_linear_unit=False)


@pytest.mark.parametrize(
    ("rounds", "hidden"), [(1, [4096]), (2, [5120, 4096]), (4, [5632, 5120, 4608, 4096])]
)  # arXiv:2407.14679, iterative importance of the embedding axis, 6144 to 4096
def test_rounds_go_down_in_equal_steps(rounds: int, hidden: list[int]) -> None:
    shapes = targets_of_rounds(NEMOTRON, NEMOTRON.pruned_to(hidden_size=4096), rounds)
    assert [shape.hidden_size for shape in shapes] == hidden
    assert all(shape.ffn_hidden_size == 24576 for shape in shapes)


def test_every_round_is_a_model_that_splits_as_the_others_do() -> None:
    target = NEMOTRON.pruned_to(
        num_layers=16, hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=16, num_query_groups=4
    )
    shapes = targets_of_rounds(NEMOTRON, target, 3, multiple=2)
    previous = NEMOTRON
    for shape in shapes:
        shape.require_splits_over(2)
        previous.pruned_to(**{dim: getattr(shape, dim) for dim in shape.prunable_dims})
        assert target.heads_per_group <= shape.heads_per_group <= previous.heads_per_group
        previous = shape
    assert shapes[-1] == target and [shape.num_layers for shape in shapes] == [32, 32, 16]


def pruned(weights_of: torch.nn.Module, plan: PruningPlan) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    student = build_gpt(plan.target, seed=1)
    prune_into(weights_of, student, plan, Groups.from_megatron())
    full = stream_full_parameters(student, plan.target, Groups.from_megatron())
    return student, {name: tensor.clone() for name, tensor in full}


def test_composed_plans_prune_as_one_after_the_other() -> None:
    source = dataclasses.replace(TINY, num_attention_heads=12, num_query_groups=3)
    first = random_plan(source, num_layers=3, hidden_size=20, num_attention_heads=6, num_query_groups=2)
    second = random_plan(first.target, seed=5, num_layers=2, hidden_size=14, ffn_hidden_size=18, num_attention_heads=4)
    middle, _ = pruned(build_gpt(source), first)
    _, expected = pruned(middle, second)
    _, actual = pruned(build_gpt(source), compose(first, second))
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_plans_that_do_not_meet_are_an_error() -> None:
    first = random_plan(hidden_size=20)
    with pytest.raises(ValueError, match="not of the first one's student"):
        compose(first, random_plan(hidden_size=14))
    merging = dataclasses.replace(random_plan(hidden_size=20), head_partner=torch.full((4, 6), -1))
    with pytest.raises(ValueError, match="merge heads do not compose"):
        compose(merging, random_plan(merging.target, hidden_size=14))
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        targets_of_rounds(TINY, TINY, 0)
