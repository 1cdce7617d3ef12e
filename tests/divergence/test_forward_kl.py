"""Claims about the forward KL between student and teacher."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.divergence import token_rows
from minitron_nemo.divergence.streamed import forward_kl
from support.ranks import Ranks

S, B, V = 7, 3, 54  # V is the padded vocabulary


def logits(seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(S, B, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float, vocab_size: int = V) -> Tensor:
    """Float64, the whole vocabulary, autograd."""
    log_p_student = (student.double()[..., :vocab_size] / temperature).log_softmax(-1)
    log_p_teacher = (teacher.double()[..., :vocab_size] / temperature).log_softmax(-1)
    return temperature**2 * (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)


def kl_and_gradient(
    student: Tensor, teacher: Tensor, weights: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """On a rank: this rank's slice of the vocabulary, the loss of all tokens, the gradient of the slice."""
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = group.rank(), group.size()
    shard = slice(rank * V // ranks, (rank + 1) * V // ranks)
    local = student[..., shard].clone().requires_grad_()
    kl = forward_kl(local, teacher[..., shard], temperature=temperature, tp_group=group, vocab_size=vocab_size)
    (gradient,) = torch.autograd.grad(kl, local, weights)
    return kl, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_kl_is_zero_when_student_is_teacher(dtype: torch.dtype, temperature: float) -> None:
    student = logits(0).to(dtype).requires_grad_()
    kl = forward_kl(student, student.detach().clone(), temperature=temperature, tp_group=None)
    kl.sum().backward()
    assert kl.shape == (S, B) and kl.dtype == torch.float32
    assert kl.count_nonzero() == 0
    assert student.grad is not None and student.grad.count_nonzero() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("vocab_size", [V, 51])
@pytest.mark.parametrize("chunk_elements", [1, 5 * V, 1 << 22])  # one token a chunk; 21 tokens do not divide by 5; all
def test_kl_and_its_gradient_match_autograd_in_float64(
    monkeypatch: pytest.MonkeyPatch, temperature: float, vocab_size: int, chunk_elements: int
) -> None:
    monkeypatch.setattr(token_rows, "CHUNK_ELEMENTS", chunk_elements)
    student, teacher, weights = logits(1).float(), logits(2).float(), torch.rand(S, B) - 0.3
    expected_of = student.double().requires_grad_()
    expected = kl_by_hand(expected_of, teacher, temperature, vocab_size)
    (expected_gradient,) = torch.autograd.grad(expected, expected_of, weights.double())

    student.requires_grad_()
    kl = forward_kl(student, teacher, temperature=temperature, tp_group=None, vocab_size=vocab_size)
    (gradient,) = torch.autograd.grad(kl, student, weights)

    assert_close(kl.double(), expected, rtol=1e-6, atol=1e-7)  # float32 rounding of 54 terms
    assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


def test_kl_gradient_passes_gradcheck() -> None:
    student, teacher = logits(3)[:2].requires_grad_(), logits(4)[:2]
    assert torch.autograd.gradcheck(
        lambda x: forward_kl(x, teacher, temperature=2.0, tp_group=None, vocab_size=51), student
    )


def test_a_student_near_its_teacher_has_an_accurate_kl() -> None:
    """Rounding in the softmax sums of a large vocabulary must not swamp a small divergence."""
    generator = torch.Generator().manual_seed(5)
    teacher = 20 + 3 * torch.randn(64, 4096, generator=generator)
    student = teacher + 3e-3 * torch.randn(64, 4096, generator=generator)
    expected = kl_by_hand(student, teacher, 1.0, vocab_size=4096)

    kl = forward_kl(student, teacher, temperature=1.0, tp_group=None)

    log_p_student, log_p_teacher = student.log_softmax(-1), teacher.log_softmax(-1)  # what one would write, in float32
    plain = (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)
    assert (kl - expected).abs().max() < 1e-7
    assert (plain - expected).abs().max() > 3e-7


def test_kl_of_bf16_logits_is_computed_in_float32() -> None:
    student, teacher = logits(7).bfloat16(), logits(8).bfloat16()
    kl = forward_kl(student.requires_grad_(), teacher, temperature=1.0, tp_group=None)
    kl.sum().backward()
    assert_close(kl.double(), kl_by_hand(student.detach(), teacher, 1.0), rtol=1e-6, atol=1e-7)
    assert student.grad is not None and student.grad.dtype == torch.bfloat16


def test_kl_of_distant_distributions_is_finite() -> None:
    teacher = torch.zeros(1, 1, V)
    teacher[..., 0] = 300.0  # the student gives this token a probability that float32 cannot hold
    student = torch.zeros(1, 1, V, requires_grad=True)
    with torch.no_grad():
        student[..., 1] = 300.0
    kl = forward_kl(student, teacher, temperature=1.0, tp_group=None)
    kl.sum().backward()
    assert_close(kl, torch.full((1, 1), 300.0))
    assert student.grad is not None and student.grad.isfinite().all()


def test_padded_columns_do_not_exist_for_the_loss() -> None:
    student, teacher = logits(9).float(), logits(10).float()
    wild = torch.full_like(student, 50.0)
    padded_student = torch.cat([student[..., :51], wild[..., 51:]], -1).requires_grad_()
    padded_teacher = torch.cat([teacher[..., :51], -wild[..., 51:]], -1)
    kl = forward_kl(padded_student, padded_teacher, temperature=1.0, tp_group=None, vocab_size=51)
    kl.sum().backward()
    assert_close(kl, forward_kl(student[..., :51], teacher[..., :51], temperature=1.0, tp_group=None))
    assert padded_student.grad is not None and padded_student.grad[..., 51:].count_nonzero() == 0


def test_temperature_without_its_square_is_the_bare_divergence() -> None:
    student, teacher = logits(11).float(), logits(12).float()
    bare = forward_kl(student, teacher, temperature=3.0, tp_group=None, scale_by_temperature_squared=False)
    assert_close(9.0 * bare, forward_kl(student, teacher, temperature=3.0, tp_group=None))
    assert_close(bare, forward_kl(student / 3, teacher / 3, temperature=1.0, tp_group=None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [V, 51, 20])  # 20: the second rank holds padding alone
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_the_same_over_a_split_vocabulary(ranks: Ranks, temperature: float, vocab_size: int) -> None:
    student, teacher, weights = logits(13).float(), logits(14).float(), torch.rand(S, B)
    expected_of = student.double().requires_grad_()
    expected = kl_by_hand(expected_of, teacher, temperature, vocab_size)
    (expected_gradient,) = torch.autograd.grad(expected, expected_of, weights.double())

    results = ranks("tp2").run(kl_and_gradient, student, teacher, weights, temperature, vocab_size)

    for rank, (kl, _) in enumerate(results):
        assert_close(kl.double(), expected, rtol=1e-6, atol=1e-7, msg=lambda text, rank=rank: f"rank {rank}: {text}")
    gradient = torch.cat([gradient for _, gradient in results], -1)
    assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 must be above 0"),
        ({"vocab_size": 55}, r"vocab_size=55 must be between 1 and the logits' padded vocabulary of 54"),
    ],
)
def test_values_that_cannot_work_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_kl(logits(0), logits(1), **{"temperature": 1.0, "tp_group": None, **arguments})  # type: ignore[arg-type]


def test_vocabularies_of_different_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"student logits \[7, 3, 54\] and teacher logits \[7, 3, 51\] differ"):
        forward_kl(logits(0), logits(1)[..., :51], temperature=1.0, tp_group=None)
