"""A token that cannot be said, and a label that is no token: nothing of them becomes NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from divergences_by_hand import KINDS, REAL, B, Case, S, V, config_of, gradients_of, shard
from megatron.core import parallel_state
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.divergence.cross_entropy import token_losses
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_divergence, fused_linear_loss
from minitron_nemo.divergence.streamed import divergence

MINUS_INFINITY = float("-inf")
OUTSIDE = REAL + 2
"""A row of the padded vocabulary that is no token."""


def forbidding(case: Case) -> tuple[Tensor, Tensor]:
    """Logits whose teacher never says some tokens, one of which the student never says either."""
    student, teacher = case.logits()
    teacher[0, 0, 7] = teacher[2, 1, :20] = MINUS_INFINITY
    student[2, 1, 3] = MINUS_INFINITY
    teacher[3] = student[3, :, 9] = MINUS_INFINITY
    teacher[3, :, 40:45] = 1.0  # all else is impossible: of a rank's part of the vocabulary everything
    return student, teacher


def safe_by_hand(kind: str, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Float64, autograd, where 0 log 0 is 0; a log-ratio of more than 1e4 nats counts as 1e4."""
    log_s, log_t = student[..., :REAL].log_softmax(-1), teacher[..., :REAL].log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    ratio = torch.where((p_s == 0) & (p_t == 0), 0.0, (log_t - log_s).clamp(-1e4, 1e4))
    if kind == "forward_kl":
        return (p_t * ratio).sum(-1)
    log_m = (beta * p_t + (1 - beta) * p_s).clamp_min(1e-300).log()
    of_teacher = torch.where(p_t > 0, p_t * (log_t.clamp_min(-1e4) - log_m), 0.0)
    of_student = torch.where(p_s > 0, p_s * (log_s.clamp_min(-1e4) - log_m), 0.0)
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_the_teacher_never_says_leaves_values_and_gradients_finite(kind: str, dtype: torch.dtype) -> None:
    config, case = config_of(kind), Case.random()
    student, teacher = (logits.to(dtype) for logits in forbidding(case))
    student.requires_grad_()
    losses = divergence(student, teacher, config, tp_group=None, vocab_size=REAL, labels=case.labels)
    (gradient,) = torch.autograd.grad(losses.divergence, student, case.weights[0].to(dtype))
    assert losses.divergence.isfinite().all() and gradient.isfinite().all()
    if kind in ("forward_kl", "jensen_shannon"):
        leaf = student.detach().double().masked_fill(student.detach() == MINUS_INFINITY, -3e4).requires_grad_()
        expected = safe_by_hand(kind, leaf, teacher.double(), config.beta)
        (expected_gradient,) = torch.autograd.grad(expected, leaf, case.weights[0])
        rtol = 1e-5 if dtype == torch.float32 else 1e-10
        assert_close(losses.divergence.double(), expected, rtol=rtol, atol=1e-6)
        assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-6)


def check_split_vocabulary() -> None:
    group, case = parallel_state.get_tensor_model_parallel_group(), Case.random()
    for kind in KINDS:
        whole = [logits.float() for logits in forbidding(case)]
        leaf, part = whole[0].requires_grad_(), shard(whole[0].detach(), -1, group).clone().requires_grad_()
        expected = divergence(leaf, whole[1], config_of(kind), tp_group=None, vocab_size=REAL).divergence
        teacher = shard(whole[1], -1, group).contiguous()
        found = divergence(part, teacher, config_of(kind), tp_group=group, vocab_size=REAL).divergence
        assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, kind=kind: f"{kind}: {text}")
        weights = case.weights[0].float()
        [of_part], [of_whole] = (
            gradients_of([each], [weights], [on]) for each, on in ((found, part), (expected, leaf))
        )
        assert of_part is not None and of_whole is not None and of_part.isfinite().all()
        assert_close(of_part, shard(of_whole, -1, group), rtol=1e-4, atol=1e-6)


def test_a_part_of_the_vocabulary_of_which_nothing_is_ever_said_changes_nothing(ranks: Any) -> None:
    ranks("tp2").run(check_split_vocabulary)


def never_said(case: Case) -> Case:
    """In float32, with a teacher whose output layer gives one token a logit of -inf."""
    case = case.to(torch.float32)
    weight = case.teacher.weight.clone()
    weight[7] = MINUS_INFINITY
    return Case(case.student, OutputHead(case.teacher.hidden.abs() + 0.1, weight), case.labels, case.weights)


@pytest.mark.parametrize("kind", ["forward_kl", "top_k"])
@pytest.mark.parametrize("label", [OUTSIDE, V + 5, -100])
def test_a_label_that_is_no_token_and_does_not_count_changes_no_loss_and_no_gradient(kind: str, label: int) -> None:
    case, config, found = never_said(Case.random()), config_of(kind), []
    weights = case.weights[0].clone()
    weights[1, 2] = 0
    for one in (label, 4):
        labels = case.labels.clone()
        labels[1, 2] = one
        student = OutputHead(*(tensor.clone().requires_grad_() for tensor in case.student))
        options: dict[str, Any] = {"tp_group": None, "vocab_size": REAL, "labels": labels}
        loss = fused_linear_loss(student, case.teacher, config, weights, cross_entropy_weight=0.3, **options)
        found.append([loss.total, *torch.autograd.grad(loss.total, list(student))])
        losses = fused_linear_divergence(student, case.teacher, config, **options)
        assert losses.cross_entropy is not None
        per_token = torch.where(weights > 0, weights * (losses.divergence + 0.3 * losses.cross_entropy), 0.0)
        found[-1] += [per_token.sum(), *torch.autograd.grad(per_token.sum(), list(student))]
    for of_label, of_token in zip(*found, strict=True):
        assert of_label.isfinite().all() and torch.equal(of_label, of_token)


def check_cross_entropy(of_padding: float) -> None:
    """Megatron's cross-entropy over the real rows of a padded, split vocabulary."""
    group, case = parallel_state.get_tensor_model_parallel_group(), Case.random()
    logits = case.logits()[0].transpose(0, 1).contiguous()  # [b, s, v]
    logits[..., REAL:] = of_padding
    labels = torch.randint(REAL, (B, S), generator=torch.Generator().manual_seed(1))
    labels[0, 1], labels[2, 3], labels[1, 1] = OUTSIDE, V + 5, -100
    leaf, part = logits[..., :REAL].clone().requires_grad_(), shard(logits.float(), -1, group).clone()
    known = (labels >= 0) & (labels < REAL)
    expected = F.cross_entropy(leaf.transpose(1, 2), labels.masked_fill(~known, -100), reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), leaf)
    part.requires_grad_()
    found = token_losses(part.clone(), labels, vocab_size=REAL, tp_group=group)
    assert_close(found.double()[known], expected[known], rtol=1e-5, atol=1e-6)
    assert found[labels >= REAL].eq(float("inf")).all() and found[labels < 0].eq(0).all()
    [gradient] = gradients_of([torch.where(known, found, 0.0).sum()], [torch.ones(())], [part])
    assert gradient is not None
    padded = F.pad(expected_gradient, (0, V - REAL))
    assert_close(gradient.double(), shard(padded, -1, group), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_padded_rows_take_no_part_in_the_cross_entropy(ranks: Any, layout: str) -> None:
    ranks(layout).run(check_cross_entropy, 30.0)
