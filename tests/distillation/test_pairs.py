"""Claims about which layers are compared, and about configs that cannot work."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minitron_nemo.axes import norm_of
from minitron_nemo.config.distillation import DistillationConfig, HiddenStateConfig
from minitron_nemo.distillation.pairs import layer_mapping, pairs_of
from minitron_nemo.distillation.projection import build_projections
from minitron_nemo.distillation.teacher import LiveTeacher
from minitron_nemo.distillation.teacher_student import TeacherStudent
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.pruning.sequential import SequentialRefit
from minitron_nemo.shape import ModelShape
from support.megatron import TINY, build_gpt, causal_mask, smaller, start_alone, transformer_config
from support.ranks import Ranks

KEPT = [0, 2, 3, 5, 7, 8, 11, 13, 14, 16, 17, 19, 20, 22]  # of 24 channels


def plan(hidden: torch.Tensor, source: ModelShape = TINY) -> PruningPlan:
    """Cuts channels, and layer 1."""
    layers = [0, *range(2, source.num_layers)]
    whole = {"ffn": source.ffn_hidden_size, "head": source.num_attention_heads, "group": source.num_query_groups}
    return PruningPlan(
        source,
        source.pruned_to(hidden_size=hidden.shape[-1], num_layers=len(layers)),
        hidden=hidden,
        layer=torch.tensor(layers),
        **{axis: torch.arange(size).expand(source.num_layers, size) for axis, size in whole.items()},
    )


@pytest.mark.parametrize(
    ("config", "mapping"),
    [
        ({}, [(13, 29)]),  # the papers': 16 of 32 layers
        ({"k": 0}, [(15, 31)]),
        ({"mapping": "last_k", "k": 3}, [(13, 29), (14, 30), (15, 31)]),
        ({"mapping": "uniform"}, [(layer, 2 * layer + 1) for layer in range(16)]),
        ({"mapping": "explicit", "pairs": [[3, 9], [5, 4]]}, [(3, 9), (5, 4)]),
    ],
)
def test_layers_are_mapped_as_asked(config: dict[str, Any], mapping: list[tuple[int, int]]) -> None:
    assert layer_mapping(HiddenStateConfig(**config), 16, 32, None) == mapping


def test_a_plans_mapping_sends_every_kept_layer_to_itself() -> None:
    config = HiddenStateConfig(mapping="plan")
    assert layer_mapping(config, 3, 4, plan(torch.tensor(KEPT))) == [(0, 0), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"places": ["mlp_imput"]}, "distillation.hidden_states.places=mlp_imput is not known; did you mean mlp_input"),
        ({"places": []}, r"distillation.hidden_states.places=\[\] must name at least one place"),
        ({"loss": "cosin"}, "distillation.hidden_states.loss=cosin is not known; did you mean cosine"),
        ({"mapping": "explicit"}, r"pairs=\[\] and distillation.hidden_states.mapping=explicit do not go together"),
        ({"mapping": "explicit", "pairs": [[1]]}, r"must hold \[student layer, teacher layer\]"),
        ({"weight": 0.0}, "distillation.hidden_states.weight=0.0 must be above 0"),
        ({"mapping": "last_k", "k": 0}, "distillation.hidden_states.k=0 must be at least 1"),
        ({"warmup_steps": -1}, "distillation.hidden_states.warmup_steps=-1 must be at least 0"),
    ],
)
def test_config_values_that_cannot_work_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiddenStateConfig(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k": 3}, "pairs student layer -1 with teacher layer 0, but they have 3 and 4 layers, counted from 0"),
        ({"mapping": "explicit", "pairs": [[2, 4]]}, r"teacher layer 4.*Correct distillation.hidden_states.pairs"),
        ({"mapping": "plan"}, "distillation.hidden_states.mapping=plan needs the plan by which the student was cut"),
        ({"projection": "none"}, "the student has hidden_size 14 and the teacher 24. Set it to shared or per_pair"),
        ({"projection_init": "plan"}, "distillation.hidden_states.projection_init=plan needs the plan"),
    ],
)
def test_configs_that_do_not_fit_the_models_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projections(HiddenStateConfig(**config), None)


def projections(config: HiddenStateConfig, plan: PruningPlan | None, **student: int) -> torch.nn.ParameterDict:
    start_alone()
    models = [
        transformer_config(smaller(TINY, **sizes)) for sizes in ({"hidden_size": 14, "num_layers": 3} | student, {})
    ]
    pairs = pairs_of(config, *models, plan)
    gammas = tuple(torch.ones(len(pairs), model.hidden_size) for model in models)
    return build_projections(config, pairs, pairs, *models, plan, gammas, stage=0, like=torch.zeros(1))


def test_projections_are_shared_one_per_pair_or_none() -> None:
    assert list(projections(HiddenStateConfig(), None)) == ["shared"]
    assert list(projections(HiddenStateConfig(projection="per_pair"), None)) == ["embedding", "block_output_0_to_1"]
    assert list(projections(HiddenStateConfig(), None, hidden_size=24)) == []
    assert list(projections(HiddenStateConfig(places=["relation"]), None)) == []


def test_a_projection_from_a_plan_is_the_exact_embedding_of_its_channels() -> None:
    config = HiddenStateConfig(projection_init="plan")
    state = torch.arange(14.0)
    lifted = projections(config, plan(torch.tensor(KEPT)))["shared"] @ state
    assert lifted[KEPT].tolist() == state.tolist()
    assert lifted.count_nonzero() == 13

    basis = torch.linalg.qr(torch.randn(24, 14)).Q
    assert torch.equal(projections(config, plan(basis))["shared"], basis)


def test_a_plan_of_other_models_is_refused() -> None:
    other = plan(torch.arange(12))
    with pytest.raises(
        ValueError, match="the plan cuts hidden_size 24 to 12, but the teacher has 24 and the student 14"
    ):
        projections(HiddenStateConfig(projection_init="plan"), other)


def hidden_losses_of_a_pruned_model(
    tokens: torch.Tensor, hidden: torch.Tensor, after_layernorm: bool, exponents: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of a student that lost only silent directions of the stream and a layer that adds nothing, float64.

    Args: exponents: [k], powers of two by which its norms are larger, and what reads them smaller.
    """
    one_layer_more = smaller(TINY, num_layers=5)
    teacher = build_gpt(one_layer_more, dtype=torch.float64, calculate_per_token_loss=True)
    directions = hidden if hidden.is_floating_point() else torch.eye(TINY.hidden_size, dtype=torch.float64)[:, hidden]
    kept = directions @ directions.t()
    with torch.no_grad():
        embedding = teacher.embedding.word_embeddings.weight
        embedding.copy_(embedding @ kept)
        for number, layer in enumerate(teacher.decoder.layers):
            for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                linear.weight.copy_(kept @ linear.weight)
                if number == 1:  # the layer that is dropped
                    linear.weight.zero_()
    scale = (TINY.hidden_size / len(KEPT)) ** 0.5
    norm_scale = torch.full((2 * one_layer_more.num_layers + 1,), scale, dtype=torch.float64)
    cut = dataclasses.replace(plan(hidden, one_layer_more), norm_scale=norm_scale)
    student = build_gpt(cut.target, dtype=torch.float64, calculate_per_token_loss=True).train()
    prune_into(teacher, student, cut, Groups.from_megatron())
    norms = {norm_of(name).removesuffix(".weight") for name, _ in teacher.named_parameters() if norm_of(name)}
    SequentialRefit(cut, (), None, dict.fromkeys(norms, exponents)).finish(student)
    config = HiddenStateConfig(
        enabled=True,
        places=["embedding", "block_output", "attention_output", "mlp_input", "relation"],
        loss="mse",
        after_layernorm=after_layernorm,
        mapping="plan",
        projection="per_pair",
        projection_init="plan",
    )
    model = TeacherStudent(student, LiveTeacher(teacher), DistillationConfig(hidden_states=config), plan=cut)
    model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), causal_mask(tokens.shape[1]), labels=tokens)
    model.end_step()
    return {name: value for name, value in model.step_losses().items() if name.startswith("hidden/")}


@pytest.mark.parametrize("after_layernorm", [False, True], ids=["stream", "behind norms"])
@pytest.mark.parametrize("larger", [0, 3], ids=["gammas as cut", "of another size"])
@pytest.mark.parametrize("kept", ["channels", "basis"])
def test_a_student_that_lost_nothing_has_no_hidden_loss_when_projected_by_its_plan(
    ranks: Ranks, kept: str, larger: int, after_layernorm: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(TINY.padded_vocab_size, (2, 6), generator=generator)
    basis = torch.linalg.qr(torch.randn(TINY.hidden_size, len(KEPT), generator=generator, dtype=torch.float64)).Q
    hidden = basis if kept == "basis" else torch.tensor(KEPT)
    exponents = torch.arange(len(KEPT)) % (larger + 1) - larger // 2
    (losses,) = ranks("single").run(hidden_losses_of_a_pruned_model, tokens, hidden, after_layernorm, exponents)
    assert set(losses) >= {"hidden/embedding", "hidden/block_output_1_to_2", "hidden/relation_3_to_4"}
    for name, loss in losses.items():
        assert loss < 1e-6, name  # the norms' epsilon is not rescaled
