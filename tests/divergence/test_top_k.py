"""The divergence over the teacher's likeliest tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from divergences_by_hand import (
    GRADIENTS,
    REAL,
    VALUES,
    Case,
    K,
    V,
    assert_near,
)
from torch.testing import assert_close

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence.fused_linear import fused_linear_divergence
from minitron_nemo.divergence.streamed import divergence, forward_kl, top_k_of_teacher
from minitron_nemo.divergence.top_k import TopKTeacher


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
