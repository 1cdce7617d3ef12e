# mypy: disable-error-code="no-untyped-def"
"""Forward KL on a GPU: one read of each model's logits for its softmax, one more of both for the divergence and the
gradient, which is written where it is wanted. In PyTorch the same takes over ten passes, in float32.

    logits      [n, v/tp], columns contiguous      bf16, fp16 or fp32; arithmetic in float32
    one program a row, which walks over its columns in blocks

The formulas are those of formulas.py. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence import formulas
from minitron_nemo.divergence.formulas import cross_entropy, scores
from minitron_nemo.divergence.token_rows import Rows
from minitron_nemo.divergence.vocabulary import Reductions, Vocabulary

BLOCK = 4096
FURTHEST: tl.constexpr = tl.constexpr(formulas.FURTHEST)
LEAST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
NUM_WARPS = 8


def chunk_losses(rows: Rows, config: DivergenceConfig, vocabulary: Vocabulary, reduce: Reductions) -> Tensor:
    """As `streamed._chunk_losses`, for kind=forward_kl and any number of rows.

    Communicates: tp, a maximum and a sum.
    """
    student, teacher, labels = rows.student, rows.teacher, rows.labels
    assert isinstance(teacher, Tensor), "forward KL reads all of the teacher's logits"
    of_student = (config.student_logit_scale, config.student_softcap)
    of_teacher = (config.teacher_logit_scale, config.teacher_softcap)
    # The softmaxes: of both models and, for the cross-entropy, of the student at temperature 1.
    read = [(student, *of_student, config.temperature), (teacher, *of_teacher, config.temperature)]
    if labels is not None and config.temperature != 1.0:
        read.append((student, *of_student, 1.0))
    local: list[tuple[Tensor, Tensor]] = []

    def local_maxima() -> Tensor:
        local.extend(max_and_sum(*model) for model in read)
        return torch.stack([maximum for maximum, _ in local])

    def local_sums() -> Tensor:
        # Each sum is relative to its own rank's maximum.
        return torch.stack([total * (top - best).exp() for (top, total), best in zip(local, maxima, strict=True)])

    maxima = reduce.max(local_maxima)
    inverse_sums = reduce.sum(local_sums).reciprocal()
    log_sums = maxima.double() - inverse_sums.double().log()
    log_ratio_of_sums = (log_sums[0] - log_sums[1]).float()

    index = here = None
    if labels is not None:
        here, columns = vocabulary.local_columns(labels)
        index = torch.where(here, columns, -1)
    local_kl = _divergence_and_gradient(rows, teacher, maxima, inverse_sums, log_ratio_of_sums, index, config)
    losses = [local_kl * config.factor]
    if labels is not None and here is not None:
        label_scores = scores(vocabulary.entries(student, labels.unsqueeze(-1)).squeeze(-1), *of_student)
        log_p = (label_scores - log_sums[2 if len(read) == 3 else 0]).to(label_scores.dtype)
        losses.append(cross_entropy(log_p, here, labels, vocabulary))
    return torch.stack(losses)


def max_and_sum(logits: Tensor, scale: float, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
    """[n] float32 each: the maximum of a row's scores and the sum of exp(scores - maximum), in one read."""
    maximum = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    total = torch.empty_like(maximum)
    if logits.shape[1] == 0:  # this rank holds padding alone
        return maximum.fill_(float("-inf")), total.zero_()
    _max_and_sum[(logits.shape[0],)](
        logits,
        logits.stride(0),
        logits.shape[1],
        maximum,
        total,
        scale,
        softcap or 0.0,
        temperature,
        CAPPED=softcap is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return maximum, total


def _divergence_and_gradient(
    rows: Rows,
    teacher: Tensor,
    maxima: Tensor,
    inverse_sums: Tensor,
    log_ratio_of_sums: Tensor,
    index: Tensor | None,
    config: DivergenceConfig,
) -> Tensor:
    """This rank's part of the divergence [n] and, into `rows.out`, the gradient of the weighted losses; one read of
    both.
    """
    student, labels, weights, out = rows.student, rows.labels, rows.weights, rows.out
    divergence = torch.zeros(student.shape[0], dtype=torch.float32, device=student.device)
    if student.shape[1] == 0:
        return divergence
    weights_kl = weights_ce = None
    if weights is not None:
        weights_kl = (weights[0] * (config.factor / config.temperature)).contiguous()
        if labels is not None:
            weights_ce = torch.where(labels >= 0, weights[1], 0.0).contiguous()
    _kl_and_gradient[(student.shape[0],)](
        student,
        student.stride(0),
        teacher,
        teacher.stride(0),
        student.shape[1],
        maxima.contiguous(),
        inverse_sums.contiguous(),
        log_ratio_of_sums,
        student.shape[0],
        divergence,
        out if out is not None else student,
        out.stride(0) if out is not None else 0,
        weights_kl if weights_kl is not None else divergence,
        weights_ce if weights_ce is not None else divergence,
        index if index is not None else divergence,
        config.student_logit_scale,
        config.student_softcap or 0.0,
        config.teacher_logit_scale,
        config.teacher_softcap or 0.0,
        config.temperature,
        STUDENT_CAPPED=config.student_softcap is not None,
        TEACHER_CAPPED=config.teacher_softcap is not None,
        WITH_GRADIENT=weights_kl is not None,
        WITH_LABELS=weights_ce is not None,
        OWN_SOFTMAX=maxima.shape[0] - 1 if maxima.shape[0] == 3 else 0,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return divergence


@triton.jit
def _scores(logits, scale, softcap, CAPPED: tl.constexpr):
    scores = logits.to(tl.float32) * scale
    if CAPPED:
        scores = softcap * _tanh(scores / softcap)
    return scores


@triton.jit
def _gradient_of_logits(gradient, scores, scale, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        gradient *= 1 - (scores / softcap) * (scores / softcap)
    return gradient * scale


@triton.jit
def _tanh(x):  # Triton's own is the device library's, which the interpreter does not have
    e = tl.exp(-2 * tl.abs(x))
    quotient = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)  # loses digits near 0, where the series takes over
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 1 / 16, series, quotient)


@triton.jit
def _max_and_sum(
    logits,
    stride,
    num_columns,
    row_max,
    row_sum,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row times its stride passes 2^31
    lanes = tl.arange(0, BLOCK)
    best = tl.full((), LEAST, tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        read = tl.load(logits + row * stride + columns, mask=columns < num_columns, other=0.0)
        scores = tl.where(columns < num_columns, _scores(read, scale, softcap, CAPPED) / temperature, float("-inf"))
        higher = tl.maximum(tl.maximum(best, tl.max(scores, 0)), LEAST)  # of a block of -inf, exp gives 0
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(scores - higher), 0)
        best = higher
    tl.store(row_max + row, best)
    tl.store(row_sum + row, total)


@triton.jit
def _kl_and_gradient(
    student,
    student_stride,
    teacher,
    teacher_stride,
    num_columns,
    maxima,  # [2 or 3, n]: student, teacher, the student at temperature 1
    inverse_sums,  # [2 or 3, n]
    log_ratio_of_sums,  # [n] log of the student's sum of exponentials - log of the teacher's
    num_rows,
    divergence,  # [n]
    out,  # may be `student`
    out_stride,
    weights_kl,
    weights_ce,
    labels,  # [n] column of this rank's part, or negative
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WITH_LABELS: tl.constexpr,
    OWN_SOFTMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    student_max, teacher_max = tl.load(maxima + row), tl.load(maxima + num_rows + row)
    student_inverse, teacher_inverse = tl.load(inverse_sums + row), tl.load(inverse_sums + num_rows + row)
    of_sums = tl.load(log_ratio_of_sums + row)
    if WITH_GRADIENT:
        weight_kl = tl.load(weights_kl + row)
    if WITH_LABELS:
        weight_ce, label = tl.load(weights_ce + row), tl.load(labels + row)
        own_max = tl.load(maxima + OWN_SOFTMAX * num_rows + row)
        own_inverse = tl.load(inverse_sums + OWN_SOFTMAX * num_rows + row)
    total = tl.zeros((), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        real = columns < num_columns
        read_s = tl.load(student + row * student_stride + columns, mask=real, other=0.0)
        read_t = tl.load(teacher + row * teacher_stride + columns, mask=real, other=0.0)
        scores_s = _scores(read_s, student_scale, student_softcap, STUDENT_CAPPED)
        z_s = scores_s / temperature
        z_t = _scores(read_t, teacher_scale, teacher_softcap, TEACHER_CAPPED) / temperature
        p_s = tl.exp(z_s - student_max) * student_inverse
        p_t = tl.exp(z_t - teacher_max) * teacher_inverse
        log_ratio = tl.where((p_t > 0) & real, tl.minimum((z_t - z_s) + of_sums, FURTHEST), 0.0)
        total += tl.sum(tl.where(real, p_t * log_ratio + (p_s - p_t), 0.0), 0)
        if WITH_GRADIENT:
            gradient = weight_kl * (p_s - p_t)
            if WITH_LABELS:
                own_p = tl.exp(scores_s - own_max) * own_inverse
                gradient += weight_ce * (own_p - tl.where(columns == label, 1.0, 0.0))
            gradient = _gradient_of_logits(gradient, scores_s, student_scale, student_softcap, STUDENT_CAPPED)
            tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=real)
    tl.store(divergence + row, total)
