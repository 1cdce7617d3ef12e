"""Claims about a student that learns from what its teacher said before: the same losses and gradients as beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.distillation import (
    DistillationConfig,
    DivergenceConfig,
    HiddenStateConfig,
    require_stored_is_enough,
)
from minitron_nemo.distillation.loss import LOSS, Loss
from minitron_nemo.distillation.output_head import output_weight, without_logits
from minitron_nemo.distillation.stored_teacher import StoredTeacher, top_k_of_head
from minitron_nemo.distillation.teacher import LiveTeacher
from minitron_nemo.distillation.teacher_student import TeacherStudent, adjust_tensor_shapes_fn
from minitron_nemo.divergence.fused_linear import OutputHead
from minitron_nemo.divergence.top_k import STORED
from minitron_nemo.parallel import Groups
from minitron_nemo.text.teacher_records import TopKFormat
from minitron_nemo.weights import stream_full_parameters
from support.gathering_attention import build_context_parallel_gpt, positions_on
from support.megatron import TINY, build_gpt, causal_mask, run_gpt, smaller
from support.ranks import Ranks

TEACHER = TINY
STUDENT = smaller(TINY, num_layers=2, hidden_size=16, ffn_hidden_size=28, num_attention_heads=4)
REAL_VOCABULARY = 61  # of 66 padded
MICRO_BATCHES, B, S, K = 2, 2, 8, 5
FORMAT = TopKFormat(k=K, seq_length=S, vocab_size=REAL_VOCABULARY, precision="float32", temperature=2.0, softcap=9.0)
BUCKET = DistillationConfig(FORMAT.divergence, cross_entropy_weight=0.3)
RENORMALISED = DistillationConfig(  # at another temperature than what was stored
    DivergenceConfig(kind="top_k", k=K, tail="renormalised", temperature=0.5, teacher_softcap=9.0)
)
CONFIGS = [BUCKET, RENORMALISED]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """[micro-batches, b, s + 1]"""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(REAL_VOCABULARY, (MICRO_BATCHES, B, S + 1), generator=generator)


def ask_teacher(tokens: Tensor) -> dict[str, Tensor]:
    """On a rank of the last stage: what is stored of every sample, [samples, s, ...], by way of the store's records."""
    teacher, group = build_gpt(TEACHER, seed=2), parallel_state.get_tensor_model_parallel_group()
    options = {"tp_group": group, "vocab_size": REAL_VOCABULARY, "sequence_parallel": teacher.config.sequence_parallel}
    samples = []
    with without_logits(teacher):
        for batch in tokens:
            hidden = run_gpt(teacher, batch[:, :-1])
            answer = top_k_of_head(OutputHead(hidden, output_weight(teacher)), FORMAT.divergence, **options)
            by_sample = dataclasses.replace(
                answer,
                indices=answer.indices.transpose(0, 1),
                log_probs=answer.log_probs.transpose(0, 1),
                log_tail_mass=answer.log_tail_mass.t(),
            )
            samples += [FORMAT.decode(record) for record in FORMAT.encode(by_sample)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in STORED}


@pytest.fixture(scope="module")
def stored(ranks: Ranks, tokens: Tensor) -> dict[str, Tensor]:
    return ranks("single").run(ask_teacher, tokens)[0]


def full_logits(tokens: Tensor) -> Tensor:
    teacher = build_gpt(TEACHER, seed=2)
    return torch.cat([run_gpt(teacher, batch[:, :-1]) for batch in tokens])[..., :REAL_VOCABULARY].detach()


def test_what_is_stored_is_the_softmax_of_the_whole_vocabulary(
    ranks: Ranks, tokens: Tensor, stored: dict[str, Tensor]
) -> None:
    (logits,) = ranks("single").run(full_logits, tokens)
    log_p = (FORMAT.softcap * torch.tanh(logits.double() / FORMAT.softcap) / FORMAT.temperature).log_softmax(-1)
    top = log_p.topk(K)
    log_probs, tail_mass, indices = (stored[key] for key in STORED)
    assert torch.equal(indices.long(), top.indices)
    assert_close(log_probs.double(), top.values, rtol=0, atol=1e-5)
    assert_close(tail_mass.double(), 1 - top.values.exp().sum(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
def test_the_teacher_says_the_same_on_every_layout(
    ranks: Ranks, tokens: Tensor, stored: dict[str, Tensor], layout: str
) -> None:
    for answers in ranks(layout).run(ask_teacher, tokens):
        assert torch.equal(answers[STORED[2]], stored[STORED[2]])
        for key in STORED[:2]:
            assert_close(answers[key], stored[key], rtol=1e-5, atol=1e-6)


# ---- training from it ------------------------------------------------------------------------------------------------


def student_of(config: DistillationConfig, student: Any) -> TeacherStudent:
    return TeacherStudent(student, StoredTeacher(FORMAT.temperature), config, vocab_size=REAL_VOCABULARY)


def inputs_of(samples: Tensor) -> dict[str, Tensor]:
    """[b, s + 1] as a batch; the loss mask has weights, some 0."""
    text = samples[:, :-1]
    positions = torch.arange(S).expand_as(text)
    return {
        "tokens": text,
        "position_ids": positions,
        "labels": samples[:, 1:],
        "loss_mask": (text % 4).float() / 2,
    }


def run(model: Any, batch: dict[str, Tensor]) -> Loss:
    own = {key: batch[key] for key in ("labels", "loss_mask", *STORED) if key in batch}
    return model(batch["tokens"], batch["position_ids"], causal_mask(S), **own)


def step(tokens: Tensor, stored: dict[str, Tensor] | None, configs: list[DistillationConfig]) -> list[dict[str, Any]]:
    """On a rank, for each config: a step through the real schedule; beside the teacher where nothing is stored.

    Returns: `losses` [samples, s] (last stage only), `gradients`, full, by name, and the step's parts.
    """
    return [one_step(tokens, stored, config) for config in configs]


def one_step(tokens: Tensor, stored: dict[str, Tensor] | None, config: DistillationConfig) -> dict[str, Any]:
    # The real runs free each sent message's memory early; it must not be a view of something that lives on.
    overrides = {"deallocate_pipeline_outputs": True, "finalize_model_grads_func": finalize_model_grads}
    student = build_gpt(STUDENT, seed=1, **overrides).train()
    if stored is None:
        teacher = LiveTeacher(build_gpt(TEACHER, seed=2, **overrides))
        model = TeacherStudent(student, teacher, config, vocab_size=REAL_VOCABULARY)
    else:
        model = student_of(config, student)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    wrapped.zero_grad_buffer()
    wrapped.train()
    batches = []
    for number, samples in enumerate(tokens):
        rows = slice(number * B, (number + 1) * B)
        batches.append(inputs_of(samples) | {key: value[rows] for key, value in (stored or {}).items()})

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        return run(model, batch), lambda loss: (loss.sum / batch["loss_mask"].numel(), loss.report[LOSS])

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=wrapped,
        num_microbatches=MICRO_BATCHES,
        seq_length=S,
        micro_batch_size=B,
        forward_only=False,
        adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(wrapped),
    )
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    streamed = stream_full_parameters(model.student, STUDENT, Groups.from_megatron())
    gradients = {name: gradient.clone() for name, gradient in streamed}
    model.end_step()
    return {
        "losses": torch.cat(losses) if losses else None,
        "gradients": gradients,
        "parts": {name: float(value) for name, value in model.step_losses().items()},
    }


@pytest.fixture(scope="module")
def beside_the_teacher(ranks: Ranks, tokens: Tensor) -> list[dict[str, Any]]:
    return ranks("single").run(step, tokens, None, CONFIGS)[0]


@pytest.mark.parametrize("layout", ["single", "tp2", "tp2-sp", "pp2"])
def test_losses_and_gradients_are_those_beside_the_teacher(
    ranks: Ranks, tokens: Tensor, stored: dict[str, Tensor], beside_the_teacher: list[dict[str, Any]], layout: str
) -> None:
    for results in ranks(layout).run(step, tokens, stored, CONFIGS):
        for result, expected in zip(results, beside_the_teacher, strict=True):
            if result["losses"] is not None:  # the last stage
                assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=2e-6)
            assert result["parts"] == pytest.approx(expected["parts"], rel=1e-5, abs=1e-6)
            assert result["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in result["gradients"].items():
                # float32 sums in another order
                assert_close(
                    gradient, expected["gradients"][name], rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
                )


def test_float16_costs_less_than_a_thousandth_of_a_nat(
    ranks: Ranks, tokens: Tensor, stored: dict[str, Tensor], beside_the_teacher: list[dict[str, Any]]
) -> None:
    halved = stored | {STORED[0]: stored[STORED[0]].half()}
    (results,) = ranks("single").run(step, tokens, halved, CONFIGS)
    for result, expected in zip(results, beside_the_teacher, strict=True):
        difference = (result["losses"] - expected["losses"]).abs().max()
        assert 0 < difference < 1e-3


def losses_by_sample(tokens: Tensor, stored: dict[str, Tensor], rows: int) -> dict[int, Tensor]:
    """On a rank: [s] of each sample it has, in micro-batches of `rows`; under context parallelism its part of it."""
    samples = tokens.flatten(0, 1)
    cp, dp = parallel_state.get_context_parallel_world_size(), parallel_state.get_data_parallel_world_size()
    student = (build_context_parallel_gpt if cp > 1 else build_gpt)(STUDENT, seed=1)
    model = student_of(BUCKET, student.train())
    mine = range(parallel_state.get_data_parallel_rank(), len(samples), dp)
    found = {}
    for start in range(0, len(mine), rows):
        numbers = list(mine[start : start + rows])
        batch = inputs_of(samples[numbers]) | {key: value[numbers] for key, value in stored.items()}
        found |= zip(numbers, run(model, get_batch_on_this_cp_rank(batch)).report[LOSS], strict=True)
    return found


@pytest.mark.parametrize(("layout", "rows"), [("single", 1), ("single", 4), ("dp2", 2), ("cp2", 2)])
def test_a_sample_has_the_same_loss_in_any_batch_and_on_any_layout(
    ranks: Ranks,
    tokens: Tensor,
    stored: dict[str, Tensor],
    beside_the_teacher: list[dict[str, Any]],
    layout: str,
    rows: int,
) -> None:
    found: dict[int, Tensor] = {}
    for rank, losses in enumerate(ranks(layout).run(losses_by_sample, tokens, stored, rows)):
        for number, loss in losses.items():
            places = positions_on(rank, 2, S // 2) if layout == "cp2" else torch.arange(S)
            found.setdefault(number, torch.full((S,), float("nan")))[places] = loss
    assert sorted(found) == list(range(MICRO_BATCHES * B))
    losses = torch.stack([found[number] for number in sorted(found)])
    assert_close(losses, beside_the_teacher[0]["losses"], rtol=1e-5, atol=2e-6)


def test_what_is_not_stored_cannot_be_asked_for() -> None:
    hidden = DistillationConfig(FORMAT.divergence, hidden_states=HiddenStateConfig(enabled=True))
    with pytest.raises(ValueError, match=r"hidden_states.enabled=true needs .* only a few of its tokens are stored"):
        require_stored_is_enough(hidden)
    with pytest.raises(ValueError, match=r"divergence.kind=reverse_kl needs all; use divergence.kind=forward_kl"):
        require_stored_is_enough(DistillationConfig(DivergenceConfig(kind="reverse_kl")))
    with pytest.raises(ValueError, match=r"teacher_lr=0.001 needs the teacher's weights, .* Set it to 0"):
        require_stored_is_enough(DistillationConfig(FORMAT.divergence, teacher_lr=1e-3))
