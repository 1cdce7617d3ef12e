"""Claims about draws of the teacher's distribution: in expectation they teach what all of it teaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergences_by_hand import REAL, B, Case, S, V, shard
from megatron.core import parallel_state
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.distillation.stored_teacher import draws_of_head
from minitron_nemo.divergence.agreement import top_1_agreement
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_loss
from minitron_nemo.divergence.sampled import SampledTeacher, draws_of_rows
from minitron_nemo.divergence.streamed import divergence
from minitron_nemo.divergence.vocabulary import Vocabulary

M, TOKENS, SIZE, PARTS = 7, 5, 11, 48
HOT = DivergenceConfig(temperature=2.0, teacher_softcap=9.0, student_logit_scale=0.7)
WHOLE = Vocabulary.split(SIZE, None, None)


def fractions() -> Tensor:
    """Distributions [n, v] of whole multiples of 1 / PARTS; the first token is never said."""
    generator = torch.Generator().manual_seed(3)
    cuts = [torch.randperm(PARTS - 1, generator=generator)[: SIZE - 2].sort().values + 1 for _ in range(TOKENS)]
    borders = torch.nn.functional.pad(torch.stack(cuts), (1, 0))
    sizes = torch.nn.functional.pad(borders, (0, 1), value=PARTS).diff(dim=-1)
    return torch.nn.functional.pad(sizes, (1, 0)).double() / PARTS


def student_logits() -> Tensor:
    logits = torch.randn(TOKENS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return logits.requires_grad_()


def learned(student: Tensor, teacher: Any, config: DivergenceConfig) -> tuple[Tensor, Tensor]:
    """Divergence of each token and the gradient of their sum."""
    losses = divergence(student, teacher, config, tp_group=None).divergence
    return losses.detach(), torch.autograd.grad(losses.sum(), student)[0]


def test_over_all_offsets_loss_and_gradient_are_those_of_forward_kl() -> None:
    """In float64 to rounding: the offsets' midpoints meet each token as often as its probability says."""
    config = DivergenceConfig()
    student, logits = student_logits(), fractions().log()
    expected, losses, gradients = learned(student, logits, config), [], []
    for number in range(PARTS):
        offsets = torch.full((TOKENS,), (number + 0.5) / PARTS, dtype=torch.float64)
        loss, gradient = learned(student, draws_of_rows(logits, offsets, M, config, WHOLE), config)
        losses.append(loss)
        gradients.append(gradient)
    assert torch.stack(gradients).std(0).max() > 0.05  # a single one is not it
    assert_close(torch.stack(losses).mean(0), expected[0], rtol=0, atol=1e-6)  # the entropies are float32
    assert_close(torch.stack(gradients).mean(0), expected[1], rtol=0, atol=1e-12)


def test_the_mean_of_many_random_draws_is_the_gradient_of_forward_kl() -> None:
    """With temperature, soft cap and scale, within five standard errors of each of the 55 components."""
    generator = torch.Generator().manual_seed(5)
    student, logits = student_logits(), 3 * torch.randn(TOKENS, SIZE, dtype=torch.float64, generator=generator)
    expected, count = learned(student, logits, HOT), 4000
    draws = [
        learned(student, draws_of_rows(logits, offsets, M, HOT, WHOLE), HOT)
        for offsets in torch.rand(count, TOKENS, dtype=torch.float64, generator=generator)
    ]
    for found, whole in zip(map(torch.stack, zip(*draws, strict=True)), expected, strict=True):
        error = found.std(0) / count**0.5
        assert ((found.mean(0) - whole).abs() <= 5 * error + 1e-6).all()
        assert (error < 0.02).all()


def test_a_token_is_drawn_as_often_as_its_probability_says_rounded_up_or_down() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = 2 * torch.randn(40, 301, generator=generator)
    logits[:, [0, 7, 300]] = float("-inf")
    answer = draws_of_rows(
        logits,
        torch.rand(40, dtype=torch.float64, generator=generator),
        64,
        DivergenceConfig(),
        Vocabulary.split(301, None, None),
    )
    p = logits.double().softmax(-1)
    counts = torch.zeros(40, 301).scatter_add_(-1, answer.indices, torch.ones(40, 64)).double()
    assert (counts >= (64 * p - 1e-5).floor()).all() and (counts <= (64 * p + 1e-5).ceil()).all()
    assert (counts[:, [0, 7, 300]] == 0).all()
    assert (answer.indices.diff(dim=-1) >= 0).all()
    assert_close(answer.entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-6, atol=1e-6)


def test_the_likeliest_token_is_the_one_drawn_most_often() -> None:
    teacher = SampledTeacher(torch.tensor([[1, 4, 4, 7], [2, 2, 2, 7]]), torch.zeros(2))
    student = torch.nn.functional.one_hot(torch.tensor([4, 7]), SIZE).float()
    assert top_1_agreement(student, teacher, WHOLE).tolist() == [1.0, 0.0]


# ---- from hidden states, on ranks ------------------------------------------------------------------------------------


def of_heads(case: Case, weights: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """On a rank, whose part of the vocabulary the output weights are: draws, loss and gradients, whole."""
    group = parallel_state.get_tensor_model_parallel_group()
    student = OutputHead(case.student.hidden.clone().requires_grad_(), shard(case.student.weight, 0, group).clone())
    student.weight.requires_grad_()
    teacher = OutputHead(case.teacher.hidden, shard(case.teacher.weight, 0, group))
    config = DivergenceConfig(temperature=2.0, teacher_softcap=7.0)
    options: dict[str, Any] = {"tp_group": group, "vocab_size": REAL}
    answer = draws_of_head(teacher, offsets, M, config, **options)
    loss = fused_linear_loss(
        student, answer, config, weights, labels=case.labels, cross_entropy_weight=0.3, tokens_per_chunk=7, **options
    )
    loss.total.backward()
    parts = [torch.empty_like(student.weight) for _ in range(group.size())]
    torch.distributed.all_gather(parts, student.weight.grad, group=group)
    return {
        "draws": answer.indices,
        "entropy": answer.entropy,
        "divergence": loss.divergence,
        "hidden": student.hidden.grad,
        "weight": torch.cat(parts),
    }


@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_a_split_vocabulary_gives_the_same_draws_losses_and_gradients(ranks: Any, layout: str) -> None:
    """The last rank holds padding; float64, so that no draw falls on the other side of a rounding."""
    case = Case.random(12)
    offsets = torch.rand(S, B, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    (expected,) = ranks("single").run(of_heads, case, case.weights[0], offsets)
    assert expected["draws"].max() < REAL < V and expected["draws"].unique().numel() > REAL / 2
    student, teacher = case.logits()
    config = DivergenceConfig(temperature=2.0, teacher_softcap=7.0)
    known = SampledTeacher(expected["draws"], expected["entropy"], 2.0)
    by_logits = divergence(student, known, config, tp_group=None, vocab_size=REAL).divergence
    assert_close(expected["divergence"], by_logits, rtol=1e-9, atol=1e-9)
    log_p = (7 * torch.tanh(teacher[..., :REAL] / 7) / 2).log_softmax(-1)
    assert_close(expected["entropy"].double(), torch.special.entr(log_p.exp()).sum(-1), rtol=1e-6, atol=1e-6)
    for found in ranks(layout).run(of_heads, case, case.weights[0], offsets):
        assert torch.equal(found.pop("draws"), expected["draws"])
        for name, value in found.items():
            assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "reverse_kl"},
            r"divergence\.kind=forward_kl is estimated, and divergence\.kind=reverse_kl cannot be",
        ),
        ({"kind": "top_k", "k": 3}, r"divergence\.kind=top_k cannot be; use forward_kl"),
        (
            {"temperature": 2.0},
            r"draws are of temperature 1\.0, and divergence\.temperature=2\.0; use that of the store",
        ),
    ],
)
def test_another_divergence_than_that_of_the_draws_is_refused(settings: dict[str, Any], message: str) -> None:
    known = SampledTeacher(torch.zeros(TOKENS, M, dtype=torch.int64), torch.zeros(TOKENS))
    with pytest.raises(ValueError, match=message):
        divergence(student_logits(), known, DivergenceConfig(**settings), tp_group=None)


def test_draws_of_other_tokens_are_refused() -> None:
    known = SampledTeacher(torch.zeros(TOKENS + 1, M, dtype=torch.int64), torch.zeros(TOKENS + 1))
    with pytest.raises(ValueError, match=rf"draws \[6, 7\] .* but the student's tokens are \[{TOKENS}\]"):
        divergence(student_logits(), known, DivergenceConfig(), tp_group=None)
