"""How far the student's next-token distribution is from the teacher's, over a vocabulary split across ranks.

Minitron distils by forward KL at temperature 1 and nothing else (arXiv:2407.14679, Retraining: KL alone reached a lower
loss than KL with cross-entropy, reverse KL, MSE or cosine).

    logits      of student and teacher                       [s, b, v/tp]    bf16 or fp32
    divergence  one value per token                          [s, b]          float32, equal on every tp rank

Memory: the logits are read in chunks of tokens, in float32, and read again by the backward pass; beyond the inputs and
the student's gradient, only [s, b] values and one chunk are alive.

Communication: tp, in the forward pass only: the softmax's maximum and sum of both models, and the divergence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from minitron_nemo.checks import require
from minitron_nemo.parallel import all_reduce_max, all_reduce_sum, group_rank, group_size

CHUNK_ELEMENTS = 1 << 22  # logits of one chunk: 16 MiB in float32, large beside a kernel launch, small beside the whole


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None,
    vocab_size: int | None = None,
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """KL(teacher || student) of each token, in nats, over a vocabulary split across `tp_group`.

    sum_v p_T(v) (log p_T(v) - log p_S(v)),  p = softmax(logits / temperature),
    times temperature**2 so the gradient keeps its size (Hinton et al. 2015, section 2).

    Args:
        student_logits: [s, b, v/tp] (any order of s and b), bf16 or fp32; receives gradient.
        teacher_logits: the same shape and padded vocabulary; constant.
        temperature: above 1 flattens both distributions.
        tp_group: None where the vocabulary is whole.
        vocab_size: real entries of the whole vocabulary; columns from there on are padding and do not exist for the
            loss. None: all are real.
        scale_by_temperature_squared: False leaves the bare divergence of the flattened distributions.
    Returns:
        [s, b] float32 (float64 for float64 logits), equal on every rank of `tp_group`; exactly 0 where the logits are
        equal.
    Communicates: tp, three all-reduces of at most [2, s, b] fp32 forward, none backward.
    Raises: ValueError: shapes differ, the temperature is not positive, or vocab_size is not within the vocabulary.
    """
    require(
        student_logits.shape == teacher_logits.shape,
        f"student logits {list(student_logits.shape)} and teacher logits {list(teacher_logits.shape)} differ in shape; "
        "distillation needs the same tokens, the same padded vocabulary and the same tensor_model_parallel_size.",
    )
    require(temperature > 0, f"temperature={temperature} must be above 0; Minitron uses 1.0.")
    local_size = student_logits.shape[-1]
    padded_vocab_size = local_size * group_size(tp_group)
    if vocab_size is None:
        vocab_size = padded_vocab_size
    require(
        0 < vocab_size <= padded_vocab_size,
        f"vocab_size={vocab_size} must be between 1 and the logits' padded vocabulary of {padded_vocab_size}.",
    )
    local_real = min(max(vocab_size - group_rank(tp_group) * local_size, 0), local_size)
    scale = temperature**2 if scale_by_temperature_squared else 1.0
    return _ForwardKL.apply(student_logits, teacher_logits, temperature, scale, local_real, tp_group)


class _ForwardKL(torch.autograd.Function):
    """The gradient is scale / temperature * (p_S - p_T), formed again from the logits, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float,
        scale: float,
        local_real: int,
        tp_group: ProcessGroup | None,
    ) -> Tensor:
        student, teacher = _rows(student_logits, local_real), _rows(teacher_logits, local_real)
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        local_max = torch.stack([_row_max(student, dtype), _row_max(teacher, dtype)])
        global_max = all_reduce_max(local_max, group=tp_group)  # [2, s*b]

        local_sum = torch.empty_like(global_max)
        for chunk in _chunks(student):
            for model, logits in enumerate((student, teacher)):
                exponents = _scaled(logits[chunk], global_max[model, chunk], temperature)
                local_sum[model, chunk] = exponents.exp_().sum(-1)
        log_sum = all_reduce_sum(local_sum, group=tp_group).log_()  # [2, s*b]

        local_kl = torch.empty_like(log_sum[0])
        for chunk in _chunks(student):
            log_p_student = _log_softmax(student[chunk], global_max[0, chunk], log_sum[0, chunk], temperature)
            log_p_teacher = _log_softmax(teacher[chunk], global_max[1, chunk], log_sum[1, chunk], temperature)
            # p_S - p_T adds 0 over the vocabulary, but makes every term non-negative and cancels the first-order
            # effect of rounding in log_sum, which would drown the KL of a student near its teacher.
            p_teacher = log_p_teacher.exp()
            terms = log_p_teacher.sub_(log_p_student).mul_(p_teacher)
            local_kl[chunk] = terms.add_(log_p_student.exp_().sub_(p_teacher)).sum(-1)
        kl = all_reduce_sum(local_kl, group=tp_group).mul_(scale)

        ctx.save_for_backward(student_logits, teacher_logits, global_max, log_sum)
        ctx.temperature, ctx.scale, ctx.local_real = temperature, scale, local_real
        return kl.view(student_logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kl_gradient: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, global_max, log_sum = ctx.saved_tensors
        student, teacher = _rows(student_logits, ctx.local_real), _rows(teacher_logits, ctx.local_real)
        weight = (kl_gradient.reshape(-1) * (ctx.scale / ctx.temperature)).unsqueeze(-1)
        gradient = torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)
        gradient_rows = gradient.view(-1, gradient.shape[-1])
        gradient_rows[:, ctx.local_real :] = 0
        for chunk in _chunks(student):
            log_p_student = _log_softmax(student[chunk], global_max[0, chunk], log_sum[0, chunk], ctx.temperature)
            log_p_teacher = _log_softmax(teacher[chunk], global_max[1, chunk], log_sum[1, chunk], ctx.temperature)
            difference = log_p_student.exp_().sub_(log_p_teacher.exp_()).mul_(weight[chunk])
            gradient_rows[chunk, : ctx.local_real] = difference
        return gradient, None, None, None, None, None


def _rows(logits: Tensor, local_real: int) -> Tensor:
    """[s*b, real columns], a view of contiguous logits."""
    return logits.detach().reshape(-1, logits.shape[-1])[:, :local_real]


def _chunks(rows: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def _row_max(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if rows.shape[1] == 0:  # this rank holds padding alone
        return torch.full((rows.shape[0],), float("-inf"), dtype=dtype, device=rows.device)
    return rows.amax(-1).to(dtype)


def _scaled(rows: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """(logits - max) / temperature, in float32: the subtraction promotes, so no float32 copy of the logits is made."""
    return (rows - row_max.unsqueeze(-1)).div_(temperature)


def _log_softmax(rows: Tensor, row_max: Tensor, log_sum: Tensor, temperature: float) -> Tensor:
    return _scaled(rows, row_max, temperature).sub_(log_sum.unsqueeze(-1))
