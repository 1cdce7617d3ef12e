"""A student trained on what its teacher once said, with no teacher in memory.

What is stored of a token is what the divergence `top_k` reads: the teacher's k likeliest tokens and the mass of the
rest. It travels in the batch beside the tokens, so that data and context parallelism share it out as they do these.

    teacher_log_probs   of the k tokens, in nats                     [b, s/cp, k]   float16 or float32
    teacher_tail_mass   probability of all others                    [b, s/cp]      float32
    teacher_indices     of the k tokens, global                      [b, s/cp, k]   int32
    loss                that of `TeacherStudent`, one value a token  [b, s/cp]      float32

Communication: what the student does by itself; tp in the loss and in `top_k_of_head` (see top_k.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import DistillationConfig, DivergenceConfig
from minitron_nemo.distillation.teacher_student import TeacherStudent, without_logits
from minitron_nemo.divergence.formulas import Vocabulary
from minitron_nemo.divergence.fused_linear import LOGITS_BYTES, OutputHead
from minitron_nemo.divergence.streamed import require_kind_reads_top_k, top_k_of_rows
from minitron_nemo.divergence.top_k import TopKTeacher
from minitron_nemo.parallel import group_size


class StoredTeacherStudent(TeacherStudent):
    """One pipeline stage of the student; all that a `TeacherStudent` does but run a teacher.

    Args:
        student: trained; its TransformerConfig is this module's.
        config: its divergence must read what is stored.
        temperature: of the stored answers.
        vocab_size: real entries of the padded vocabulary; None: all are real.
    Raises: ValueError: a loss that needs more than is stored.
    """

    teacher_is_here = False

    def __init__(
        self,
        student: GPTModel,
        config: DistillationConfig,
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        require_stored_is_enough(config)
        super().__init__(student, _Nobody(student), config, vocab_size=vocab_size)
        self.temperature = temperature
        self._answer: TopKTeacher | None = None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        *,
        teacher_log_probs: Tensor | None = None,
        teacher_tail_mass: Tensor | None = None,
        teacher_indices: Tensor | None = None,
        **model_arguments: Any,
    ) -> Tensor:
        """As `TeacherStudent.forward`. The teacher's answers are read on the last stage, in training.

        Communicates: tp, in the student and in the loss.
        """
        tokens = (input_ids, position_ids, attention_mask)
        if not self.training or (self.post_process and labels is None):
            return self.student(*tokens, labels=labels, **model_arguments)
        self._begin_micro_batch()
        with without_logits(self.student):
            hidden = self.student(*tokens, **model_arguments)
        if not self.post_process:
            return hidden
        assert teacher_log_probs is not None and teacher_tail_mass is not None and teacher_indices is not None
        self._answer = TopKTeacher.from_logits(
            teacher_indices.transpose(0, 1).long(),
            self.temperature * teacher_log_probs.transpose(0, 1).float(),  # the teacher's logits, up to a constant
            teacher_tail_mass.t(),
            self.temperature,
        )
        weights = torch.ones_like(input_ids) if loss_mask is None else loss_mask
        self._sums.add_tokens(weights.sum(), copies=group_size(self.student.pg_collection.tp))
        loss = self._loss(hidden, hidden, labels, loss_mask)
        self._answer = None
        return loss

    def _teacher_answer(self, teacher_hidden: Tensor) -> TopKTeacher:
        assert self._answer is not None
        return self._answer


class _Nobody(nn.Module):
    """Stands where the teacher would: no weights, and no channels in the pipeline's message."""

    def __init__(self, student: GPTModel) -> None:
        super().__init__()
        self.config = copy.copy(student.config)
        self.config.hidden_size = 0
        self.vocab_size = student.vocab_size
        self.pre_process, self.post_process = student.pre_process, student.post_process

    def set_input_tensor(self, input_tensor: Tensor | None) -> None: ...


def require_stored_is_enough(config: DistillationConfig) -> None:
    """Raises: ValueError: `config` asks for more of the teacher than its k likeliest tokens."""
    require_kind_reads_top_k(config.divergence)
    require(
        not config.hidden_states.enabled,
        "distillation.hidden_states.enabled=true needs the teacher's hidden states, and only its likeliest tokens are "
        "stored. Set it to false, or distil with the teacher in memory (distill.teacher_logits=null).",
    )


@torch.no_grad()
def top_k_of_head(
    teacher: OutputHead,
    config: DivergenceConfig,
    *,
    tp_group: ProcessGroup | None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
) -> TopKTeacher:
    """`divergence.top_k_of_teacher` of hidden @ weight.T [s, b, v/tp], whose logits are formed a few tokens at a time.

    Args: as those of `fused_linear_loss`.
    Returns: s of all tp ranks, equal on every rank of `tp_group`.
    Communicates: tp; with sequence parallelism a gather of the hidden states, and per chunk what `top_k` does.
    """
    hidden, weight = teacher
    if sequence_parallel and group_size(tp_group) > 1:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    vocabulary = Vocabulary.split(weight.shape[0], vocab_size, tp_group)
    real = weight[: vocabulary.local].t()
    step = max(1, LOGITS_BYTES // (weight.shape[0] * weight.element_size()))
    rows = hidden.reshape(-1, hidden.shape[-1])
    parts = [top_k_of_rows(chunk @ real, config, vocabulary) for chunk in rows.split(step)]
    tails = [part.log_tail_mass for part in parts if part.log_tail_mass is not None]
    return TopKTeacher(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat(tails) if tails else None,
        config.temperature,
    ).of_tokens(*hidden.shape[:-1])
