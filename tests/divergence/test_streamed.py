"""Claims about every divergence from whole logits: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergences_by_hand import (
    EVERY,
    GRADIENTS,
    KINDS,
    REAL,
    SETTINGS,
    VALUES,
    Case,
    Expected,
    V,
    assert_near,
    by_hand,
    config_of,
)
from torch.testing import assert_close

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence import streamed, token_rows
from minitron_nemo.divergence.streamed import divergence


@pytest.mark.parametrize(("kind", "setting"), EVERY)
@pytest.mark.parametrize("chunk_elements", [5 * V, 1 << 22])  # 24 tokens do not divide by 5; all at once
def test_values_and_gradients_match_autograd_in_float64(
    monkeypatch: pytest.MonkeyPatch, kind: str, setting: str, chunk_elements: int
) -> None:
    monkeypatch.setattr(token_rows, "CHUNK_ELEMENTS", chunk_elements)
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


def test_an_accelerators_own_way_to_log_p_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits stay as they are, and the KL of a student near its teacher accurate."""
    monkeypatch.setattr(streamed, "has_log_softmax", lambda *_: True)
    for kind, setting in EVERY:
        config, case = config_of(kind, **SETTINGS[setting]), Case.random()
        student, teacher = (logits.float() for logits in case.logits())
        case.logits = lambda pair=(student, teacher): [logits.double() for logits in pair]  # type: ignore[method-assign]
        expected, before = Expected.of(case, config, student), student.clone()
        student.requires_grad_()
        losses = divergence(student, teacher, config, tp_group=None, vocab_size=REAL, labels=case.labels)
        (gradient,) = torch.autograd.grad(list(losses), student, list(case.weights.float()))
        assert torch.equal(student, before)
        assert_near(losses.divergence, expected.divergence, f"divergence, {kind}, {setting}", rtol=VALUES)
        assert_near(losses.cross_entropy, expected.cross_entropy, f"cross-entropy, {kind}, {setting}", rtol=VALUES)
        assert_near(gradient, expected.gradients[0], f"gradient, {kind}, {setting}", rtol=GRADIENTS)
    teacher = 20 + 3 * torch.randn(8, 1, 4096, generator=torch.Generator().manual_seed(5))
    near = teacher + 3e-3 * torch.randn(8, 1, 4096, generator=torch.Generator().manual_seed(6))
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):
        exact = by_hand(near.double(), teacher.double(), config_of(kind), 4096)
        value = divergence(near, teacher, config_of(kind), tp_group=None).divergence
        assert (value - exact).abs().max() < 1e-7, kind
        assert not divergence(near, near, config_of(kind), tp_group=None).divergence.any(), kind


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "forward"}, r"divergence\.kind=forward is not known; did you mean forward_kl\?"),
        ({"kind": "jensen_shannon", "beta": 1.0}, r"divergence\.beta=1.0 must be above 0 and below 1"),
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


def test_logits_that_are_overwritten_before_the_backward_pass_are_noticed() -> None:
    student, teacher = Case.random(17).logits()
    student.requires_grad_()
    value = divergence(student, teacher, DivergenceConfig(), tp_group=None).divergence
    with torch.no_grad():
        student.zero_()  # as Megatron's cross-entropy overwrites what it is given
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
