"""Claims about every divergence from hidden states: values, gradients, memory, precision."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from divergences_by_hand import (
    EVERY,
    GRADIENTS,
    H_STUDENT,
    H_TEACHER,
    KINDS,
    REAL,
    SETTINGS,
    VALUES,
    B,
    Case,
    Expected,
    K,
    S,
    V,
    assert_near,
    by_hand,
    config_of,
    gradients_of,
    shard,
)
from megatron.core import parallel_state
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_divergence, fused_linear_loss
from minitron_nemo.divergence.streamed import divergence, forward_kl, top_k_of_teacher
from support.ranks import Ranks


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


def test_a_weighted_loss_cannot_be_differentiated_twice() -> None:
    case = Case.random(18)
    student = OutputHead(*(tensor.requires_grad_() for tensor in case.student))
    total = fused_linear_loss(student, case.teacher, DivergenceConfig(), case.weights[0], tp_group=None).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a second time"):
        total.backward()
