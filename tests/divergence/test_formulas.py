"""Claims about every divergence: values and gradients, from whole logits and from hidden states, on every layout."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence import streamed as whole
from minitron_nemo.divergence.agreement import max_of_rows
from minitron_nemo.divergence.fused_linear import (
    OutputHead,
    fused_linear_divergence,
    fused_linear_loss,
    vocabulary_like,
)
from minitron_nemo.divergence.streamed import divergence, forward_kl, top_k_of_teacher
from minitron_nemo.divergence.top_k import TopKTeacher
from support.ranks import Ranks

S, B, V, REAL = 8, 3, 56, 51  # V is padded to split over 4; the last rank of 4 holds 9 real columns of 14
H_STUDENT, H_TEACHER = 10, 13
K = 5

KINDS = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {},
    "jensen_shannon": {"beta": 0.3},
    "cosine": {},
    "mse": {},
    "top_k": {"k": K},
    "top_k renormalised": {"k": K, "tail": "renormalised"},
}
SETTINGS = {
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold, bare": {"temperature": 0.5, "scale_by_temperature_squared": False},
    "capped": {
        "temperature": 2.0,
        "student_softcap": 5.0,
        "teacher_softcap": 7.0,
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
    },
}


def config_of(kind: str, **settings: Any) -> DivergenceConfig:
    return DivergenceConfig(kind=kind.split()[0], **KINDS[kind], **settings)


def by_hand(student: Tensor, teacher: Tensor, config: DivergenceConfig, vocab_size: int) -> Tensor:
    """Whole logits [s, b, v], for autograd; in their own precision."""
    student = as_scores(student[..., :vocab_size], config.student_logit_scale, config.student_softcap)
    teacher = as_scores(teacher[..., :vocab_size], config.teacher_logit_scale, config.teacher_softcap)
    student, teacher = student / config.temperature, teacher / config.temperature
    log_p_s, log_p_t = student.log_softmax(-1), teacher.log_softmax(-1)
    top = teacher.topk(config.k).indices
    if config.kind == "forward_kl":
        value = kl(log_p_t, log_p_s)
    elif config.kind == "reverse_kl":
        value = kl(log_p_s, log_p_t)
    elif config.kind == "symmetric_kl":
        value = (kl(log_p_t, log_p_s) + kl(log_p_s, log_p_t)) / 2
    elif config.kind == "jensen_shannon":
        log_m = (config.beta * log_p_t.exp() + (1 - config.beta) * log_p_s.exp()).log()
        value = config.beta * kl(log_p_t, log_m) + (1 - config.beta) * kl(log_p_s, log_m)
    elif config.kind == "cosine":
        value = 1 - F.cosine_similarity(student, teacher, dim=-1)
    elif config.kind == "mse":
        value = F.mse_loss(student, teacher, reduction="none").mean(-1)
    elif config.tail == "renormalised":
        value = kl(teacher.gather(-1, top).log_softmax(-1), student.gather(-1, top).log_softmax(-1))
    else:
        value = kl(outcomes(log_p_t, top), outcomes(log_p_s, top))
    return value * (config.temperature**2 if config.scale_by_temperature_squared else 1.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def outcomes(log_p: Tensor, top: Tensor) -> Tensor:
    """The k tokens and all others as one."""
    others = torch.ones_like(log_p).scatter(-1, top, 0.0)
    return torch.cat([log_p.gather(-1, top), (log_p.exp() * others).sum(-1, keepdim=True).log()], -1)


def as_scores(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(scale * logits / softcap) if softcap is not None else scale * logits


def cross_entropy_by_hand(student: Tensor, labels: Tensor, config: DivergenceConfig, vocab_size: int) -> Tensor:
    scores = as_scores(student[..., :vocab_size], config.student_logit_scale, config.student_softcap)
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view(S, B)


@dataclasses.dataclass
class Case:
    """Hidden states, output weights, labels, weights of divergence and cross-entropy, float64."""

    student: OutputHead
    teacher: OutputHead
    labels: Tensor
    weights: Tensor  # [2, s, b]

    @classmethod
    def random(cls, seed: int = 0) -> Case:
        g = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        labels = torch.randint(REAL, (S, B), generator=g)
        labels[1, 2] = -100
        weights = torch.rand(2, S, B, generator=g, dtype=torch.float64)
        weights[0, 3] = 0  # a masked row
        return cls(
            OutputHead(normal(S, B, H_STUDENT), normal(V, H_STUDENT)),
            OutputHead(normal(S, B, H_TEACHER), normal(V, H_TEACHER)),
            labels,
            weights,
        )

    def to(self, dtype: torch.dtype) -> Case:
        heads = [OutputHead(*(tensor.to(dtype) for tensor in head)) for head in (self.student, self.teacher)]
        return Case(*heads, self.labels, self.weights)

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.student.hidden @ self.student.weight.t(), self.teacher.hidden @ self.teacher.weight.t()


@dataclasses.dataclass
class Expected:
    """What autograd makes of whole float64 logits in one process."""

    divergence: Tensor
    cross_entropy: Tensor
    gradients: list[Tensor]

    @classmethod
    def of(cls, case: Case, config: DivergenceConfig, *leaves: Tensor) -> Expected:
        """Gradients of the weighted sum with respect to `leaves`: the student's logits, or its hidden and weight."""
        leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
        student = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].t()
        teacher = case.logits()[1]
        value = by_hand(student, teacher, config, REAL)
        ce = cross_entropy_by_hand(student, case.labels, config, REAL)
        weighted = (case.weights[0] * value + case.weights[1] * ce).sum()
        return cls(value.detach(), ce.detach(), list(torch.autograd.grad(weighted, leaves)))


def assert_near(actual: Tensor, expected: Tensor, what: str, *, rtol: float) -> None:
    # Where terms of both signs add up, the rounding is that of the largest of them.
    atol = rtol * expected.abs().max().item() / 10
    assert_close(actual.double(), expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


VALUES, GRADIENTS = 1e-6, 1e-5
EVERY = [(kind, setting) for kind in KINDS for setting in SETTINGS]


@pytest.mark.parametrize(("kind", "setting"), EVERY)
@pytest.mark.parametrize("chunk_elements", [5 * V, 1 << 22])  # 24 tokens do not divide by 5; all at once
def test_values_and_gradients_match_autograd_in_float64(
    monkeypatch: pytest.MonkeyPatch, kind: str, setting: str, chunk_elements: int
) -> None:
    monkeypatch.setattr(whole, "CHUNK_ELEMENTS", chunk_elements)
    config, case = config_of(kind, **SETTINGS[setting]), Case.random()
    student, teacher = (logits.float() for logits in case.logits())
    case.logits = lambda: (student.double(), teacher.double())  # type: ignore[method-assign]
    expected = Expected.of(case, config, student)
    before = student.clone(), teacher.clone()
    student.requires_grad_()

    losses = divergence(student, teacher, config, tp_group=None, vocab_size=REAL, labels=case.labels)
    (gradient,) = torch.autograd.grad(list(losses), student, list(case.weights.float()))

    assert losses.divergence.dtype == torch.float32
    assert_near(losses.divergence, expected.divergence, "divergence", rtol=VALUES)
    assert_near(losses.cross_entropy, expected.cross_entropy, "cross-entropy", rtol=VALUES)
    assert_near(gradient, expected.gradients[0], "gradient", rtol=GRADIENTS)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1]), "the logits were overwritten"


def shard(tensor: Tensor, dim: int, group: Any) -> Tensor:
    return tensor.chunk(group.size(), dim)[group.rank()] if group is not None else tensor


def gradients_of(outputs: list[Tensor], weights: list[Tensor], leaves: Iterable[Tensor]) -> list[Tensor | None]:
    """As Megatron's schedules differentiate; through torch.autograd.grad, its reduce-scatter would ask for a device."""
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(outputs), tuple(weights), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    return [leaf.grad for leaf in leaves]


def check_hidden(
    case: Case, config: DivergenceConfig, group: Any, *, sequence_parallel: bool = False, tokens_per_chunk: int = 7
) -> None:
    """Both ways from hidden states, on this rank's part of them, against whole logits in one process."""
    expected = Expected.of(case, config, *case.student)
    of_hidden, of_weight = expected.gradients
    split = group if sequence_parallel else None
    if sequence_parallel:
        of_hidden = shard(of_hidden, 0, group)
    of_weight = shard(of_weight, 0, group)
    student, teacher = (
        OutputHead(shard(hidden, 0, split).clone().requires_grad_(), shard(weight, 0, group).clone().requires_grad_())
        for hidden, weight in (case.student, case.teacher)
    )
    options: dict[str, Any] = {
        "tp_group": group,
        "vocab_size": REAL,
        "labels": case.labels,
        "sequence_parallel": sequence_parallel,
        "tokens_per_chunk": tokens_per_chunk,
    }

    losses = fused_linear_divergence(student, teacher, config, **options)
    gradients = gradients_of(list(losses[:2]), list(case.weights), student)
    assert teacher.hidden.grad is None and teacher.weight.grad is None
    assert_near(losses.divergence, expected.divergence, "divergence", rtol=VALUES)
    assert_near(losses.cross_entropy, expected.cross_entropy, "cross-entropy", rtol=VALUES)
    assert_near(gradients[0], of_hidden, "hidden's gradient", rtol=GRADIENTS)
    assert_near(gradients[1], of_weight, "weight's gradient", rtol=GRADIENTS)

    # The other way has one weight for both losses.
    case = dataclasses.replace(case, weights=torch.stack([case.weights[0], 0.3 * case.weights[0]]))
    expected = Expected.of(case, config, *case.student)
    of_hidden, of_weight = expected.gradients
    loss = fused_linear_loss(student, teacher, config, case.weights[0], cross_entropy_weight=0.3, **options)
    total = (case.weights[0] * (expected.divergence + 0.3 * expected.cross_entropy)).sum()
    gradients = gradients_of([loss.total], [torch.tensor(-3.0, dtype=torch.float64)], student)
    assert_near(loss.total, total, "total", rtol=VALUES)
    assert_near(loss.divergence, expected.divergence, "divergence of the loss", rtol=VALUES)
    assert_near(loss.cross_entropy, expected.cross_entropy, "cross-entropy of the loss", rtol=VALUES)
    of_hidden = shard(of_hidden, 0, group) if sequence_parallel else of_hidden
    assert_near(gradients[0], -3 * of_hidden, "hidden's gradient of the loss", rtol=GRADIENTS)
    assert_near(gradients[1], -3 * shard(of_weight, 0, group), "weight's gradient of the loss", rtol=GRADIENTS)


@pytest.mark.parametrize(("kind", "setting"), EVERY)
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 8, 100])
def test_hidden_states_give_what_whole_logits_give(kind: str, setting: str, tokens_per_chunk: int) -> None:
    check_hidden(Case.random(1), config_of(kind, **SETTINGS[setting]), None, tokens_per_chunk=tokens_per_chunk)


def check_on_ranks() -> None:
    """On a rank: everything above on a vocabulary split over tp, with and without sequence parallelism."""
    group = parallel_state.get_tensor_model_parallel_group()
    for number, kind in enumerate(KINDS):
        config, case = config_of(kind, **SETTINGS["capped"]), Case.random(2)
        expected = Expected.of(case, config, case.logits()[0])
        student, teacher = (shard(logits, -1, group).clone() for logits in case.logits())
        student.requires_grad_()
        losses = divergence(student, teacher, config, tp_group=group, vocab_size=REAL, labels=case.labels)
        (gradient,) = torch.autograd.grad(list(losses), student, list(case.weights))
        assert_near(losses.divergence, expected.divergence, kind, rtol=VALUES)
        assert_near(losses.cross_entropy, expected.cross_entropy, kind, rtol=VALUES)
        assert_near(gradient, shard(expected.gradients[0], -1, group), kind, rtol=GRADIENTS)
        check_hidden(case, config, group, sequence_parallel=number % 2 == 0, tokens_per_chunk=13)
    check_a_rank_of_padding_alone(group)
    check_another_padding(group)
    check_agreement(group)
    check_near_and_far_over_ranks(group)


def check_a_rank_of_padding_alone(group: Any) -> None:
    student, teacher = Case.random(3).logits()
    for kind in KINDS:
        local = shard(student, -1, group).clone().requires_grad_()
        value = divergence(
            local, shard(teacher, -1, group), config_of(kind), tp_group=group, vocab_size=V // group.size() - 1
        ).divergence
        (gradient,) = torch.autograd.grad(value.sum(), local)
        expected = by_hand(student, teacher, config_of(kind), V // group.size() - 1)
        assert_near(value, expected, f"{kind}, a rank of padding", rtol=VALUES)
        assert gradient.isfinite().all() and (group.rank() == 0) == bool(gradient.any()), kind


def check_near_and_far_over_ranks(group: Any) -> None:
    """Where each rank's sum of exponentials is scaled by a factor of its own: a small divergence stays accurate, and a
    large one exact where a rank's whole vocabulary has a probability that float32 cannot hold.
    """
    g = torch.Generator().manual_seed(5)
    teacher = 20 + 3 * torch.randn(S, B, 4096, generator=g)
    near = teacher + 3e-3 * torch.randn(S, B, 4096, generator=g)
    far = 3 * torch.randn(S, B, 4096, generator=g)
    far.chunk(group.size(), -1)[-1].sub_(300.0)
    for kind, pair in itertools.product(("forward_kl", "reverse_kl", "jensen_shannon"), ("near", "far", "from far")):
        student, of_teacher = {"near": (near, teacher), "far": (far, teacher), "from far": (teacher, far)}[pair]
        expected = by_hand(student.double(), of_teacher.double(), config_of(kind), 4096)
        local = shard(student, -1, group), shard(of_teacher, -1, group)
        value = divergence(*local, config_of(kind), tp_group=group).divergence.double()
        assert (value - expected).abs().max() < (1e-7 if pair == "near" else 1e-6 * expected.max()), (kind, pair)


def check_another_padding(group: Any) -> None:
    """A teacher padded to 64 where the student is padded to 56."""
    case = Case.random(4)
    student = OutputHead(case.student.hidden, shard(case.student.weight, 0, group))
    padded = F.pad(case.teacher.weight, (0, 0, 0, 8), value=float("nan"))
    teacher_weight = vocabulary_like(shard(padded, 0, group), student.weight.shape[0], tp_group=group)
    teacher = OutputHead(case.teacher.hidden, teacher_weight)
    losses = fused_linear_divergence(student, teacher, config_of("forward_kl"), tp_group=group, vocab_size=REAL)
    expected = by_hand(*case.logits(), config_of("forward_kl"), REAL)
    assert_near(losses.divergence, expected, "another padding", rtol=VALUES)


def check_agreement(group: Any) -> None:
    """Both ways, of a teacher whose likeliest token is the student's for some tokens and not for others."""
    case = Case.random(7)
    teacher = OutputHead(case.student.hidden, case.student.weight + 0.5 * Case.random(8).student.weight)
    teacher.weight[REAL:] *= 100  # padding that would win
    teacher.weight[40], teacher.weight[45] = teacher.weight[3], teacher.weight[4]  # ties across ranks: the first counts
    student_logits, teacher_logits = (head.hidden @ head.weight[:REAL].t() for head in (case.student, teacher))
    expected = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()
    assert 0.2 < expected.mean() < 0.8 and (teacher_logits.argmax(-1) <= 4).any()
    heads = [OutputHead(head.hidden, shard(head.weight, 0, group)) for head in (case.student, teacher)]
    for kind in ("forward_kl", "cosine", "top_k"):
        options: dict[str, Any] = {"tp_group": group, "vocab_size": REAL, "tokens_per_chunk": 7, "with_agreement": True}
        assert torch.equal(fused_linear_divergence(*heads, config_of(kind), **options).agreement, expected), kind
        loss = fused_linear_loss(heads[0], heads[1], config_of(kind), case.weights[0], **options)
        assert torch.equal(loss.agreement, expected), kind


def test_agreement_is_where_both_models_find_the_same_token_likeliest() -> None:
    check_agreement(None)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 1000, 0])
def test_the_maximum_of_blocks_is_the_first_maximum_of_the_row(columns: int) -> None:
    rows = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)).mul(2).round()  # many ties
    values, first = max_of_rows(rows)
    if columns == 0:
        assert torch.equal(values, torch.full((5,), float("-inf"))) and torch.equal(first, torch.zeros(5).long())
    else:
        assert torch.equal(values, rows.amax(-1)) and torch.equal(first, rows.argmax(-1))


@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_a_split_vocabulary_changes_no_value_and_no_gradient(ranks: Ranks, layout: str) -> None:
    ranks(layout).run(check_on_ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(kind: str) -> None:
    config = config_of(kind, **SETTINGS["capped"])
    case = Case.random(5)
    few = [OutputHead(head.hidden[:2, :1].clone(), head.weight[:11].clone()) for head in (case.student, case.teacher)]
    student, teacher = few
    labels = case.labels[:2, :1] % 9

    def from_logits(logits: Tensor) -> tuple[Tensor, ...]:
        return divergence(
            logits, teacher.hidden @ teacher.weight.t(), config, tp_group=None, vocab_size=9, labels=labels
        )

    def from_hidden(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"tp_group": None, "vocab_size": 9, "labels": labels, "tokens_per_chunk": 1}
        return fused_linear_divergence(OutputHead(hidden, weight), teacher, config, **options)[:2]

    assert torch.autograd.gradcheck(from_logits, (student.hidden @ student.weight.t()).requires_grad_())
    assert torch.autograd.gradcheck(from_hidden, [tensor.requires_grad_() for tensor in student])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence_is_zero_when_student_is_teacher(kind: str, dtype: torch.dtype, temperature: float) -> None:
    config, logits = config_of(kind, temperature=temperature), (3 * Case.random(6).logits()[0]).to(dtype)
    student = logits.clone().requires_grad_()
    value = divergence(student, logits, config, tp_group=None, vocab_size=REAL).divergence
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.count_nonzero() == 0 and gradient.count_nonzero() == 0


@pytest.mark.parametrize("kind", ["reverse_kl", "symmetric_kl", "jensen_shannon", "cosine"])
def test_a_student_near_its_teacher_has_accurate_divergences(kind: str) -> None:
    """Rounding in the sums over a large vocabulary must not swamp a small divergence."""
    generator = torch.Generator().manual_seed(7)
    teacher = 20 + 3 * torch.randn(4, 16, 4096, generator=generator)
    student = teacher + 3e-3 * torch.randn(4, 16, 4096, generator=generator)
    expected = by_hand(student.double(), teacher.double(), config_of(kind), 4096)
    value = divergence(student, teacher, config_of(kind), tp_group=None).divergence
    assert_close(value.double(), expected, rtol=1e-3, atol=5e-8)  # rounding of single exponentials


@pytest.mark.parametrize("kind", ["reverse_kl", "symmetric_kl", "jensen_shannon", "top_k"])
def test_divergences_of_distant_distributions_are_finite(kind: str) -> None:
    teacher, student = torch.zeros(1, 1, V), torch.zeros(1, 1, V)
    teacher[..., 0], student[..., 9] = 300.0, 300.0  # probabilities that float32 cannot hold
    value = divergence(student.requires_grad_(), teacher, config_of(kind), tp_group=None).divergence
    (gradient,) = torch.autograd.grad(value.sum(), student)
    config = config_of(kind)
    assert_close(value.double(), by_hand(student.double(), teacher.double(), config, V), rtol=1e-6, atol=1e-12)
    assert gradient.isfinite().all()


# ---- top-k -----------------------------------------------------------------------------------------------------------


def test_top_k_of_the_whole_vocabulary_is_forward_kl() -> None:
    student, teacher = (logits.float().requires_grad_() for logits in Case.random(8).logits())
    top_k = DivergenceConfig(kind="top_k", k=REAL, temperature=2.0)
    value = divergence(student, teacher, top_k, tp_group=None, vocab_size=REAL).divergence
    expected = forward_kl(student, teacher, temperature=2.0, tp_group=None, vocab_size=REAL)
    assert_close(value, expected, rtol=2e-6, atol=1e-6)
    gradients = [torch.autograd.grad(losses.sum(), student)[0] for losses in (value, expected)]
    assert_close(*gradients, rtol=GRADIENTS, atol=1e-6)


def test_top_k_with_the_true_tail_is_a_lower_bound_of_forward_kl() -> None:
    student, teacher = Case.random(9).logits()
    values = [
        divergence(student, teacher, DivergenceConfig(kind="top_k", k=k), tp_group=None).divergence
        for k in (1, 2, 5, 20, V)
    ]
    assert all((less <= more + 1e-12).all() for less, more in itertools.pairwise(values))


@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
def test_a_stored_teacher_gives_what_its_logits_give(tail: str) -> None:
    case = Case.random(10)
    student, teacher = case.logits()
    config = DivergenceConfig(kind="top_k", k=K, tail=tail, temperature=1.5)
    expected = divergence(student, teacher, config, tp_group=None, vocab_size=REAL).divergence
    log_p = (teacher[..., :REAL] / 1.5).log_softmax(-1)
    stored = log_p.topk(K)
    tail_mass = 1 - stored.values.exp().sum(-1)
    answers = {
        "of the online teacher": top_k_of_teacher(teacher, config, tp_group=None, vocab_size=REAL),
        "log-probabilities": TopKTeacher(stored.indices, stored.values, tail_mass.log(), 1.5),
        "logits": TopKTeacher.from_logits(stored.indices, teacher.gather(-1, stored.indices), tail_mass, 1.5),
    }
    for what, answer in answers.items():
        value = divergence(student, answer, config, tp_group=None, vocab_size=REAL).divergence
        assert_near(value, expected, what, rtol=VALUES)
        value = fused_linear_divergence(
            case.student, answer, config, tp_group=None, vocab_size=REAL, tokens_per_chunk=7
        ).divergence
        assert_near(value, expected, f"{what}, from hidden states", rtol=VALUES)


# ---- memory and precision of the weight's gradient -------------------------------------------------------------------


def test_bf16_hidden_states_have_float32_losses_and_a_weight_gradient_summed_in_float32() -> None:
    g = torch.Generator().manual_seed(11)
    hidden = torch.randn(64, 16, 8, generator=g)
    student = OutputHead(hidden.bfloat16().requires_grad_(), torch.randn(V, 8, generator=g).bfloat16().requires_grad_())
    teacher = OutputHead((hidden + 1).bfloat16(), torch.randn(V, 8, generator=g).bfloat16())
    weights = torch.rand(64, 16, generator=g)
    gradients = []
    for tokens_per_chunk in (8, 1024):  # 128 chunks; one, whose product is summed in float32 by itself
        loss = fused_linear_loss(
            student, teacher, DivergenceConfig(), weights, tp_group=None, tokens_per_chunk=tokens_per_chunk
        )
        assert loss.total.dtype == loss.divergence.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss.total, student))
        assert [gradient.dtype for gradient in gradients[-1]] == [torch.bfloat16] * 2
    many, one = (of_weight.float() for _, of_weight in gradients)
    assert (many - one).norm() < 0.004 * one.norm()  # bf16 keeps 8 bits; 128 sums in bf16 would be off by over 1%


def test_autocast_is_that_of_a_linear_layer() -> None:
    case = Case.random(12).to(torch.float32)
    student = OutputHead(*(tensor.requires_grad_() for tensor in case.student))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_loss(
            student, case.teacher, DivergenceConfig(), case.weights[0], tp_group=None, vocab_size=REAL
        )
        loss.total.backward()
        logits = [F.linear(*head) for head in (student, case.teacher)]
    assert_close(loss.divergence, forward_kl(*logits, tp_group=None, vocab_size=REAL))
    assert student.weight.grad is not None and student.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("tokens_per_chunk", [7, 100])
@pytest.mark.parametrize("known_in_backward", [False, True])
@pytest.mark.parametrize(("dtype", "main_dtype"), list(itertools.product([torch.float32, torch.bfloat16], repeat=2)))
def test_the_weight_gradient_is_added_to_main_grad_where_megatron_asks_for_it(
    dtype: torch.dtype, main_dtype: torch.dtype, known_in_backward: bool, tokens_per_chunk: int
) -> None:
    case = Case.random(13).to(dtype)
    weight, factor, mask = torch.nn.Parameter(case.student.weight), torch.tensor(0.3), case.weights[0].float()
    heads = OutputHead(case.student.hidden.requires_grad_(), weight), case.teacher
    options: dict[str, Any] = {"tp_group": None, "vocab_size": REAL, "tokens_per_chunk": tokens_per_chunk}

    def gradient(fusion: bool) -> Tensor | None:
        options["gradient_accumulation_fusion"], weight.grad = fusion, None
        if known_in_backward:
            per_token = fused_linear_divergence(*heads, DivergenceConfig(), **options).divergence
            (per_token * mask * factor).sum().backward()
        else:
            (fused_linear_loss(*heads, DivergenceConfig(), mask, **options).total * factor).backward()
        return weight.grad

    expected = gradient(fusion=False)
    assert expected is not None
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight, dtype=main_dtype), False
    dummy = gradient(fusion=True)
    # In bf16 the gradient is rounded, and 1 more than it.
    rounding = {"rtol": 2e-5, "atol": 2e-6} if dtype == main_dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    assert_close(weight.main_grad, (1 + expected.double()).to(main_dtype), **rounding)
    assert weight.grad_added_to_main_grad and dummy is not None and not dummy.any()


def test_a_tied_weight_gets_the_gradient_of_both_its_uses() -> None:
    case = Case.random(14)
    weight = case.student.weight.clone().requires_grad_()
    tokens = case.labels.clamp_min(0)

    def total(fused: bool) -> Tensor:
        hidden = F.embedding(tokens, weight).tanh()
        if fused:
            student = OutputHead(hidden, weight)
            return fused_linear_loss(
                student, case.teacher, DivergenceConfig(), case.weights[0], tp_group=None, tokens_per_chunk=7
            ).total
        return (case.weights[0] * by_hand(hidden @ weight.t(), case.logits()[1], DivergenceConfig(), V)).sum()

    ours, expected = (torch.autograd.grad(total(fused), weight)[0] for fused in (True, False))
    assert_near(ours, expected, "tied weight", rtol=GRADIENTS)


def test_one_chunk_of_logits_is_alive_at_a_time() -> None:
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            # A transposed weight is as wide, but is no logits.
            if (
                isinstance(result, Tensor)
                and result.shape[-1:] == (V,)
                and result.shape[0] not in (H_STUDENT, H_TEACHER)
            ):
                largest = max(largest, result.shape.numel())
            return result

    case = Case.random(15)
    with Watch():
        fused_linear_loss(
            OutputHead(*(tensor.requires_grad_() for tensor in case.student)),
            case.teacher,
            DivergenceConfig(),
            case.weights[0],
            tp_group=None,
            tokens_per_chunk=4,
        ).total.backward()
    assert 0 < largest <= 4 * V


@pytest.mark.parametrize(("main_dtype", "buffers"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_a_gradient_known_in_backward_is_summed_up_in_main_grad_itself(main_dtype: torch.dtype, buffers: int) -> None:
    """Unless sums of chunks would be rounded there."""
    case, weights = Case.random(17).to(torch.float32), Case.random().weights[0].float()
    weight = torch.nn.Parameter(case.student.weight)
    heads = OutputHead(case.student.hidden, weight), case.teacher
    (expected,) = torch.autograd.grad(
        fused_linear_loss(*heads, DivergenceConfig(), weights, tp_group=None).total, weight
    )
    weight.main_grad = torch.zeros_like(weight, dtype=main_dtype)
    known, made = {tensor.untyped_storage().data_ptr() for tensor in (weight, weight.main_grad)}, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == weight.shape:
                made.append(result.untyped_storage().data_ptr())
            return result

    options: dict[str, Any] = {"tp_group": None, "gradient_accumulation_fusion": True, "tokens_per_chunk": 4}
    losses = fused_linear_divergence(*heads, DivergenceConfig(), **options)
    with Watch():
        losses.divergence.backward(weights)
    assert made and len(set(made) - known) == buffers
    assert_close(weight.main_grad, expected.to(main_dtype), rtol=1e-5 if buffers == 0 else 2**-8, atol=1e-6)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def check_kernels() -> None:
    """In a process where Triton interprets: forward KL and cross-entropy as the kernels compute them, on the CPU."""
    from minitron_nemo.divergence import triton_kernels

    calls, chunk_losses = [0], triton_kernels.chunk_losses

    def counted(*arguments: Any) -> Tensor:
        calls[0] += 1
        return chunk_losses(*arguments)

    triton_kernels.chunk_losses = counted
    triton_kernels.BLOCK = 32  # two blocks, the last with columns past the end
    for setting, dtype in (("plain", torch.bfloat16), ("hot", torch.float32), ("capped", torch.float32)):
        config, case = config_of("forward_kl", **SETTINGS[setting]), Case.random()
        student, teacher = (logits.to(dtype) for logits in case.logits())
        case.logits = lambda pair=(student, teacher): [logits.double() for logits in pair]  # type: ignore[method-assign]
        expected = Expected.of(case, config, student)
        student.requires_grad_()
        losses = divergence(student, teacher, config, tp_group=None, vocab_size=REAL, labels=case.labels)
        (gradient,) = torch.autograd.grad(list(losses), student, list(case.weights.float()))
        assert_near(losses.divergence, expected.divergence, f"kernel, {setting}, {dtype}", rtol=2e-6)
        assert_near(losses.cross_entropy, expected.cross_entropy, f"kernel, {setting}, {dtype}", rtol=2e-6)
        rtol = GRADIENTS if dtype == torch.float32 else 1e-2  # the interpreter cuts bf16 off
        assert_near(gradient, expected.gradients[0], f"kernel, {setting}, {dtype}", rtol=rtol)
        case = case.to(torch.float32)
        whole_value = by_hand(*(logits.double() for logits in case.logits()), config, REAL)
        loss = fused_linear_loss(
            OutputHead(*(tensor.requires_grad_() for tensor in case.student)),
            case.teacher,
            config,
            case.weights[0].float(),
            tp_group=None,
            vocab_size=REAL,
            tokens_per_chunk=7,
        )
        loss.total.backward()
        assert_near(loss.divergence, whole_value, f"kernel from hidden states, {setting}", rtol=5e-6)
    student, _ = Case.random().logits()
    same = student.float()
    assert not divergence(same, same.clone(), DivergenceConfig(), tp_group=None).divergence.any()
    assert calls[0] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")
def test_the_kernels_give_what_autograd_gives_in_float64() -> None:
    # TRITON_INTERPRET is read when the kernels are made, so a process of its own.
    tests = Path(__file__).parents[1]
    code = "from distillation.test_divergence_kinds import check_kernels; check_kernels()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- what cannot work is named ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "forward"}, r"divergence\.kind=forward is not known; did you mean forward_kl\?"),
        ({"kind": "jensen_shannon", "beta": 1.0}, r"divergence\.beta=1.0 must be between 0 and 1"),
        ({"kind": "top_k"}, r"divergence\.k=0 must be at least 1 for kind=top_k"),
        ({"k": 5}, r"divergence\.k=5 is read by kind=top_k only, and the kind is forward_kl"),
        ({"tail": "cut"}, r"divergence\.tail=cut is not known"),
        ({"temperature": -1.0}, r"divergence\.temperature=-1.0 must be above 0"),
        ({"student_softcap": 0.0}, r"divergence\.student_softcap=0.0 must be above 0, or null"),
        ({"teacher_logit_scale": 0.0}, r"divergence\.teacher_logit_scale=0.0 must be above 0"),
    ],
)
def test_configs_that_cannot_work_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DivergenceConfig(**arguments)


def test_inputs_that_do_not_fit_are_named() -> None:
    case = Case.random(16)
    student, teacher = case.logits()
    top_k = DivergenceConfig(kind="top_k", k=K)
    stored = top_k_of_teacher(teacher, top_k, tp_group=None)

    def fused(**changes: Any) -> None:
        arguments = {"student": case.student, "teacher": case.teacher, "config": DivergenceConfig(), "tp_group": None}
        fused_linear_divergence(**arguments | changes)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"teacher's output weight has 40 rows .* the student's 56"):
        fused(teacher=OutputHead(case.teacher.hidden, case.teacher.weight[:40]))
    with pytest.raises(ValueError, match=r"student has tokens \[8, 3\], the teacher \[4, 3\]"):
        fused(teacher=OutputHead(case.teacher.hidden[:4], case.teacher.weight))
    with pytest.raises(ValueError, match=r"known by its likeliest tokens only, and divergence.kind=forward_kl"):
        fused(teacher=stored)
    with pytest.raises(ValueError, match=r"divergence.k=6; read the same tokens"):
        fused(teacher=stored, config=DivergenceConfig(kind="top_k", k=6))
    with pytest.raises(ValueError, match=r"tail mass is of temperature 1.0, and divergence.temperature=2.0"):
        fused(teacher=stored, config=DivergenceConfig(kind="top_k", k=K, temperature=2.0))
    with pytest.raises(ValueError, match=r"divergence.k=57 is more than the vocabulary has: 56 tokens"):
        divergence(student, teacher, DivergenceConfig(kind="top_k", k=57), tp_group=None)
    with pytest.raises(ValueError, match=r"labels \[3, 8\] are not one a token \[8, 3\]"):
        fused(labels=case.labels.t())
    with pytest.raises(ValueError, match=r"cross_entropy_weight=1.0 needs labels"):
        fused_linear_loss(case.student, case.teacher, top_k, case.weights[0], tp_group=None, cross_entropy_weight=1.0)


def test_logits_that_are_overwritten_before_the_backward_pass_are_noticed() -> None:
    student, teacher = Case.random(17).logits()
    student.requires_grad_()
    value = divergence(student, teacher, DivergenceConfig(), tp_group=None).divergence
    with torch.no_grad():
        student.zero_()  # as Megatron's cross-entropy overwrites what it is given
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_a_weighted_loss_cannot_be_differentiated_twice() -> None:
    case = Case.random(18)
    student = OutputHead(*(tensor.requires_grad_() for tensor in case.student))
    total = fused_linear_loss(student, case.teacher, DivergenceConfig(), case.weights[0], tp_group=None).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a second time"):
        total.backward()
