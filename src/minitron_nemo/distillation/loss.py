"""The loss of a micro-batch on the last pipeline stage: a sum, a count, and what to report of them.

    sum      over the tokens of weight * (divergence + cross_entropy_weight * cross-entropy), and of a teacher that
             learns weight * its own cross-entropy    scalar float32, with all gradients there are
    count    sum of the tokens' weights               scalar
    report   of each token, constant                  [b, s/cp] float32

Equal on every tensor-parallel rank. The gradient is the sum's; what is reported has none, so that a caller cannot weigh
it a second time. Σsum / Σcount over the ranks of data and context parallelism is the mean on any layout.

Communication: tp (see divergence/fused_linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypedDict

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from minitron_nemo.config.distillation import TOP_K, DistillationConfig, DivergenceConfig
from minitron_nemo.divergence.fused_linear import (
    OutputHead,
    WeightedLoss,
    fused_linear_divergence,
    fused_linear_loss,
)
from minitron_nemo.divergence.known_teacher import KnownTeacher
from minitron_nemo.divergence.top_k import TopKTeacher
from minitron_nemo.parallel import ProcessGroup

LOSS, DIVERGENCE, CROSS_ENTROPY, AGREEMENT = "loss", "divergence", "cross_entropy", "agreement"
TEACHER_CROSS_ENTROPY = "teacher_cross_entropy"

Answer: TypeAlias = OutputHead | KnownTeacher
"""What a teacher says of the tokens, in a form the divergences read."""


@dataclass(frozen=True)
class Loss:
    """See the module's text. No tuple: a wrapper of mixed precision takes those apart and makes its own of them."""

    sum: Tensor
    count: Tensor
    report: dict[str, Tensor]
    """LOSS, DIVERGENCE, AGREEMENT, and where they are minimised CROSS_ENTROPY and TEACHER_CROSS_ENTROPY. LOSS is of the
    student alone: divergence + cross_entropy_weight * cross-entropy."""


class Walk(TypedDict):
    """How the fused losses walk a vocabulary; their arguments of these names."""

    tp_group: ProcessGroup | None
    vocab_size: int | None
    sequence_parallel: bool
    gradient_accumulation_fusion: bool


def walk_of(model: GPTModel, vocab_size: int | None) -> Walk:
    """
    Args:
        vocab_size: real entries of the padded vocabulary; None: all are real.
    """
    return Walk(
        tp_group=model.pg_collection.tp,
        vocab_size=vocab_size,
        sequence_parallel=model.config.sequence_parallel,
        gradient_accumulation_fusion=model.config.gradient_accumulation_fusion,
    )


def distillation_loss(
    student: OutputHead,
    answer: Answer,
    config: DistillationConfig,
    *,
    labels: Tensor | None,
    token_weights: Tensor,
    walk: Walk,
    of_teacher: WeightedLoss | None = None,
) -> Loss:
    """
    Args:
        student: receives gradient.
        answer: the teacher's, constant.
        labels: [b, s/cp]; None where cross-entropy has no weight.
        token_weights: [b, s/cp], the loss mask.
        of_teacher: its own loss, where it learns.
    Communicates: tp.
    """
    weight = config.cross_entropy_weight
    of_student = fused_linear_loss(
        student,
        answer,
        config.divergence,
        token_weights.t().float(),
        labels=labels.t() if labels is not None and weight > 0 else None,
        cross_entropy_weight=weight,
        with_agreement=True,
        **walk,
    )
    total, per_token = of_student.total, of_student.divergence
    parts = {DIVERGENCE: of_student.divergence, AGREEMENT: of_student.agreement}
    if of_student.cross_entropy is not None:
        per_token = per_token + weight * of_student.cross_entropy
        parts[CROSS_ENTROPY] = of_student.cross_entropy
    if of_teacher is not None:
        total = total + of_teacher.total
        parts[TEACHER_CROSS_ENTROPY] = of_teacher.divergence
    report = {part: values.t() for part, values in parts.items() if values is not None}
    return Loss(total, token_weights.sum(), {LOSS: per_token.t().contiguous()} | report)


_OF_LABEL = DivergenceConfig(kind=TOP_K, k=1)


def cross_entropy_loss(head: OutputHead, labels: Tensor, token_weights: Tensor, walk: Walk) -> WeightedLoss:
    """Weighted sum of the cross-entropy on labels [b, s/cp]. Communicates: tp."""
    return fused_linear_loss(head, _sure_of(labels), _OF_LABEL, token_weights.t().float(), **walk)


def cross_entropy_of_tokens(head: OutputHead, labels: Tensor, walk: Walk) -> Tensor:
    """The cross-entropy on labels [b, s/cp] of each token, the same shape, float32: over the real vocabulary, without
    the logits of more than a few tokens at a time; of a label that is no token, FURTHEST. Communicates: tp."""
    return fused_linear_divergence(head, _sure_of(labels), _OF_LABEL, **walk).divergence.t().contiguous()


def _sure_of(labels: Tensor) -> TopKTeacher:
    """The divergence from whom is the cross-entropy on labels [b, s/cp]."""
    indices = labels.t().unsqueeze(-1)
    certain = torch.zeros(indices.shape, device=indices.device)
    return TopKTeacher(indices, certain, certain[..., 0] - float("inf"))
