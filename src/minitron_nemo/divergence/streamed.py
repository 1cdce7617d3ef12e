"""How far the student's next-token distribution is from the teacher's, over a vocabulary split across ranks.

    logits      of student and teacher                       [s, b, v/tp]    bf16 or fp32
    divergence  one value per token                          [s, b]          float32, equal on every tp rank

The divergences are those of formulas.py and top_k.py. This module walks over chunks of tokens, and does so again in the
backward pass: beyond the inputs and the student's gradient, only values per token and one chunk are alive. The inputs
are never overwritten.

Communication: tp, in the forward pass only: per chunk, one gather for the softmaxes, and a sum for the kinds whose
gradient waits for it; after the last chunk, one sum of the losses.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import TOP_K, DivergenceConfig
from minitron_nemo.divergence.formulas import (
    OF_PROBABILITIES,
    OF_SCORES,
    SUMMED_AT_THE_END,
    Result,
    Softmax,
    cross_entropy_of,
    gradient_of_logits,
    has_log_softmax,
    log_ratio,
    log_softmax,
    scores,
    softmaxes,
    tempered,
)
from minitron_nemo.divergence.known_teacher import KnownTeacher
from minitron_nemo.divergence.token_rows import Rows, TeacherRows, chunks, real_rows
from minitron_nemo.divergence.top_k import TopKTeacher, top_k_of_chunk
from minitron_nemo.divergence.vocabulary import Reduced, Reductions, Vocabulary
from minitron_nemo.parallel import ProcessGroup, all_reduce_sum


class TokenLosses(NamedTuple):
    """Values per token, in nats (but for cosine and mse), equal on every tp rank."""

    divergence: Tensor
    """[s, b]; exactly 0 where the logits are equal."""
    cross_entropy: Tensor | None
    """[s, b], of the student on the labels, at temperature 1; None without labels."""


def divergence(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    config: DivergenceConfig,
    *,
    tp_group: ProcessGroup | None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
) -> TokenLosses:
    """Divergence of each token, and the student's cross-entropy read off the same logits.

    Args:
        student_logits: [s, b, v/tp] (any order of s and b), bf16 or fp32; receives gradient.
        teacher_logits: the same shape and padded vocabulary, or what is known of it, of [s, b]; constant.
        tp_group: None where the vocabulary is whole.
        vocab_size: real entries of the whole vocabulary; columns from there on are padding and do not exist for the
            loss. None: all are real.
        labels: [s, b], global; a negative one has cross-entropy 0.
    Returns:
        float32 (float64 for float64 logits), both differentiable.
    Communicates: tp, per chunk one to three collectives of a few values per token forward, and one of the losses; none
        backward; top_k also gathers k values and indices.
    Raises: ValueError: shapes differ, or vocab_size is not within the vocabulary.
    """
    tokens = student_logits.shape[:-1]
    vocabulary = Vocabulary.split(student_logits.shape[-1], vocab_size, tp_group)
    teacher = _teacher_rows(student_logits, teacher_logits, config, vocabulary)
    require(
        labels is None or labels.shape == tokens,
        f"labels {list(labels.shape) if labels is not None else None} are not one a token {list(tokens)}.",
    )
    flat_labels = labels.reshape(-1) if labels is not None else None
    losses = _Divergence.apply(student_logits, teacher, flat_labels, config, vocabulary)
    return TokenLosses(losses[0].view(tokens), losses[1].view(tokens) if labels is not None else None)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None,
    vocab_size: int | None = None,
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """KL(teacher || student) of each token, in nats: `divergence` of the first kind, alone.

    sum_v p_T(v) (log p_T(v) - log p_S(v)),  p = softmax(logits / temperature),
    times temperature**2 so the gradient keeps its size (Hinton et al. 2015, section 2).
    """
    config = DivergenceConfig(temperature=temperature, scale_by_temperature_squared=scale_by_temperature_squared)
    return divergence(student_logits, teacher_logits, config, tp_group=tp_group, vocab_size=vocab_size).divergence


def top_k_of_teacher(
    teacher_logits: Tensor, config: DivergenceConfig, *, tp_group: ProcessGroup | None, vocab_size: int | None = None
) -> TopKTeacher:
    """What kind=top_k needs of the teacher: k tokens of [s, b, v/tp], their log-probabilities and the mass of the rest.

    Communicates: tp, per chunk, one gather of k values and indices, and three reductions.
    """
    vocabulary = Vocabulary.split(teacher_logits.shape[-1], vocab_size, tp_group)
    rows = real_rows(teacher_logits, vocabulary)
    return top_k_of_rows(rows, config, vocabulary).of_tokens(*teacher_logits.shape[:-1])


def _teacher_rows(
    student_logits: Tensor, teacher: TeacherRows, config: DivergenceConfig, vocabulary: Vocabulary
) -> TeacherRows:
    """The teacher in the form the formulas of this kind read. Communicates: tp, to choose the k largest."""
    if isinstance(teacher, KnownTeacher):
        teacher.require_fits(student_logits.shape[:-1], config)
        return teacher.of_tokens(-1)
    require(
        student_logits.shape == teacher.shape,
        f"student logits {list(student_logits.shape)} and teacher logits {list(teacher.shape)} differ in shape; "
        "distillation needs the same tokens, the same padded vocabulary and the same tensor_model_parallel_size.",
    )
    if config.kind == TOP_K:
        vocab_size, group = vocabulary.size, vocabulary.group
        return top_k_of_teacher(teacher.detach(), config, tp_group=group, vocab_size=vocab_size).of_tokens(-1)
    return teacher


class _Divergence(torch.autograd.Function):
    """Values per token [2, n]; the backward pass forms the gradients again from the logits, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher: TeacherRows,
        labels: Tensor | None,
        config: DivergenceConfig,
        vocabulary: Vocabulary,
    ) -> Tensor:
        student = real_rows(student_logits, vocabulary)
        rows = real_rows(teacher, vocabulary) if isinstance(teacher, Tensor) else teacher
        losses, ctx.reduced = row_losses(Rows(student, rows, labels), config, vocabulary)
        # Saved as autograd saves: logits that are overwritten before the backward pass raise an error there.
        ctx.save_for_backward(student_logits, teacher if isinstance(teacher, Tensor) else None, labels)
        ctx.known, ctx.config, ctx.vocabulary = teacher, config, vocabulary
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, labels = ctx.saved_tensors
        vocabulary = ctx.vocabulary
        student = real_rows(student_logits, vocabulary)
        rows = real_rows(teacher_logits, vocabulary) if teacher_logits is not None else ctx.known
        gradient = torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)
        gradient_rows = gradient.view(-1, gradient.shape[-1])
        gradient_rows[:, vocabulary.local :] = 0
        out = gradient_rows[:, : vocabulary.local]
        row_losses(Rows(student, rows, labels, weights, out), ctx.config, vocabulary, reduced=ctx.reduced)
        return gradient, None, None, None, None


# ---- rows: tokens of a vocabulary's real columns ---------------------------------------------------------------------


def top_k_of_rows(teacher: Tensor, config: DivergenceConfig, vocabulary: Vocabulary) -> TopKTeacher:
    """`top_k_of_teacher` of n tokens [n, real columns]. Communicates: tp."""
    rows = teacher.shape[0]
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    log_probs = torch.empty(rows, config.k, dtype=dtype, device=teacher.device)
    tail = log_probs.new_empty(rows) if config.tail == "bucket" else None
    answer = TopKTeacher(torch.empty_like(log_probs, dtype=torch.int64), log_probs, tail, config.temperature)
    for chunk in chunks(teacher, vocabulary):
        part = top_k_of_chunk(teacher[chunk], config, vocabulary)
        answer.indices[chunk], log_probs[chunk] = part.indices, part.log_probs
        if tail is not None and part.log_tail_mass is not None:
            tail[chunk] = part.log_tail_mass
    return answer


def row_losses(
    rows: Rows, config: DivergenceConfig, vocabulary: Vocabulary, *, reduced: Reduced | None = None
) -> tuple[Tensor, Reduced]:
    """Divergence and cross-entropy of n tokens, and on request the gradient of their weighted sum.

    Args:
        rows: for kind=top_k their teacher is a TopKTeacher, for forward_kl logits or a SampledTeacher.
        reduced: what the forward pass returned; nothing is communicated then.
    Returns: [1, n] divergence, or [2, n] with the cross-entropy on the labels, some of it this rank's part only where
        `reduced` is given; and what the ranks agreed on.
    Communicates: tp, unless `reduced` is given.
    """
    student = rows.student
    dtype = torch.promote_types(student.dtype, torch.float32)
    losses = torch.empty(1 if rows.labels is None else 2, student.shape[0], dtype=dtype, device=student.device)
    kernels = _kernels(student, config) if isinstance(rows.teacher, Tensor) else None
    chunk_losses = _chunk_losses if kernels is None else kernels.chunk_losses
    reduce = Reductions(vocabulary.group, student.shape[0], reduced)
    for chunk in chunks(student, vocabulary) if kernels is None else [slice(None)]:
        losses[:, chunk] = chunk_losses(rows[chunk], config, vocabulary, reduce.at(chunk))
    parts = losses if config.kind in SUMMED_AT_THE_END else losses[1:]
    if reduced is None and len(parts) > 0:
        parts.copy_(all_reduce_sum(parts, group=vocabulary.group))
    return losses, reduce.reduced


def _chunk_losses(rows: Rows, config: DivergenceConfig, vocabulary: Vocabulary, reduce: Reductions) -> Tensor:
    """`row_losses` of one chunk; where they are summed up over the ranks at the end, this rank's part."""
    results, capped_scores = _chunk_results(rows, config, vocabulary, reduce)
    if rows.weights is not None and rows.out is not None:
        of_scores = (config.factor / config.temperature, 1.0)  # cross-entropy is of the scores before the temperature
        scale = config.student_logit_scale if capped_scores is None else 1.0
        weights = [
            _times(weight, factor * scale).unsqueeze(-1)
            for weight, factor in zip(rows.weights, of_scores, strict=False)
        ]
        _write_gradient(rows.out, [gradient() for _, gradient in results], weights, capped_scores, config)
    divergence, *entropy = (value for value, _ in results)
    divergence = _times(divergence, config.factor)
    return torch.stack([divergence, *entropy]) if entropy else divergence.unsqueeze(0)


def _times(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1.0 else values * factor


def _write_gradient(
    out: Tensor,
    gradients: list[Tensor],
    weights: list[Tensor],
    capped_scores: Tensor | None,
    config: DivergenceConfig,
) -> None:
    """The weighted sum of the gradients, which are overwritten, in the dtype of `out`."""
    if capped_scores is None and len(gradients) == 1:
        torch.mul(gradients[0], weights[0], out=out)
        return
    gradient = gradients[0].mul_(weights[0])
    for more, weight in zip(gradients[1:], weights[1:], strict=True):
        gradient.addcmul_(more, weight)
    if capped_scores is not None:
        gradient = gradient_of_logits(gradient, capped_scores, config.student_logit_scale, config.student_softcap)
    out.copy_(gradient)


def _chunk_results(
    rows: Rows, config: DivergenceConfig, vocabulary: Vocabulary, reduce: Reductions
) -> tuple[list[Result], Tensor | None]:
    """Divergence of the tempered scores and, with labels, the cross-entropy of the student's own; and the latter, where
    a soft cap lies between them and the logits.
    """
    teacher, labels = rows.teacher, rows.labels
    if isinstance(teacher, Tensor) and config.kind in OF_PROBABILITIES:
        (s, t, own), student_scores = _softmaxes(rows.student, teacher, labels is not None, config, vocabulary, reduce)
        # First: log p may make room for p.
        entropy = [cross_entropy_of(own, labels, vocabulary)] if labels is not None else []
        ratio = log_ratio(t, s)
        result = OF_PROBABILITIES[config.kind](t.p, s.p, ratio, config.beta, reduce)
    else:
        student_scores = scores(rows.student, config.student_logit_scale, config.student_softcap)
        student = tempered(student_scores, config.temperature)
        if isinstance(teacher, KnownTeacher):
            result = teacher.divergence(student, config, vocabulary, reduce)
        else:
            teacher_scores = scores(teacher, config.teacher_logit_scale, config.teacher_softcap)
            teacher_scores = tempered(teacher_scores, config.temperature)
            never_said = teacher_scores == float("-inf")
            teacher_scores, known = (each.masked_fill(never_said, 0.0) for each in (teacher_scores, student))
            result = OF_SCORES[config.kind](teacher_scores, known, vocabulary.size, reduce)
        entropy = []
        if labels is not None:
            if has_log_softmax(student, vocabulary):
                own = log_softmax(student_scores, 1.0, None, 1.0)
            else:
                (own,) = softmaxes([student_scores], reduce)
            entropy = [cross_entropy_of(own, labels, vocabulary)]
    return [result, *entropy], student_scores if config.student_softcap is not None else None


def _softmaxes(
    student: Tensor,
    teacher: Tensor,
    with_own: bool,
    config: DivergenceConfig,
    vocabulary: Vocabulary,
    reduce: Reductions,
) -> tuple[tuple[Softmax, Softmax, Softmax], Tensor | None]:
    """The student's and the teacher's at the temperature, the student's own without it (where it is asked for), and the
    student's scores where they are there.
    """
    of_student = (config.student_logit_scale, config.student_softcap)
    of_teacher = (config.teacher_logit_scale, config.teacher_softcap)
    another_own = with_own and config.temperature != 1.0
    if has_log_softmax(student, vocabulary):
        s = log_softmax(student, *of_student, config.temperature)
        t = log_softmax(teacher, *of_teacher, config.temperature)
        own = log_softmax(student, *of_student, 1.0) if another_own else s
        return (s, t, own), scores(student, *of_student) if config.student_softcap is not None else None
    student_scores, teacher_scores = scores(student, *of_student), scores(teacher, *of_teacher)
    both = [tempered(each, config.temperature) for each in (student_scores, teacher_scores)]
    s, t, *more = softmaxes([*both, student_scores] if another_own else both, reduce)
    return (s, t, more[0] if more else s), student_scores


def _kernels(student: Tensor, config: DivergenceConfig) -> ModuleType | None:
    """The Triton kernels, where they are asked for and can take this; TRITON_INTERPRET=1 runs them on the CPU.

    They have run through the interpreter only, so on a GPU MINITRON_TRITON=1 has to ask for them.
    """
    asked = (os.environ.get("MINITRON_TRITON") == "1" and student.is_cuda) or os.environ.get("TRITON_INTERPRET") == "1"
    if not asked or config.kind != "forward_kl" or student.dtype == torch.float64:
        return None
    try:
        from minitron_nemo.divergence import triton_kernels
    except ImportError:
        return None
    return triton_kernels
