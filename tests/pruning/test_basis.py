"""The residual stream in another basis: a full-size turn changes nothing, a cut one keeps what there is most of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.config.pruning import SurgeryConfig
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance, prune_into
from minitron_nemo.pruning.basis import norm_scales, principal_basis, read_basis, reading_moment
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages import prune
from minitron_nemo.weights import load_full_parameters, stream_full_parameters
from support.megatron import TINY, TINY_EXPERTS, build_gpt, run_gpt
from support.plans import random_plan, random_scores
from support.ranks import Ranks

Weights = dict[str, Tensor]

ARCHITECTURES: dict[str, ModelShape] = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, share_embeddings_and_output_weights=True),
    "qwen2": dataclasses.replace(TINY, add_qkv_bias=True),
    "qwen3": dataclasses.replace(TINY, qk_layernorm=True),
    "nemotron": dataclasses.replace(
        TINY, normalization="LayerNorm1p", gated_linear_unit=False, activation="squared_relu"
    ),
    "biases": dataclasses.replace(TINY, add_bias_linear=True, normalization="LayerNorm"),
    "experts": TINY_EXPERTS,
}


def tokens_of(shape: ModelShape) -> Tensor:
    return torch.randint(shape.padded_vocab_size, (3, 10), generator=torch.Generator().manual_seed(2))


def turned(source: ModelShape, seed: int = 0) -> PruningPlan:
    """Full size, in a random basis."""
    moment = torch.randn(64, source.hidden_size, generator=torch.Generator().manual_seed(seed)).double()
    basis = principal_basis(moment.t() @ moment, source.hidden_size, keeps_mean=source.normalization != "RMSNorm")
    target = dataclasses.replace(source, share_embeddings_and_output_weights=False)
    return dataclasses.replace(random_plan(source, hidden_size=source.hidden_size), hidden=basis, target=target)


@torch.no_grad()
def logits_before_and_after(plan: PruningPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    teacher, student = build_gpt(plan.source, dtype=dtype), build_gpt(plan.target, dtype=dtype, seed=1)
    prune_into(teacher, student, plan, Groups.from_megatron())
    tokens = tokens_of(plan.source)
    return run_gpt(teacher, tokens), run_gpt(student, tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_turned_model_of_full_size_says_what_the_teacher_says(
    architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    before, after = logits_before_and_after(turned(ARCHITECTURES[architecture]), dtype)
    assert before.abs().max() > 0.1
    assert_close(after, before, rtol=0, atol=tolerance)


def turned_weights(plan: PruningPlan) -> Weights:
    teacher, student = build_gpt(plan.source), build_gpt(plan.target, seed=1)
    groups = Groups.from_megatron()
    prune_into(teacher, student, plan, groups)
    return {name: full.clone() for name, full in stream_full_parameters(student, plan.target, groups)}


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2"])
@pytest.mark.parametrize("architecture", ["tied", "nemotron"])
def test_turning_gives_the_same_student_on_every_layout(ranks: Ranks, layout: str, architecture: str) -> None:
    source = ARCHITECTURES[architecture]
    full = turned(source)
    target = full.target.pruned_to(hidden_size=14, ffn_hidden_size=18, num_layers=2)
    plan = dataclasses.replace(
        random_plan(source, hidden_size=14, ffn_hidden_size=18, num_layers=2),
        hidden=principal_basis(torch.eye(24).cumsum(0), 14, keeps_mean=source.normalization != "RMSNorm"),
        target=target,
        norm_scale=torch.linspace(0.5, 1.5, 2 * source.num_layers + 1),
    )
    expected = turned_weights(plan)
    for rank, student in enumerate(ranks(layout).run(turned_weights, plan)):
        for name in expected:
            assert_close(student[name], expected[name], rtol=1e-5, atol=1e-6, msg=f"rank {rank} of {layout}: {name}")


@torch.no_grad()
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_stream_that_fills_k_directions_needs_no_more(normalization: str) -> None:
    """Of a stream in k directions (for LayerNorm one of them the mean's) the measured basis and scale lose nothing."""
    source = dataclasses.replace(TINY, normalization=normalization, layernorm_epsilon=1e-12)
    keep, generator = 10, torch.Generator().manual_seed(5)
    directions = torch.linalg.qr(torch.randn(24, keep - (normalization != "RMSNorm"), generator=generator)).Q
    teacher = build_gpt(source)
    weights = {name: full.clone() for name, full in stream_full_parameters(teacher, source, Groups.from_megatron())}
    for name, full in weights.items():
        if "word_embeddings" in name:
            full.copy_(full @ directions @ directions.t())
        elif "linear_proj" in name or "linear_fc2" in name:
            full.copy_(directions @ directions.t() @ full)
        elif "layernorm.bias" in name:  # would leave the k directions
            full.zero_()
    load_full_parameters(teacher, source, Groups.from_megatron(), weights.__getitem__)
    importance = measured(teacher, source)
    target = source.pruned_to(hidden_size=keep)
    plan = plan_from_importance(importance, source, target, surgery=SurgeryConfig("calibrated"))
    student = build_gpt(target, seed=1)
    prune_into(teacher, student, plan, Groups.from_megatron())
    expected = run_gpt(teacher, tokens_of(source))
    assert_close(run_gpt(student, tokens_of(source)), expected, rtol=1e-4, atol=1e-4)
    plain = build_gpt(target, seed=1)
    prune_into(teacher, plain, dataclasses.replace(plan, norm_scale=None), Groups.from_megatron())
    assert (run_gpt(plain, tokens_of(source)) - expected).abs().max() > 0.1


def measured(model: nn.Module, shape: ModelShape, kind: str = "normalised") -> Importance:
    tokens = tokens_of(shape)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    config = ImportanceConfig(stream=kind)
    with ImportanceEstimator(model, shape, Groups.from_megatron(), config) as estimator, torch.no_grad():
        estimator.sample(mask)
        run_gpt(model, tokens)
        return estimator.finish()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["normalised", "raw"])
@pytest.mark.parametrize("architecture", ["llama", "nemotron"])
def test_second_moments_are_those_of_the_materialised_stream(architecture: str, kind: str) -> None:
    shape = ARCHITECTURES[architecture]
    model = build_gpt(shape)
    entering: list[Tensor] = []
    norms = [norm for layer in model.decoder.layers for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)]
    for norm in [*norms, model.decoder.final_layernorm]:
        norm.register_forward_pre_hook(lambda _, args: entering.append(args[0].double()))
    importance = measured(model, shape, kind)
    rows = []
    for stream in entering:
        tokens = torch.cat([stream[:, 0], stream[:7, 1], stream[:, 2]])
        if architecture == "nemotron":
            tokens = tokens - tokens.mean(1, keepdim=True)
        rows.append(tokens / tokens.square().mean(1, keepdim=True).sqrt() if kind == "normalised" else tokens)
    expected = torch.stack([row.t() @ row for row in rows]).sum(0)
    assert_close(importance.moments["stream"], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert_close(importance.moments["norm"], torch.stack([row.square().sum(0) for row in rows]), rtol=1e-5, atol=1e-6)


def moments_on_ranks(shape: ModelShape) -> Weights:
    return {name: measured(build_gpt(shape), shape).moments[name] for name in ("stream", "norm")}


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "tp2-pp2"])
def test_second_moments_are_the_same_on_every_layout(ranks: Ranks, layout: str) -> None:
    expected = moments_on_ranks(TINY)
    for moments in ranks(layout).run(moments_on_ranks, TINY):
        for name in expected:
            assert_close(moments[name], expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))


def test_second_moments_of_two_runs_add_up() -> None:
    first = measured(build_gpt(TINY), TINY)
    both = Importance.merge([first, first])
    assert_close(both.moments["stream"], 2 * first.moments["stream"])
    with pytest.raises(ValueError, match=r"importance.stream"):
        Importance.merge([first, measured(build_gpt(TINY), TINY, "raw")])


# ---- the axes --------------------------------------------------------------------------------------------------------


def second_moment(size: int = 24) -> Tensor:
    rows = torch.randn(200, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = rows * torch.linspace(3, 0.1, size, dtype=torch.float64)
    return rows.t() @ rows


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_axes_are_orthonormal_and_keep_the_most(keeps_mean: bool) -> None:
    moment, keep = second_moment(), 9
    basis = principal_basis(moment, keep, keeps_mean=keeps_mean)
    assert_close(basis.t() @ basis, torch.eye(keep, dtype=torch.float64), rtol=0, atol=1e-12)
    kept = ((moment @ basis) * basis).sum()
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        other = torch.randn(24, keep, generator=generator, dtype=torch.float64)
        if keeps_mean:
            other[:, 0] = 1
        other = torch.linalg.qr(other).Q
        assert ((moment @ other) * other).sum() < kept
    if keeps_mean:
        assert_close(basis.sum(1), torch.full((24,), (keep / 24) ** 0.5, dtype=torch.float64), rtol=0, atol=1e-12)
    else:
        assert_close(kept, torch.linalg.eigvalsh(moment)[-keep:].sum())


def test_scales_by_hand() -> None:
    model = build_gpt(TINY)
    importance = measured(model, TINY)
    kept = torch.arange(0, 24, 2)
    size = norm_scales("size", kept, importance, TINY)
    assert size is not None
    assert_close(size, torch.full((9,), 2**0.5, dtype=torch.float64))
    energy = norm_scales("energy", kept, importance, TINY)
    assert energy is not None
    for row, scale in zip(importance.moments["norm"], energy, strict=True):
        assert_close(scale**2, 2 * row[::2].sum() / row.sum())
    assert norm_scales("none", kept, importance, TINY) is None
    assert norm_scales("energy", torch.arange(24), importance, TINY) is None


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_importance_without_second_moments_says_how_to_get_them() -> None:
    target = TINY.pruned_to(hidden_size=14)
    with pytest.raises(ValueError, match=r"importance.stream=normalised"):
        plan_from_importance(random_scores(), TINY, target, surgery=SurgeryConfig("calibrated"))


def test_a_basis_cannot_leave_the_output_layer_tied() -> None:
    with pytest.raises(ValueError, match="share_embeddings_and_output_weights=False, or keep channels"):
        dataclasses.replace(turned(ARCHITECTURES["tied"]), target=ARCHITECTURES["tied"])
    with pytest.raises(ValueError, match="only a basis of the residual stream"):
        dataclasses.replace(random_plan(ARCHITECTURES["tied"], hidden_size=24), target=TINY)


def test_a_bias_behind_a_gamma_of_zero_cannot_be_turned() -> None:
    shape = ARCHITECTURES["biases"]
    teacher = build_gpt(shape)
    with torch.no_grad():
        teacher.decoder.layers[1].input_layernorm.weight[3] = 0
    plan = turned(shape)
    with pytest.raises(ValueError, match=r"layers.1.input_layernorm.weight has a gamma of 0 in channels \[3\]"):
        prune_into(teacher, build_gpt(plan.target, seed=1), plan, Groups.from_megatron())


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(ValueError, match=r"surgery.method=calibration is not known.*calibrated"):
        SurgeryConfig("calibration")
    with pytest.raises(ValueError, match=r"surgery.basis=rotated is not known"):
        SurgeryConfig(basis="rotated")
    with pytest.raises(ValueError, match=r"surgery.norm_scale=sizes is not known"):
        SurgeryConfig(norm_scale="sizes")


def basis_on_rank() -> tuple[int, Tensor]:
    """How many decompositions this rank made, and the basis it has."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        eigh = torch.linalg.eigh
        patch.setattr(torch.linalg, "eigh", lambda matrix: (made.append(1), eigh(matrix))[1])
        moment = torch.eye(7).cumsum(0) @ torch.eye(7).cumsum(0).t()
        basis = prune.shared_basis(lambda: principal_basis(moment, 3), 7, 3)
    return len(made), basis


def test_ranks_share_one_decomposition(ranks: Ranks) -> None:
    (first, basis), (second, other) = ranks("dp2").run(basis_on_rank)
    assert (first, second) == (1, 0)
    assert torch.equal(basis, other) and basis.dtype == torch.float64


def test_a_basis_is_checked_once_until_its_values_change(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, products = turned(TINY), []
    double = Tensor.double
    monkeypatch.setattr(Tensor, "double", lambda tensor: (products.append(1), double(tensor))[1])
    again = dataclasses.replace(dataclasses.replace(plan, origin={"a": 1}), origin={})
    assert not products
    again.hidden[0] += 1
    with pytest.raises(ValueError, match="columns are not orthonormal"):
        dataclasses.replace(again, origin={"a": 1})


def moment_of(size: int, rank: int, seed: int) -> Tensor:
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.t() @ rows


def missed(basis: Tensor, moment: Tensor, reading: Tensor) -> float:
    """Of x^T M x what the best linear map of Q^T x leaves: tr(M (C - C Q (Q^T C Q)^-1 Q^T C))."""
    seen = moment @ basis
    return float((reading * (moment - seen @ torch.linalg.solve(basis.t() @ seen, seen.t()))).sum())


def test_axes_that_are_read_leave_less_to_a_linear_map_than_any_others() -> None:
    moment, reading, generator = moment_of(12, 40, 1), moment_of(12, 30, 2), torch.Generator().manual_seed(3)
    moment[:3] *= 5  # what there is most of is not what is read most
    moment[:, :3] *= 5
    best = read_basis(moment, reading, 5)
    assert_close(best.t() @ best, torch.eye(5, dtype=torch.float64))
    least = missed(best, moment, reading)
    assert least < 0.7 * missed(principal_basis(moment, 5), moment, reading)
    for size in (1e-3, 0.1, 10.0):
        other = best + size * torch.randn(12, 5, generator=generator, dtype=torch.float64)
        assert missed(other, moment, reading) > least


def test_what_nobody_reads_is_left_out_however_much_there_is() -> None:
    moment, reading = moment_of(12, 40, 1), torch.zeros(12, 12, dtype=torch.float64)
    reading[:4, :4] = moment_of(4, 9, 2)
    moment[4:, 4:] *= 100
    basis = read_basis(moment, reading, 4)
    assert_close(basis[4:], torch.zeros(8, 4, dtype=torch.float64), atol=1e-9, rtol=0)


def reading_on_rank(source: ModelShape) -> Tensor:
    moment = moment_of(source.hidden_size, 50, 4)
    return reading_moment(build_gpt(source), turned(source), moment, Groups.from_megatron())


READERS = {
    "input_layernorm": ("self_attention.linear_qkv",),
    "pre_mlp_layernorm": ("mlp.linear_fc1",),
}


@pytest.mark.parametrize("architecture", ["llama", "tied", "qwen2"])
def test_what_is_read_is_the_mean_over_norms_of_what_their_readers_read(architecture: str) -> None:
    source = ARCHITECTURES[architecture]
    moment, model = moment_of(source.hidden_size, 50, 4), build_gpt(source)
    weights = {name: full.double() for name, full in stream_full_parameters(model, source, Groups.from_megatron())}
    expected = torch.zeros_like(moment)

    def add(norm: str, reader: str) -> None:
        read = weights[reader] * weights[norm]
        gram = read.t() @ read
        expected.add_(gram / (gram * moment).sum())

    for layer in range(source.num_layers):
        for norm, (reader,) in READERS.items():
            add(f"decoder.layers.{layer}.{norm}.weight", f"decoder.layers.{layer}.{reader}.weight")
    tied = source.share_embeddings_and_output_weights
    add("decoder.final_layernorm.weight", "embedding.word_embeddings.weight" if tied else "output_layer.weight")
    assert_close(reading_on_rank(source), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2-ep2"])
def test_what_is_read_is_the_same_on_every_layout(ranks: Ranks, layout: str) -> None:
    source = ARCHITECTURES["experts" if "ep2" in layout else "tied"]
    expected = reading_on_rank(source)
    for found in ranks(layout).run(reading_on_rank, source):
        assert_close(found, expected, rtol=1e-5, atol=1e-9)
