"""Every divergence of whole float64 logits by autograd, on examples that hold its awkward cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence.fused_linear import OutputHead

S, B, V, REAL = 8, 3, 56, 51  # V is padded to split over 4; the last rank of 4 holds 9 real columns of 14
H_STUDENT, H_TEACHER = 10, 13
K = 5

KINDS = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {},
    "jensen_shannon": {"beta": 0.3},
    "cosine": {},
    "mse": {},
    "top_k": {"k": K},
    "top_k renormalised": {"k": K, "tail": "renormalised"},
}
SETTINGS = {
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold, bare": {"temperature": 0.5, "scale_by_temperature_squared": False},
    "capped": {
        "temperature": 2.0,
        "student_softcap": 5.0,
        "teacher_softcap": 7.0,
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
    },
}

VALUES, GRADIENTS = 1e-6, 1e-5
EVERY = [(kind, setting) for kind in KINDS for setting in SETTINGS]


def config_of(kind: str, **settings: Any) -> DivergenceConfig:
    return DivergenceConfig(kind=kind.split()[0], **KINDS[kind], **settings)


def by_hand(student: Tensor, teacher: Tensor, config: DivergenceConfig, vocab_size: int) -> Tensor:
    """Whole logits [s, b, v], for autograd; in their own precision."""
    student = as_scores(student[..., :vocab_size], config.student_logit_scale, config.student_softcap)
    teacher = as_scores(teacher[..., :vocab_size], config.teacher_logit_scale, config.teacher_softcap)
    student, teacher = student / config.temperature, teacher / config.temperature
    log_p_s, log_p_t = student.log_softmax(-1), teacher.log_softmax(-1)
    top = teacher.topk(config.k).indices
    if config.kind == "forward_kl":
        value = kl(log_p_t, log_p_s)
    elif config.kind == "reverse_kl":
        value = kl(log_p_s, log_p_t)
    elif config.kind == "symmetric_kl":
        value = (kl(log_p_t, log_p_s) + kl(log_p_s, log_p_t)) / 2
    elif config.kind == "jensen_shannon":
        log_m = (config.beta * log_p_t.exp() + (1 - config.beta) * log_p_s.exp()).log()
        value = config.beta * kl(log_p_t, log_m) + (1 - config.beta) * kl(log_p_s, log_m)
    elif config.kind == "cosine":
        value = 1 - F.cosine_similarity(student, teacher, dim=-1)
    elif config.kind == "mse":
        value = F.mse_loss(student, teacher, reduction="none").mean(-1)
    elif config.tail == "renormalised":
        value = kl(teacher.gather(-1, top).log_softmax(-1), student.gather(-1, top).log_softmax(-1))
    else:
        value = kl(outcomes(log_p_t, top), outcomes(log_p_s, top))
    return value * (config.temperature**2 if config.scale_by_temperature_squared else 1.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def outcomes(log_p: Tensor, top: Tensor) -> Tensor:
    """The k tokens and all others as one."""
    others = torch.ones_like(log_p).scatter(-1, top, 0.0)
    return torch.cat([log_p.gather(-1, top), (log_p.exp() * others).sum(-1, keepdim=True).log()], -1)


def as_scores(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(scale * logits / softcap) if softcap is not None else scale * logits


def cross_entropy_by_hand(student: Tensor, labels: Tensor, config: DivergenceConfig, vocab_size: int) -> Tensor:
    scores = as_scores(student[..., :vocab_size], config.student_logit_scale, config.student_softcap)
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view(S, B)


@dataclasses.dataclass
class Case:
    """Hidden states, output weights, labels, weights of divergence and cross-entropy, float64."""

    student: OutputHead
    teacher: OutputHead
    labels: Tensor
    weights: Tensor  # [2, s, b]

    @classmethod
    def random(cls, seed: int = 0) -> Case:
        g = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        labels = torch.randint(REAL, (S, B), generator=g)
        labels[1, 2] = -100
        weights = torch.rand(2, S, B, generator=g, dtype=torch.float64)
        weights[0, 3] = 0  # a masked row
        return cls(
            OutputHead(normal(S, B, H_STUDENT), normal(V, H_STUDENT)),
            OutputHead(normal(S, B, H_TEACHER), normal(V, H_TEACHER)),
            labels,
            weights,
        )

    def to(self, dtype: torch.dtype) -> Case:
        heads = [OutputHead(*(tensor.to(dtype) for tensor in head)) for head in (self.student, self.teacher)]
        return Case(*heads, self.labels, self.weights)

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.student.hidden @ self.student.weight.t(), self.teacher.hidden @ self.teacher.weight.t()


@dataclasses.dataclass
class Expected:
    """What autograd makes of whole float64 logits in one process."""

    divergence: Tensor
    cross_entropy: Tensor
    gradients: list[Tensor]

    @classmethod
    def of(cls, case: Case, config: DivergenceConfig, *leaves: Tensor) -> Expected:
        """Gradients of the weighted sum with respect to `leaves`: the student's logits, or its hidden and weight."""
        leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
        student = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].t()
        teacher = case.logits()[1]
        value = by_hand(student, teacher, config, REAL)
        ce = cross_entropy_by_hand(student, case.labels, config, REAL)
        weighted = (case.weights[0] * value + case.weights[1] * ce).sum()
        return cls(value.detach(), ce.detach(), list(torch.autograd.grad(weighted, leaves)))


def assert_near(actual: Tensor, expected: Tensor, what: str, *, rtol: float) -> None:
    # Where terms of both signs add up, the rounding is that of the largest of them.
    atol = rtol * expected.abs().max().item() / 10
    assert_close(actual.double(), expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def shard(tensor: Tensor, dim: int, group: Any) -> Tensor:
    return tensor.chunk(group.size(), dim)[group.rank()] if group is not None else tensor


def gradients_of(outputs: list[Tensor], weights: list[Tensor], leaves: Iterable[Tensor]) -> list[Tensor | None]:
    """As Megatron's schedules differentiate; through torch.autograd.grad, its reduce-scatter would ask for a device."""
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(outputs), tuple(weights), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    return [leaf.grad for leaf in leaves]
