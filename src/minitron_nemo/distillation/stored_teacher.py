"""The teacher that is not there: what it once said of the tokens, read from the batch.

What is stored of a token are draws of the teacher's distribution (divergence/sampled.py) or its likeliest tokens
(divergence/top_k.py). It travels in the batch beside the tokens, so that data and context parallelism share it out as
they do these.

    teacher_draws       m of each token, global, ascending           [b, s/cp, m]   int32
    teacher_entropy     of the distribution they are from, in nats   [b, s/cp]      float16
  or
    teacher_log_probs   of the k tokens, in nats                     [b, s/cp, k]   float16 or float32
    teacher_tail_mass   probability of all others                    [b, s/cp]      float32
    teacher_indices     of the k tokens, global                      [b, s/cp, k]   int32

Communication: tp in `top_k_of_head` and `draws_of_head` (see there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from minitron_nemo.config.distillation import DistillationConfig, DivergenceConfig, require_stored_is_enough
from minitron_nemo.distillation.loss import Walk
from minitron_nemo.distillation.teacher import Load, Tokens
from minitron_nemo.divergence.fused_linear import LOGITS_BYTES, OutputHead
from minitron_nemo.divergence.known_teacher import Known, KnownTeacher
from minitron_nemo.divergence.sampled import DRAWS, ENTROPY, STORED_DRAWS, SampledTeacher, draws_of_rows
from minitron_nemo.divergence.streamed import top_k_of_rows
from minitron_nemo.divergence.token_rows import even_slices
from minitron_nemo.divergence.top_k import STORED, TopKTeacher
from minitron_nemo.divergence.vocabulary import Vocabulary
from minitron_nemo.parallel import ProcessGroup, group_size


class StoredTeacher:
    """Answers with what is stored of the batch's tokens; no weights, and no channels in the pipeline's message.

    Args:
        temperature: of the stored answers.
    """

    message_width = 0
    reads = (*STORED_DRAWS, *STORED)
    can_validate = False
    model = None
    learns = False

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def meet(self, student: GPTModel, config: DistillationConfig) -> None:
        require_stored_is_enough(config)

    def receive(self, message: Tensor | None) -> None: ...

    def run(self, tokens: Tokens, **model_arguments: Any) -> None: ...

    def answer(self, output: Tensor | None, said: Mapping[str, Tensor]) -> KnownTeacher:
        if DRAWS in said:
            draws, entropy = said[DRAWS].transpose(0, 1), said[ENTROPY].t().float()
            return SampledTeacher(draws, entropy, self.temperature)
        log_probs, tail_mass, indices = (said[key] for key in STORED)
        return TopKTeacher.from_logits(
            indices.transpose(0, 1).long(),
            self.temperature * log_probs.transpose(0, 1).float(),  # the teacher's logits, up to a constant
            tail_mass.t(),
            self.temperature,
        )

    def own_loss(self, output: Tensor | None, labels: Tensor | None, weights: Tensor, walk: Walk) -> None: ...


@dataclass(frozen=True)
class TeacherInStore:
    """A store whose answers come with the batches."""

    temperature: float = 1.0
    """Of the stored answers."""

    def open(self, load: Load) -> StoredTeacher:
        return StoredTeacher(self.temperature)

    def flops_per_token(self, seq_length: int, *, learns: bool) -> int:
        return 0


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

    def ask(logits: Tensor, tokens: slice, vocabulary: Vocabulary) -> TopKTeacher:
        return top_k_of_rows(logits, config, vocabulary)

    return _asked(teacher, ask, tp_group, vocab_size, sequence_parallel)


def draws_of_head(
    teacher: OutputHead,
    offsets: Tensor,
    draws: int,
    config: DivergenceConfig,
    *,
    tp_group: ProcessGroup | None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
) -> SampledTeacher:
    """`draws` of each token's distribution, hidden @ weight.T [s, b, v/tp]; arguments as those of `top_k_of_head`.

    Args:
        offsets: [s, b] of all tp ranks, as `draws_of_rows` takes them.
    Communicates: tp; with sequence parallelism a gather of the hidden states, and per chunk what the draws take.
    """
    rows = offsets.reshape(-1)

    def ask(logits: Tensor, tokens: slice, vocabulary: Vocabulary) -> SampledTeacher:
        return draws_of_rows(logits, rows[tokens], draws, config, vocabulary)

    return _asked(teacher, ask, tp_group, vocab_size, sequence_parallel)


@torch.no_grad()
def _asked(
    teacher: OutputHead,
    ask: Callable[[Tensor, slice, Vocabulary], Known],
    tp_group: ProcessGroup | None,
    vocab_size: int | None,
    sequence_parallel: bool,
) -> Known:
    """What `ask` makes of the logits [n, real columns] of these rows, of all tokens [s, b]."""
    hidden, weight = teacher
    if sequence_parallel and group_size(tp_group) > 1:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    vocabulary = Vocabulary.split(weight.shape[0], vocab_size, tp_group)
    real = weight[: vocabulary.local].t()
    rows = hidden.reshape(-1, hidden.shape[-1])
    longest = max(1, LOGITS_BYTES // (weight.shape[0] * weight.element_size()))
    parts = [ask(rows[tokens] @ real, tokens, vocabulary) for tokens in even_slices(len(rows), longest)]
    return KnownTeacher.joined(parts).of_tokens(*hidden.shape[:-1])
