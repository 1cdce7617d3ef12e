"""What the divergences between student and teacher are: one formula per kind, on a chunk of tokens.

Minitron distils by forward KL at temperature 1 (arXiv:2407.14679, Retraining: KL alone reached a lower loss than KL
with cross-entropy, reverse KL, MSE or cosine); the others are here to be compared with it.

    scores      softcap * tanh(scale * logits / softcap) / temperature, of student and teacher     [n, v/tp]
    divergence  one value per token                                                                [n]
    gradient    of the divergence with respect to the student's scores                             [n, v/tp]

n tokens of a chunk; v real entries of the vocabulary, of which this rank holds a part. Arithmetic is in float32, or in
float64 for float64 logits. A formula reads its chunk, agrees over tp on a few numbers per token, and returns the
divergence and a function that forms the gradient from what the formula still holds. Where no gradient waits for the
divergence (SUMMED_AT_THE_END, and the cross-entropy), it returns this rank's part.

A logit of -inf (a token that a model never says) has probability 0, and 0 log 0 is 0. Where one model has no
probability and the other has, their log p differ by FURTHEST at most; cosine and mse leave out what the teacher never
says. So every value and gradient is finite where each row has a finite logit.

Communication: tp, in `vocabulary.Reductions` alone: [n] values or a few of them, in the forward pass only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minitron_nemo.divergence.vocabulary import Reductions, Vocabulary, column, row_max
from minitron_nemo.parallel import group_size

FURTHEST = 1e4
"""Nats, of log p_T - log p_S: far above what finite logits give, and its square fits float32."""

# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Capped and scaled logits in float32 or float64; the very logits where nothing is to be done."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        scores = scores * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh_()
    return scores


def tempered(scores: Tensor, temperature: float) -> Tensor:
    return scores if temperature == 1.0 else scores / temperature


def gradient_of_logits(gradient: Tensor, scores: Tensor, scale: float, softcap: float | None) -> Tensor:
    """From the gradient of the (untempered) scores, which is overwritten."""
    if softcap is not None:
        gradient.mul_(1 - (scores / softcap).square_())
    return gradient.mul_(scale) if scale != 1.0 else gradient


# ---- softmax over the split vocabulary -------------------------------------------------------------------------------


@dataclass
class Softmax:
    """p = exp(scores - log_sum) over the whole vocabulary.

    `log_sum` is that of the very factor that multiplies exp(scores - maximum) on this rank to become p, and in float64,
    so that no rounding of a sum over a large vocabulary enters a difference of two log p. Where it is None, `scores` is
    log p itself; its rounding is in p too, and so cancels in every divergence to first order.
    """

    scores: Tensor
    """[n, v/tp]"""
    log_sum: Tensor | None
    """[n] float64: log of the sum of exp(scores), equal on every rank but for that rounding"""
    exponentials: Tensor | None = None

    @property
    def p(self) -> Tensor:
        """[n, v/tp]. In the place of log p where that is what `scores` is: read it before."""
        if self.exponentials is None:
            self.exponentials = self.scores.exp_()
        return self.exponentials

    def log_p(self, of_scores: Tensor) -> Tensor:
        """Of some scores [n] of each token."""
        return of_scores if self.log_sum is None else of_scores - self.log_sum


def has_log_softmax(like: Tensor, vocabulary: Vocabulary) -> bool:
    """Whether log p comes from one kernel: on an accelerator, where a pass over memory is a launch, and of a vocabulary
    in one piece. On a CPU a second exponential costs more than the passes, which find a chunk in the cache.
    """
    return like.device.type != "cpu" and group_size(vocabulary.group) == 1


def log_softmax(logits: Tensor, scale: float, softcap: float | None, temperature: float) -> Softmax:
    """Of a vocabulary in one piece; nothing else of its size is kept."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if scale != 1.0 or softcap is not None or temperature != 1.0:
        logits = tempered(scores(logits, scale, softcap), temperature)
    return Softmax(torch.log_softmax(logits, -1, dtype=dtype), None)


def softmaxes(all_scores: Sequence[Tensor], reduce: Reductions) -> list[Softmax]:
    """Of several models' scores [n, v/tp] at once. Communicates: tp, one gather of [models, n]."""

    # The exponentials are of the rank's own maximum, and do not wait for the others'.
    def local_maxima() -> Tensor:
        # Of a part of the vocabulary that is never said: exp(-inf - anything finite) is 0.
        maxima = torch.stack([row_max(scores) for scores in all_scores])
        return maxima.clamp_min_(torch.finfo(maxima.dtype).min)

    maxima = reduce.store_local(local_maxima)
    exponentials = [(scores - maximum.unsqueeze(-1)).exp_() for scores, maximum in zip(all_scores, maxima, strict=True)]
    log_sums = reduce.logsumexp(lambda: maxima.double() + torch.stack([e.sum(-1) for e in exponentials]).double().log())
    factors = (maxima - log_sums).exp().to(maxima.dtype)
    log_sums = torch.where(factors > 0, maxima - factors.double().log(), log_sums)
    return [
        Softmax(scores, log_sum, e.mul_(factor.unsqueeze(-1)))
        for scores, e, factor, log_sum in zip(all_scores, exponentials, factors, log_sums, strict=True)
    ]


def log_ratio(teacher: Softmax, student: Softmax) -> Tensor:
    """log p_T - log p_S [n, v/tp], exactly 0 where the models are equal, and where neither ever says a token."""
    ratio = teacher.scores - student.scores
    if student.log_sum is not None and teacher.log_sum is not None:
        ratio.add_(column(student.log_sum - teacher.log_sum, ratio))
    return ratio.nan_to_num_(nan=0.0, posinf=FURTHEST, neginf=-FURTHEST)  # a NaN of the logits stays in p


Result: TypeAlias = tuple[Tensor, Callable[[], Tensor]]
"""The divergence [n] or this rank's part of it, and this rank's part of its gradient, [n, v/tp], when called."""

SUMMED_AT_THE_END = ("forward_kl", "mse")
"""Kinds whose formulas return this rank's part of the divergence."""

# ---- of probabilities: p_T, p_S and log(p_T / p_S), which may be overwritten -----------------------------------------
# (p_S not where its cross-entropy is asked for).
# Where a sum of p_S - p_T or p_T - p_S is added to a divergence, it adds 0 over the vocabulary, but makes every term
# non-negative, which keeps the small KL of a student near its teacher out of the rounding of large terms.


def forward_kl_of(p_t: Tensor, p_s: Tensor, log_ratio: Tensor, beta: float, reduce: Reductions) -> Result:
    """sum p_T log(p_T / p_S); gradient p_S - p_T."""
    # In place: what is allocated anew for every chunk costs more than the arithmetic.
    if not reduce.again:
        log_ratio.mul_(p_t)
    difference = torch.sub(p_s, p_t, out=p_t)
    divergence = reduce.store_local(lambda: log_ratio.add_(difference).sum(-1))
    return divergence, lambda: difference


def reverse_kl_of(p_t: Tensor, p_s: Tensor, log_ratio: Tensor, beta: float, reduce: Reductions) -> Result:
    """R = sum p_S log(p_S / p_T); gradient p_S (log(p_S / p_T) - R)."""
    divergence = reduce.sum(lambda: (p_t - p_s).addcmul_(p_s, log_ratio, value=-1).sum(-1))
    return divergence, lambda: log_ratio.add_(column(divergence, p_s)).mul_(p_s).neg_()


def symmetric_kl_of(p_t: Tensor, p_s: Tensor, log_ratio: Tensor, beta: float, reduce: Reductions) -> Result:
    """sum (p_T - p_S) log(p_T / p_S) / 2; gradient half of (p_S - p_T) + p_S (log(p_S / p_T) - R), R the reverse KL."""
    difference = p_s - p_t
    both, reverse = reduce.sum(
        lambda: torch.stack([-(difference * log_ratio).sum(-1), -(p_s * log_ratio + difference).sum(-1)])
    )
    return both / 2, lambda: (difference - p_s * (log_ratio + column(reverse, p_s))) / 2


def jensen_shannon_of(p_t: Tensor, p_s: Tensor, log_ratio: Tensor, beta: float, reduce: Reductions) -> Result:
    """m = beta p_T + (1 - beta) p_S;  beta sum p_T log(p_T / m) + (1 - beta) R,  R = sum p_S log(p_S / m);
    gradient (1 - beta) p_S (log(p_S / m) - R).
    """
    # log(m / the larger of p_T, p_S), whose exponential cannot overflow; the other is further from m by |log_ratio|.
    share_of_smaller = torch.where(log_ratio < 0, beta, 1 - beta)
    m_over_larger = (share_of_smaller * (-log_ratio.abs()).expm1()).log1p()
    m_over_s = m_over_larger + log_ratio.clamp_min(0)

    def local_sums() -> Tensor:
        student_terms = p_s * m_over_s
        terms = beta * p_t * (m_over_larger - log_ratio.clamp_max(0)) + (1 - beta) * student_terms
        return torch.stack([-terms.sum(-1), -student_terms.sum(-1)])

    divergence, from_student = reduce.sum(local_sums)
    return divergence, lambda: (beta - 1) * p_s * (m_over_s + column(from_student, p_s))


OF_PROBABILITIES = {
    "forward_kl": forward_kl_of,
    "reverse_kl": reverse_kl_of,
    "symmetric_kl": symmetric_kl_of,
    "jensen_shannon": jensen_shannon_of,
}

# ---- of scores -------------------------------------------------------------------------------------------------------


def cosine_of(teacher: Tensor, student: Tensor, vocab_size: int, reduce: Reductions) -> Result:
    """D = 1 - cos(T, S) = |s - t|^2 / 2, s = S / |S|, t = T / |T|, which is 0 for equal scores; gradient
    ((1 - D) s - t) / |S|.
    """
    squares = reduce.sum(lambda: torch.stack([student.square().sum(-1), teacher.square().sum(-1)]))
    inverse_norms = squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt()
    unit_student = student * inverse_norms[0].unsqueeze(-1)
    difference = unit_student - teacher * inverse_norms[1].unsqueeze(-1)
    divergence = reduce.sum(lambda: difference.square().sum(-1) / 2)
    return divergence, lambda: (difference - unit_student * divergence.unsqueeze(-1)) * inverse_norms[0].unsqueeze(-1)


def mse_of(teacher: Tensor, student: Tensor, vocab_size: int, reduce: Reductions) -> Result:
    """mean (S - T)^2 over the real vocabulary; gradient 2 (S - T) / v."""
    difference = student - teacher
    divergence = reduce.store_local(lambda: difference.square().sum(-1) / vocab_size)
    return divergence, lambda: difference * (2 / vocab_size)


OF_SCORES = {"cosine": cosine_of, "mse": mse_of}

# ---- cross-entropy on the labels -------------------------------------------------------------------------------------


def cross_entropy_of(student: Softmax, labels: Tensor, vocabulary: Vocabulary) -> Result:
    """-log p_S(label), this rank's part; gradient p_S - 1[label], 0 for a label that is ignored."""
    here, columns = vocabulary.local_columns(labels)
    scores = student.scores
    of_labels = (
        scores.gather(-1, columns.unsqueeze(-1)).squeeze(-1) if vocabulary.local > 0 else scores.new_zeros(len(scores))
    )

    def gradient() -> Tensor:
        gradient = student.p * column(labels >= 0, student.p)
        ones = column(here, gradient)
        return gradient.scatter_add_(-1, columns.unsqueeze(-1), ones.neg_()) if vocabulary.local > 0 else gradient

    return cross_entropy(student.log_p(of_labels).to(scores.dtype), here, labels, vocabulary), gradient


def cross_entropy(log_p: Tensor, here: Tensor, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[n], to be summed up over the ranks: -log p(label) where the label is here, 0 where it is elsewhere or negative
    (ignored), infinite where it is not in the vocabulary.
    """
    value = torch.where(here, -log_p, 0.0)
    return value.masked_fill(labels >= vocabulary.size, float("inf"))
