"""What holds for any shape, target and layout."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron_nemo.axes import parameter_names
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import stream_full_parameters
from support.megatron import build_gpt
from support.plans import random_plan
from support.ranks import Ranks

EXAMPLES = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,  # the same examples on every machine; a new one is found by raising max_examples
    # the ranks are the same for all examples; a busy machine draws slowly
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def shapes(draw: st.DrawFn, even: bool = False) -> ModelShape:
    """Any dense model; `even`: its dims split over two tensor-parallel ranks."""
    step = 2 if even else 1
    groups = step * draw(st.integers(1, 2))
    heads = groups * draw(st.integers(1, 4))
    return ModelShape(
        family="llama",
        num_layers=draw(st.integers(2, 4)),
        hidden_size=2 * draw(st.integers(3, 12)),
        ffn_hidden_size=step * draw(st.integers(2, 20)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 4)),
        padded_vocab_size=2 * draw(st.integers(4, 20)),
        seq_length=16,
        normalization=draw(st.sampled_from(["RMSNorm", "LayerNorm", "LayerNorm1p"])),
        gated_linear_unit=draw(st.booleans()),
        share_embeddings_and_output_weights=draw(st.booleans()),
        add_qkv_bias=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
    )


@st.composite
def plans(draw: st.DrawFn, even: bool = False) -> PruningPlan:
    """Any smaller student of it, with any scores."""
    source, step = draw(shapes(even)), 2 if even else 1
    groups = step * draw(st.integers(1, source.num_query_groups // step))
    return random_plan(
        source,
        seed=draw(st.integers(0, 99)),
        num_layers=draw(st.integers(2 if even else 1, source.num_layers)),
        hidden_size=2 * draw(st.integers(1, source.hidden_size // 2)),
        ffn_hidden_size=step * draw(st.integers(1, source.ffn_hidden_size // step)),
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, source.heads_per_group)),
    )


def pruned(plan: PruningPlan) -> dict[str, Tensor]:
    teacher, student = build_gpt(plan.source), build_gpt(plan.target, seed=1)
    prune_into(teacher, student, plan, Groups.from_megatron())
    return {name: full.clone() for name, full in stream_full_parameters(student, plan.target, Groups.from_megatron())}


@EXAMPLES
@given(plans())
def test_a_pruned_model_has_as_many_parameters_as_its_shape_says(plan: PruningPlan) -> None:
    student = pruned(plan)
    assert list(student) == parameter_names(plan.target)
    assert sum(tensor.numel() for tensor in student.values()) == plan.target.num_parameters


@EXAMPLES
@given(shapes())
def test_the_identity_plan_copies_every_bit(shape: ModelShape) -> None:
    plan = random_plan(shape, num_layers=shape.num_layers)
    assert plan.source == plan.target
    student = pruned(plan)
    for name, full in stream_full_parameters(build_gpt(shape), shape, Groups.from_megatron()):
        assert torch.equal(student[name], full), name


@settings(EXAMPLES, max_examples=6)
@given(plans(even=True), st.sampled_from(["tp2", "pp2", "tp2-sp"]))
def test_any_student_is_the_same_on_any_layout(ranks: Ranks, plan: PruningPlan, layout: str) -> None:
    expected = pruned(plan)
    for student in ranks(layout).run(pruned, plan):
        assert all(torch.equal(student[name], expected[name]) for name in expected)


def test_the_strategies_reach_every_axis() -> None:
    """A strategy that no longer cuts some axis would prove nothing about it."""
    cut = set()

    @settings(EXAMPLES, max_examples=40)
    @given(plans())
    def look(plan: PruningPlan) -> None:
        source, target = dataclasses.asdict(plan.source), dataclasses.asdict(plan.target)
        cut.update(name for name in source if source[name] != target[name])

    look()
    assert cut == {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"}
