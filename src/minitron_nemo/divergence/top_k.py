"""Forward KL over the teacher's k likeliest tokens, from its logits or from what was stored of them.

    bucket         the k tokens and "any other token", k + 1 outcomes with their true probabilities: a KL that is never
                   above the full one, and is it where k is the whole vocabulary
    renormalised   both distributions restricted to the k tokens and divided by their mass there, as others do: how much
                   mass the student puts elsewhere does not count

The k tokens are the largest of the whole vocabulary, wherever tp has put them.

Communication: tp; choosing them gathers k values and indices per token from every rank. The divergence adds up the
student's k scores and, for the bucket, agrees on a maximum and a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import TOP_K, DivergenceConfig
from minitron_nemo.divergence.formulas import FURTHEST, Result, scores, tempered
from minitron_nemo.divergence.known_teacher import KnownTeacher
from minitron_nemo.divergence.vocabulary import Reductions, Vocabulary, column, row_max
from minitron_nemo.parallel import all_gather_shards

LOG_PROBS, TAIL_MASS, INDICES = "teacher_log_probs", "teacher_tail_mass", "teacher_indices"
STORED = (LOG_PROBS, TAIL_MASS, INDICES)
"""Keys of a batch that holds a teacher's answers as they were stored."""


@dataclass(frozen=True)
class TopKTeacher(KnownTeacher):
    """A teacher's answer as k tokens and the rest, at one temperature; constant."""

    log_probs: Tensor
    """[..., k], of the whole vocabulary's softmax, in nats; without a tail mass, up to a constant"""
    log_tail_mass: Tensor | None
    """[...]: log of the other tokens' probability, -inf where there is none; None where it is not known, which the
    renormalised divergence does not mind."""
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls, indices: Tensor, logits: Tensor, tail_mass: Tensor | None, temperature: float = 1.0
    ) -> TopKTeacher:
        """Of stored logits [..., k], whose softmax at `temperature` over the whole vocabulary leaves `tail_mass` [...].

        Log-probabilities do as well: a constant added to the logits changes nothing.
        """
        log_probs = tempered(logits.to(torch.promote_types(logits.dtype, torch.float32)), temperature).log_softmax(-1)
        if tail_mass is None:
            return cls(indices, log_probs, None, temperature)
        tail_mass = tail_mass.to(log_probs.dtype)
        return cls(indices, log_probs + torch.log1p(-tail_mass).unsqueeze(-1), tail_mass.log(), temperature)

    def divergence(
        self, student: Tensor, config: DivergenceConfig, vocabulary: Vocabulary, reduce: Reductions
    ) -> Result:
        return top_k_of(self, student, config, vocabulary, reduce)

    def likeliest(self, vocabulary: Vocabulary) -> Tensor:
        """Of several the first in the vocabulary."""
        less = self.log_probs < self.log_probs.amax(-1, keepdim=True)
        return self.indices.long().masked_fill(less, vocabulary.size).amin(-1)

    def require_fits(self, tokens: torch.Size, config: DivergenceConfig) -> None:
        """Raises: ValueError: other tokens, another k, or a tail that the divergence needs and this does not have."""
        require(
            config.kind == TOP_K,
            f"the teacher is known by its likeliest tokens only, and divergence.kind={config.kind} needs all; use "
            f"divergence.kind={TOP_K}.",
        )
        require(
            self.indices.shape == (*tokens, config.k) == self.log_probs.shape,
            f"the stored teacher has indices {list(self.indices.shape)} and log_probs {list(self.log_probs.shape)}, "
            f"but the student's tokens are {list(tokens)} and divergence.k={config.k}; read the same tokens, and "
            "set divergence.k to what was stored.",
        )
        if config.tail == "bucket":
            require(
                self.log_tail_mass is not None,
                "the stored teacher has no tail mass, which divergence.tail=bucket needs; use tail=renormalised.",
            )
            require(
                self.temperature == config.temperature,
                f"the stored teacher's tail mass is of temperature {self.temperature}, and "
                f"divergence.temperature={config.temperature}; use that of the store, or tail=renormalised.",
            )


def top_k_of_chunk(logits: Tensor, config: DivergenceConfig, vocabulary: Vocabulary) -> TopKTeacher:
    """Of teacher logits [n, real columns]. Communicates: tp, one gather and three reductions; equal on every rank.

    With tail=renormalised there is no tail mass: nothing but the k tokens is read again.
    """
    require(
        config.k <= vocabulary.size,
        f"divergence.k={config.k} is more than the vocabulary has: {vocabulary.size} tokens. Lower divergence.k.",
    )
    answer = tempered(scores(logits, config.teacher_logit_scale, config.teacher_softcap), config.temperature)
    local = torch.topk(answer, min(config.k, vocabulary.local))
    missing = (0, config.k - local.values.shape[-1])
    values = torch.nn.functional.pad(local.values, missing, value=float("-inf"))
    indices = torch.nn.functional.pad(local.indices + vocabulary.first, missing, value=-1)
    all_values = torch.cat(all_gather_shards(values, group=vocabulary.group), -1)
    all_indices = torch.cat(all_gather_shards(indices, group=vocabulary.group), -1)
    largest = torch.topk(all_values, config.k)
    indices = all_indices.gather(-1, largest.indices)
    if config.tail == "renormalised":
        return TopKTeacher(indices, largest.values, None, config.temperature)
    split = _Split(answer, indices, vocabulary, Reductions(vocabulary.group, answer.shape[0]))
    return TopKTeacher(indices, split.log_probs, split.log_tail_mass, config.temperature)


def top_k_of(
    teacher: TopKTeacher, student: Tensor, config: DivergenceConfig, vocabulary: Vocabulary, reduce: Reductions
) -> Result:
    """sum p_T log(p_T / p_S) over the outcomes, from the student's (tempered) scores [n, v/tp].

    The gradient is p_S - p_T at the k tokens and, with the bucket, p_S (1 - tail_T / tail_S) at the others.
    """
    if config.tail == "renormalised":
        values = reduce.sum(lambda: vocabulary.entries(student, teacher.indices).t().contiguous()).t()
        log_q_s = values.log_softmax(-1)
        log_q_t = tempered(teacher.log_probs.to(student), config.temperature / teacher.temperature).log_softmax(-1)
        divergence, difference = _kl(log_q_t, log_q_s)
        return divergence, lambda: _add_at(torch.zeros_like(student), teacher.indices, difference, vocabulary)

    assert teacher.log_tail_mass is not None
    split = _Split(student, teacher.indices, vocabulary, reduce)
    log_p_s = torch.cat([split.log_probs, split.log_tail_mass.unsqueeze(-1)], -1)
    log_p_t = torch.cat([teacher.log_probs, teacher.log_tail_mass.unsqueeze(-1)], -1).to(student)
    divergence, difference = _kl(log_p_t, log_p_s)

    def gradient() -> Tensor:
        others = split.tail_exponentials * column(difference[:, -1] / split.tail_sum, student)  # 0 at the k tokens
        return _add_at(others, teacher.indices, difference[:, :-1], vocabulary)

    return divergence, gradient


class _Split:
    """A softmax over the split vocabulary, told apart into k tokens and the rest, which has its own maximum: however
    little of the mass it is, or all of it, neither logarithm overflows."""

    def __init__(self, scores: Tensor, indices: Tensor, vocabulary: Vocabulary, reduce: Reductions) -> None:
        values = reduce.sum(lambda: vocabulary.entries(scores, indices).t().contiguous()).t()  # [n, k]
        values = values.masked_fill((indices < 0) | (indices >= vocabulary.size), float("-inf"))  # no tokens
        minus_infinity = torch.full_like(values, float("-inf"))
        tail = _add_at(scores.clone(), indices, minus_infinity, vocabulary)
        tail_max = reduce.max(lambda: row_max(tail))
        tail_max = torch.where(tail_max.isfinite(), tail_max, 0.0)  # no token is left over: exp(-inf) is 0
        self.tail_exponentials = tail.sub_(tail_max.unsqueeze(-1)).exp_()
        tail_sum = reduce.sum(lambda: self.tail_exponentials.sum(-1))
        self.tail_sum = tail_sum.clamp_min(1)  # it is at least 1, the maximum's own, or it is 0
        # In float64, which is little work for k + 1 outcomes: scores can be large beside a log-probability.
        log_tail = tail_sum.double().log() + tail_max
        log_all = torch.logaddexp(values.double().logsumexp(-1), log_tail)
        self.log_probs = (values - log_all.unsqueeze(-1)).to(scores.dtype)
        self.log_tail_mass = (log_tail - log_all).to(scores.dtype)


def _kl(log_p_t: Tensor, log_p_s: Tensor) -> tuple[Tensor, Tensor]:
    """[n] and p_S - p_T [n, outcomes], of outcomes of which some may have no probability."""
    p_t = log_p_t.exp()
    difference = log_p_s.exp() - p_t
    log_ratio = torch.where(p_t > 0, (log_p_t - log_p_s).clamp_max(FURTHEST), 0.0)
    return torch.addcmul(difference, p_t, log_ratio).sum(-1), difference


def _add_at(rows: Tensor, indices: Tensor, values: Tensor, vocabulary: Vocabulary) -> Tensor:
    """`rows` [n, v/tp], changed, with `values` [n, k] added at those of the global `indices` that are here."""
    here, columns = vocabulary.local_columns(indices)
    return rows.scatter_add_(-1, columns, torch.where(here, values, 0.0)) if vocabulary.local > 0 else rows
