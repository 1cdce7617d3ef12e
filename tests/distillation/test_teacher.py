"""Whoever answers can teach: a teacher that is neither a model nor a store, with nothing changed around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.distillation import DistillationConfig, DivergenceConfig
from minitron_nemo.distillation.loss import LOSS, Loss, Walk
from minitron_nemo.distillation.teacher import Tokens
from minitron_nemo.distillation.teacher_student import TeacherStudent, adjust_tensor_shapes_fn
from minitron_nemo.divergence.top_k import TopKTeacher
from minitron_nemo.parallel import Groups
from minitron_nemo.weights import stream_full_parameters
from support.megatron import TINY, build_gpt, causal_mask, smaller
from support.ranks import Ranks

STUDENT = smaller(TINY, num_layers=2)
VOCABULARY = STUDENT.padded_vocab_size
MICRO_BATCHES, B, S = 2, 2, 8
CONFIG = DistillationConfig(DivergenceConfig(kind="top_k", k=1), cross_entropy_weight=0.3)


class Echo:
    """Expects of every token that it comes again, with a probability of one half, and nothing of the others."""

    message_width = 0
    reads: tuple[str, ...] = ()
    can_validate = True
    model = None
    learns = False

    def meet(self, student: GPTModel, config: DistillationConfig) -> None: ...

    def receive(self, message: Tensor | None) -> None: ...

    def run(self, tokens: Tokens, **model_arguments: Any) -> None:
        self.heard = tokens[0]

    def answer(self, output: Tensor | None, said: Mapping[str, Tensor]) -> TopKTeacher:
        half = torch.full((*self.heard.t().shape, 1), math.log(0.5))
        return TopKTeacher(self.heard.t().unsqueeze(-1), half, half[..., 0])

    def own_loss(self, output: Tensor | None, labels: Tensor | None, weights: Tensor, walk: Walk) -> None: ...


@pytest.fixture
def tokens() -> Tensor:
    """[micro-batches, b, s + 1]"""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(VOCABULARY, (MICRO_BATCHES, B, S + 1), generator=generator)


def learn_from_echo(tokens: Tensor) -> dict[str, Any]:
    """On a rank: a validation and a step through the real schedule."""
    student = build_gpt(STUDENT, seed=1, calculate_per_token_loss=True, deallocate_pipeline_outputs=True)
    names = sorted(student.state_dict())
    model = TeacherStudent(student, Echo(), CONFIG)
    assert sorted(model.state_dict()) == names
    model.load_state_dict(model.state_dict(), strict=True)

    def forward_step(batches: Any, model: Any) -> tuple[Tensor | Loss, Any]:
        batch = next(batches)
        output = model(batch[:, :-1], torch.arange(S).expand(B, S), causal_mask(S), labels=batch[:, 1:])

        def reduce(loss: Tensor | Loss) -> tuple[Tensor, Tensor, Tensor]:
            if isinstance(loss, Tensor):
                return loss.sum(), torch.tensor(loss.numel()), loss
            return loss.sum, loss.count, loss.report[LOSS]

        return output, reduce

    def run(training: bool) -> list[Tensor]:
        model.train(training)
        losses: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(tokens),
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=S,
            micro_batch_size=B,
            forward_only=not training,
            adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(model),
        )
        return losses

    model.begin_validation()
    run(training=False)
    model.end_validation()
    losses = run(training=True)
    model.end_step()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(parameter.grad)
    gradients = {name: each.clone() for name, each in stream_full_parameters(student, STUDENT, Groups.from_megatron())}
    return {
        "losses": torch.stack(losses) if losses else None,
        "gradients": gradients,
        "validation": model.validation_losses()["divergence"],
        "step": model.step_losses(),
    }


def learn_by_hand(tokens: Tensor) -> dict[str, Any]:
    student = build_gpt(STUDENT, seed=1)
    losses, divergences = [], []
    for batch in tokens:
        inputs, labels = batch[:, :-1], batch[:, 1:]
        log_q = student(inputs, torch.arange(S).expand(B, S), causal_mask(S)).double().log_softmax(-1)
        again = log_q.gather(-1, inputs.unsqueeze(-1)).squeeze(-1)
        divergence = 0.5 * (math.log(0.5) - again) + 0.5 * (math.log(0.5) - (-again.exp()).log1p())
        losses.append(divergence + 0.3 * F.nll_loss(log_q.transpose(1, 2), labels, reduction="none"))
        divergences.append(divergence.detach())
    torch.stack(losses).sum().backward()
    return {
        "losses": torch.stack(losses).detach().float(),
        "gradients": {name: parameter.grad for name, parameter in student.named_parameters()},
        "divergence": float(torch.stack(divergences).mean()),
    }


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_a_teacher_of_another_kind_teaches_by_its_answers_alone(ranks: Ranks, tokens: Tensor, layout: str) -> None:
    (expected,) = ranks("single").run(learn_by_hand, tokens)
    results = ranks(layout).run(learn_from_echo, tokens)
    assert any(result["losses"] is not None for result in results)
    for result in results:
        if result["losses"] is not None:  # the last stage
            assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        assert result["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in result["gradients"].items():
            assert_close(gradient, expected["gradients"][name], rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
        for found in (result["validation"], result["step"]["divergence"]):
            assert float(found) == pytest.approx(expected["divergence"], rel=1e-5)
