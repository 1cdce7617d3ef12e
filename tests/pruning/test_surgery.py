"""Pruned models against slicing by hand, on every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from minitron_nemo.axes import parameter_names
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance, prune_into
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import load_full_parameters, stream_full_parameters
from support.megatron import TINY, build_gpt, run_gpt
from support.plans import SMALLER, random_plan, random_scores
from support.ranks import Ranks

Weights = dict[str, Tensor]

ARCHITECTURES = {
    "llama": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "nemotron": {"normalization": "LayerNorm1p", "gated_linear_unit": False, "activation": "squared_relu"},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "biases": {"add_bias_linear": True, "normalization": "LayerNorm"},
}


def tokens_of(shape: ModelShape) -> Tensor:
    return torch.randint(shape.padded_vocab_size, (2, 10), generator=torch.Generator().manual_seed(2))


def full_weights(model: nn.Module, shape: ModelShape) -> Weights:
    return {name: full.clone() for name, full in stream_full_parameters(model, shape, Groups.from_megatron())}


def prune(plan: PruningPlan, dtype: torch.dtype = torch.float32) -> Weights:
    """Prune the test teacher on the current layout; the student's full weights."""
    teacher, student = build_gpt(plan.source, dtype=dtype), build_gpt(plan.target, dtype=dtype, seed=1)
    before = full_weights(teacher, plan.source)
    prune_into(teacher, student, plan, Groups.from_megatron())
    after = full_weights(teacher, plan.source)
    assert all(torch.equal(after[name], before[name]) for name in before), "the teacher changed"
    return full_weights(student, plan.target)


def sliced_by_hand(teacher: Weights, plan: PruningPlan) -> Weights:
    """Row by row, with lists; nothing of the axis table."""
    source, d = plan.source, plan.source.kv_channels
    hidden = plan.hidden.tolist()

    def rows(tensor: Tensor, kept: list[int]) -> Tensor:
        return torch.stack([tensor[i] for i in kept])

    def columns(tensor: Tensor, kept: list[int]) -> Tensor:
        return torch.stack([tensor[:, i] for i in kept], dim=1)

    student = {}
    for name in parameter_names(plan.target):
        if not name.startswith("decoder.layers."):
            tensor = teacher[name]
            student[name] = columns(tensor, hidden) if tensor.dim() == 2 else rows(tensor, hidden)
            continue
        _, _, index, what = name.split(".", 3)
        layer = plan.layer.tolist()[int(index)]
        tensor = teacher[f"decoder.layers.{layer}.{what}"]
        neurons, heads = plan.ffn[layer].tolist(), plan.head[layer].tolist()
        if "linear_qkv" in what:
            in_group = source.num_attention_heads // source.num_query_groups
            kept = []
            for group in plan.group[layer].tolist():
                start = group * (in_group + 2) * d
                for head in heads:
                    if head // in_group == group:
                        kept += [start + (head % in_group) * d + channel for channel in range(d)]
                kept += [start + in_group * d + channel for channel in range(2 * d)]
            tensor = rows(tensor, kept)
            tensor = columns(tensor, hidden) if tensor.dim() == 2 else tensor
        elif "linear_proj.weight" in what:
            tensor = columns(rows(tensor, hidden), [head * d + channel for head in heads for channel in range(d)])
        elif "linear_fc1" in what:
            gate_and_up = neurons + [source.ffn_hidden_size + i for i in neurons]
            tensor = rows(tensor, gate_and_up if source.gated_linear_unit else neurons)
            tensor = columns(tensor, hidden) if tensor.dim() == 2 else tensor
        elif "linear_fc2.weight" in what:
            tensor = columns(rows(tensor, hidden), neurons)
        elif "q_layernorm" not in what and "k_layernorm" not in what:
            tensor = rows(tensor, hidden)
        student[name] = tensor
    return student


def assert_same_weights(actual: Weights, expected: Weights, message: str = "") -> None:
    assert set(actual) == set(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), f"{message} {name}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruned_model_equals_slicing_by_hand(architecture: str) -> None:
    source = dataclasses.replace(TINY, **ARCHITECTURES[architecture])
    plan = random_plan(source, num_layers=3, **SMALLER)
    teacher, student = build_gpt(source), build_gpt(plan.target, seed=1)
    expected = sliced_by_hand(full_weights(teacher, source), plan)
    prune_into(teacher, student, plan, Groups.from_megatron())
    assert_same_weights(full_weights(student, plan.target), expected)
    by_hand = build_gpt(plan.target, seed=2)
    load_full_parameters(by_hand, plan.target, Groups.from_megatron(), expected.__getitem__)
    with torch.no_grad():
        assert torch.equal(run_gpt(student, tokens_of(source)), run_gpt(by_hand, tokens_of(source)))


def test_query_groups_are_removed_with_their_key_and_value() -> None:
    plan = random_plan(num_attention_heads=2, num_query_groups=1)
    assert_same_weights(prune(plan), sliced_by_hand(full_weights(build_gpt(TINY), TINY), plan))


def test_a_dropped_head_leaves_its_difference_to_its_partner() -> None:
    importance = random_scores()
    plan = plan_from_importance(importance, TINY, TINY.pruned_to(num_attention_heads=4), merge_heads=True)
    teacher = full_weights(build_gpt(TINY), TINY)
    expected = sliced_by_hand(teacher, plan)
    merged = 0
    for layer in range(TINY.num_layers):
        name, d, in_group = f"decoder.layers.{layer}.self_attention.linear_qkv.weight", TINY.kv_channels, 3
        for place, (head, partner) in enumerate(
            zip(plan.head[layer].tolist(), plan.head_partner[layer].tolist(), strict=True)
        ):
            if partner >= 0:
                query = [  # where the head and its partner stand among [q q q k v] x 2 groups
                    teacher[name][((h // in_group) * (in_group + 2) + h % in_group) * d :][:d] for h in (head, partner)
                ]
                row = ((place // 2) * 4 + place % 2) * d  # [q q k v] x 2 groups
                expected[name][row : row + d] = query[0] + (query[0] - query[1])
                merged += 1
    assert merged == 2 * TINY.num_layers  # of 3 heads a group keeps 2: its last kept one has a partner
    actual = prune(plan)
    for name in expected:
        assert_close(actual[name], expected[name], msg=name)


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "dp2"])
@pytest.mark.parametrize("architecture", ["llama", "tied"])
def test_pruning_gives_the_same_student_on_every_layout(ranks: Ranks, layout: str, architecture: str) -> None:
    source = dataclasses.replace(TINY, **ARCHITECTURES[architecture])
    plan = random_plan(source, num_layers=2, **SMALLER)  # over pp2 both kept layers move to another stage or place
    expected = prune(plan)
    for rank, student in enumerate(ranks(layout).run(prune, plan)):
        assert_same_weights(student, expected, f"rank {rank} of {layout}:")


def test_full_size_plan_copies_the_teacher_to_the_last_bit() -> None:
    plan = random_plan(hidden_size=TINY.hidden_size)
    assert plan.source == plan.target
    assert_same_weights(prune(plan), full_weights(build_gpt(TINY), TINY))


def test_bf16_stays_bf16() -> None:
    plan = random_plan()
    student = prune(plan, torch.bfloat16)
    assert {tensor.dtype for tensor in student.values()} == {torch.bfloat16}
    assert_same_weights(student, sliced_by_hand(full_weights(build_gpt(TINY, dtype=torch.bfloat16), TINY), plan))


# ---- what carries nothing can go -------------------------------------------------------------------------------------


def edited_teacher(**zeroed: Any) -> tuple[nn.Module, Weights]:
    """The test teacher with the named rows or columns of a parameter of every layer set to 0."""
    weights = full_weights(build_gpt(TINY), TINY)
    for what, indices in zeroed.items():
        for name, tensor in weights.items():
            if name.endswith(f"{what}.weight"):
                tensor[indices] = 0
    teacher = build_gpt(TINY)
    load_full_parameters(teacher, TINY, Groups.from_megatron(), weights.__getitem__)
    return teacher, weights


def importance_plan(teacher: nn.Module, target: ModelShape) -> PruningPlan:
    tokens = tokens_of(TINY)
    with ImportanceEstimator(teacher, TINY, Groups.from_megatron()) as estimator, torch.no_grad():
        estimator.sample(torch.ones_like(tokens))
        run_gpt(teacher, tokens)
        return plan_from_importance(estimator.finish(), TINY, target)


def logits_of_pruned(teacher: nn.Module, plan: PruningPlan) -> Tensor:
    student = build_gpt(plan.target, seed=1)
    prune_into(teacher, student, plan, Groups.from_megatron())
    with torch.no_grad():
        return run_gpt(student, tokens_of(TINY))


@torch.no_grad()
def test_removing_silent_neurons_leaves_the_output_unchanged() -> None:
    silent = [1, 2, 5, 8, 13, 21, 34, 39]
    teacher, _ = edited_teacher(linear_fc1=[*silent, *(TINY.ffn_hidden_size + i for i in silent)])
    plan = importance_plan(teacher, TINY.pruned_to(ffn_hidden_size=TINY.ffn_hidden_size - len(silent)))
    for layer in range(TINY.num_layers):
        assert not set(plan.ffn[layer].tolist()) & set(silent)
    # the same sums in another order: float32 rounding
    assert_close(logits_of_pruned(teacher, plan), run_gpt(teacher, tokens_of(TINY)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_removing_a_silent_group_leaves_the_output_unchanged() -> None:
    d, slots = TINY.kv_channels, TINY.heads_per_group + 2
    value_of_group_0 = slice((slots - 1) * d, slots * d)
    teacher, _ = edited_teacher(linear_qkv=value_of_group_0)
    plan = importance_plan(teacher, TINY.pruned_to(num_attention_heads=3, num_query_groups=1))
    assert plan.group.tolist() == [[1]] * TINY.num_layers
    assert_close(logits_of_pruned(teacher, plan), run_gpt(teacher, tokens_of(TINY)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_removing_heads_nobody_reads_leaves_the_output_unchanged() -> None:
    d, unread = TINY.kv_channels, [1, 5]  # one of each group
    columns = [head * d + channel for head in unread for channel in range(d)]
    teacher, _ = edited_teacher(linear_proj=(slice(None), columns))
    kept = torch.tensor([[0, 2, 3, 4]] * TINY.num_layers)
    plan = dataclasses.replace(random_plan(num_attention_heads=4), head=kept)
    assert_close(logits_of_pruned(teacher, plan), run_gpt(teacher, tokens_of(TINY)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_removing_silent_hidden_channels_changes_nothing_but_the_divisor_of_the_norms() -> None:
    silent = [0, 3, 7, 11, 12, 22]
    teacher, _ = edited_teacher(word_embeddings=(slice(None), silent), linear_proj=silent, linear_fc2=silent)
    target = TINY.pruned_to(hidden_size=TINY.hidden_size - len(silent))
    plan = importance_plan(teacher, target)
    assert not set(plan.hidden.tolist()) & set(silent)
    student = build_gpt(target, seed=1)
    prune_into(teacher, student, plan, Groups.from_megatron())
    for name, parameter in student.named_parameters():
        if "layernorm" in name:  # RMSNorm divides by the number of channels, silent ones included
            parameter *= (TINY.hidden_size / target.hidden_size) ** 0.5
    # epsilon does not scale along: 1e-5 against mean squares of about 1e-1
    assert_close(run_gpt(student, tokens_of(TINY)), run_gpt(teacher, tokens_of(TINY)), rtol=1e-3, atol=1e-3)


# ---- errors ----------------------------------------------------------------------------------------------------------


def prune_into_given(teacher_shape: ModelShape, student_shape: ModelShape, plan: PruningPlan) -> None:
    prune_into(build_gpt(teacher_shape), build_gpt(student_shape), plan, Groups.from_megatron())


def test_a_teacher_of_another_shape_is_an_error() -> None:
    plan = random_plan()
    with pytest.raises(ValueError, match=r"has shape .* where .* is expected"):
        prune_into_given(dataclasses.replace(TINY, ffn_hidden_size=48), plan.target, plan)


def test_a_student_of_another_shape_is_an_error() -> None:
    plan = random_plan()
    with pytest.raises(ValueError, match=r"has shape .* where .* is expected"):
        prune_into_given(TINY, TINY, plan)


def test_a_target_that_does_not_split_over_tensor_parallel_ranks_is_an_error(ranks: Ranks) -> None:
    plan = random_plan(ffn_hidden_size=19)
    with pytest.raises(ValueError, match=r"ffn_hidden_size=19 cannot be split over .*=2\. Nearest that can: 18, 20"):
        ranks("tp2").run(prune_into_given, TINY, TINY, plan)
