"""Forward KL from tokens drawn from the teacher's distribution: a stored teacher's, without bias (arXiv:2503.16870).

Of each token m draws i_1 .. i_m of p_T and the entropy H(p_T) are kept. Then

    divergence   mean over draws of -log p_S(i) - H(p_T)           in expectation KL(teacher || student)
    gradient     p_S - (how often each token was drawn) / m        in expectation p_S - p_T, that of forward KL

The k likeliest tokens, with the rest left out or as one outcome, would pull the student to another distribution. Of a
single token the divergence may come out below 0.

The draws are systematic: m equidistant points through the cumulated distribution, behind one uniform offset in [0, 1)
of each token. Token i is drawn floor(m p_i) or ceil(m p_i) times, m p_i in expectation: less variance than independent
draws have, for one cumulated sum. They come in ascending order.

    offsets   one per token, uniform                         [n]          float64
    draws     tokens of the vocabulary, ascending            [n, m]       int64, equal on every tp rank
    entropy   of the teacher, in nats                        [n]          float32

Communication: tp; to draw, a maximum, a gather of two values a token and a sum of the draws; for the divergence what a
softmax takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import FORWARD_KL, DivergenceConfig
from minitron_nemo.divergence.formulas import (
    FURTHEST,
    Result,
    has_log_softmax,
    log_softmax,
    scores,
    softmaxes,
    tempered,
)
from minitron_nemo.divergence.known_teacher import KnownTeacher
from minitron_nemo.divergence.token_rows import chunks
from minitron_nemo.divergence.vocabulary import Reductions, Vocabulary, row_max
from minitron_nemo.parallel import all_gather_shards, all_reduce_max, all_reduce_sum, group_rank, group_size

DRAWS, ENTROPY = "teacher_draws", "teacher_entropy"
STORED_DRAWS = (DRAWS, ENTROPY)
"""Keys of a batch that holds draws of a teacher's distribution."""


@dataclass(frozen=True)
class SampledTeacher(KnownTeacher):
    """A teacher's answer as draws, `indices` [..., m] ascending, at one temperature."""

    entropy: Tensor
    """[...], in nats, of the tempered distribution"""
    temperature: float = 1.0

    def divergence(
        self, student: Tensor, config: DivergenceConfig, vocabulary: Vocabulary, reduce: Reductions
    ) -> Result:
        """This rank's part of it, as forward KL's."""
        if has_log_softmax(student, vocabulary):
            s = log_softmax(student, 1.0, None, 1.0)
        else:
            (s,) = softmaxes([student], reduce)
        here, columns = vocabulary.local_columns(self.indices.long())
        share = 1 / self.indices.shape[-1]

        def local_part() -> Tensor:
            if vocabulary.local == 0:
                return student.new_zeros(len(student))
            surprise = -s.log_p(s.scores.gather(-1, columns).t()).t().clamp_min(-FURTHEST)
            return torch.where(here, surprise - self.entropy.unsqueeze(-1), 0.0).sum(-1).to(student.dtype) * share

        divergence = reduce.store_local(local_part)

        def gradient() -> Tensor:
            if vocabulary.local == 0:
                return s.p
            return s.p.scatter_add_(-1, columns, here.to(student.dtype) * -share)

        return divergence, gradient

    def likeliest(self, vocabulary: Vocabulary) -> Tensor:
        """The token drawn most often; of several, one of them."""
        return self.indices.long().mode(-1).values

    def require_fits(self, tokens: torch.Size, config: DivergenceConfig) -> None:
        require(
            config.kind == FORWARD_KL,
            f"the teacher is known by draws of its distribution, from which divergence.kind={FORWARD_KL} is estimated, "
            f"and divergence.kind={config.kind} cannot be; use {FORWARD_KL}.",
        )
        require(
            self.indices.shape[:-1] == tokens == self.entropy.shape,
            f"the stored teacher has draws {list(self.indices.shape)} and entropies {list(self.entropy.shape)}, but "
            f"the student's tokens are {list(tokens)}; read the same tokens.",
        )
        require(
            self.temperature == config.temperature,
            f"the stored teacher's draws are of temperature {self.temperature}, and divergence.temperature="
            f"{config.temperature}; use that of the store.",
        )


def draws_of_rows(
    teacher: Tensor, offsets: Tensor, draws: int, config: DivergenceConfig, vocabulary: Vocabulary
) -> SampledTeacher:
    """
    Args:
        teacher: logits [n, real columns].
        offsets: [n] float64 in [0, 1), equal on every tp rank.
        draws: m of each token, at least 1.
    Communicates: tp, three collectives per chunk.
    """
    parts = [
        _draws_of_chunk(teacher[chunk], offsets[chunk], draws, config, vocabulary)
        for chunk in chunks(teacher, vocabulary)
    ]
    return KnownTeacher.joined(parts)


def _draws_of_chunk(
    logits: Tensor, offsets: Tensor, draws: int, config: DivergenceConfig, vocabulary: Vocabulary
) -> SampledTeacher:
    group = vocabulary.group
    answer = tempered(scores(logits, config.teacher_logit_scale, config.teacher_softcap), config.temperature)
    top = all_reduce_max(row_max(answer).clamp_min(torch.finfo(answer.dtype).min), group=group)
    below_top = (answer - top.unsqueeze(-1)).clamp_min_(-FURTHEST)  # exp of which is 0, and 0 times which is
    exponentials = below_top.exp()
    weighted = torch.linalg.vecdot(exponentials, below_top).double()
    # float64: in float32 the rounding of a sum over 128k tokens is as large as the probability of many.
    cumulated = exponentials.double().cumsum_(-1)  # which may be in the place of the exponentials
    mass = cumulated[:, -1] if vocabulary.local > 0 else cumulated.new_zeros(len(logits))
    masses, weighted_sums = torch.stack(all_gather_shards(torch.stack([mass, weighted]), group=group), -1)  # [n, tp]
    ends = masses.cumsum(-1)
    total = ends[:, -1]
    entropy = total.log() - weighted_sums.sum(-1) / total

    steps = torch.arange(draws, dtype=torch.float64, device=logits.device)
    points = (offsets.unsqueeze(-1) + steps) * (total / draws).unsqueeze(-1)  # [n, m] within [0, total)
    # Whose part of the vocabulary a point falls into is read off the same numbers on every rank.
    owner = torch.searchsorted(ends, points, right=True).clamp_max_(group_size(group) - 1)
    within = points - (ends - masses).gather(-1, owner)
    # Below this rank's sum, whatever was rounded: the token found there has a probability.
    within = torch.minimum(within, (mass * (1 - 2**-52)).unsqueeze(-1))
    columns = torch.searchsorted(cumulated, within, right=True)
    mine = torch.where(owner == group_rank(group), columns + vocabulary.first, 0)
    return SampledTeacher(all_reduce_sum(mine, group=group), entropy.float(), config.temperature)
