"""Claims about the module that holds student and teacher, driven by Megatron's own schedules, DDP and reductions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.distillation import DistillationConfig, DivergenceConfig, HiddenStateConfig
from minitron_nemo.distillation.loss import LOSS, Loss
from minitron_nemo.distillation.teacher import LiveTeacher
from minitron_nemo.distillation.teacher_student import TeacherStudent, adjust_tensor_shapes_fn
from minitron_nemo.parallel import Groups
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import stream_full_parameters
from support.megatron import TINY, build_gpt, causal_mask, smaller
from support.ranks import Ranks

TEACHER = TINY
STUDENT = smaller(TINY, num_layers=2, hidden_size=16, ffn_hidden_size=28, num_attention_heads=4)
TIED_STUDENT = smaller(STUDENT, share_embeddings_and_output_weights=True)
REAL_VOCABULARY = 61  # of 66 padded
MICRO_BATCHES, B, S = 3, 2, 8


@pytest.fixture
def tokens() -> Tensor:
    """[micro-batches, b, s + 1]"""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(REAL_VOCABULARY, (MICRO_BATCHES, B, S + 1), generator=generator)


def teacher_student(shape: ModelShape, config: DistillationConfig | None = None, **overrides: Any) -> TeacherStudent:
    student = build_gpt(shape, seed=1, **overrides).train()
    teacher = LiveTeacher(build_gpt(TEACHER, seed=2, **overrides))
    return TeacherStudent(student, teacher, config, vocab_size=REAL_VOCABULARY)


def loss_mask(batch: Tensor) -> Tensor:
    """[b, s] of weights, some 0, made of the tokens."""
    return (batch[:, :-1] % 4).float() / 2


def step(
    tokens: Tensor,
    shape: ModelShape,
    config: DistillationConfig | None = None,
    *,
    training: bool = True,
) -> dict[str, Any]:
    """On a rank: one step through the real schedule.

    Returns: `losses` [micro-batches, b, s] (last stage only); `gradients`, full, by name; `teacher_moved`.
    """
    # The real runs free each sent message's memory early; it must not be a view of something that lives on.
    model = teacher_student(
        shape, config, deallocate_pipeline_outputs=True, finalize_model_grads_func=finalize_model_grads
    )
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    wrapped.zero_grad_buffer()
    wrapped.train(training)
    teacher_before = {name: parameter.clone() for name, parameter in model.teacher.named_parameters()}

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        inputs, labels = batch[:, :-1], batch[:, 1:]
        positions = torch.arange(S).expand(B, S)
        mask = loss_mask(batch)

        def reduce(loss: Tensor | Loss) -> tuple[Tensor, Tensor]:
            if isinstance(loss, Tensor):  # in evaluation
                return (loss * mask).mean(), loss
            assert loss.count == mask.sum()
            assert not any(values.requires_grad for values in loss.report.values())
            return loss.sum / mask.numel(), loss.report[LOSS]

        return model(inputs, positions, causal_mask(S), labels=labels, loss_mask=mask), reduce

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(tokens),
        model=wrapped,
        num_microbatches=MICRO_BATCHES,
        seq_length=S,
        micro_batch_size=B,
        forward_only=not training,
        adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(wrapped),
    )
    teacher_moved = any(
        not torch.equal(parameter, teacher_before[name]) for name, parameter in model.teacher.named_parameters()
    )

    def gradients(of: Any, of_shape: ModelShape) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter in of.parameters():
                parameter.copy_(parameter.main_grad)
        return {name: each.clone() for name, each in stream_full_parameters(of, of_shape, Groups.from_megatron())}

    return {
        "losses": torch.stack(losses) if losses else None,
        "gradients": gradients(model.student, shape) if training else {},
        "teacher_gradients": gradients(model.teacher.model, TEACHER) if model.teacher.learns else {},
        "teacher_has_gradient": any(
            parameter.grad is not None or hasattr(parameter, "main_grad") for parameter in model.teacher.parameters()
        ),
        "teacher_moved": teacher_moved,
    }


def step_by_hand(tokens: Tensor, shape: ModelShape, config: DistillationConfig) -> dict[str, Any]:
    """On one rank: both models' logits, float64 softmax over the real vocabulary, autograd; no schedule, no DDP."""
    student, teacher = build_gpt(shape, seed=1), build_gpt(TEACHER, seed=2)
    losses, weights, evaluation_losses, of_teacher = [], [], [], []
    for batch in tokens:
        inputs, labels = batch[:, :-1], batch[:, 1:]
        arguments = (inputs, torch.arange(S).expand(B, S), causal_mask(S))
        student_logits = student(*arguments).double()
        temperature = config.divergence.temperature
        teacher_logits = teacher(*arguments).double()[..., :REAL_VOCABULARY]
        of_teacher.append(F.cross_entropy(teacher_logits.transpose(1, 2), labels, reduction="none"))
        teacher_logits = teacher_logits.detach() / temperature
        log_p_teacher = teacher_logits.log_softmax(-1)
        real_logits = student_logits[..., :REAL_VOCABULARY]
        log_p_student = (real_logits / temperature).log_softmax(-1)
        divergence = temperature**2 * (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)
        cross_entropy = F.cross_entropy(real_logits.transpose(1, 2), labels, reduction="none")
        losses.append(divergence + config.cross_entropy_weight * cross_entropy)
        weights.append(loss_mask(batch))
        evaluation_losses.append(cross_entropy.detach())
    (torch.stack(losses) * torch.stack(weights)).mean().backward()
    (torch.stack(of_teacher) * torch.stack(weights)).mean().backward()
    teacher_gradients = {name: parameter.grad.clone() for name, parameter in teacher.named_parameters()}
    return {
        "teacher_gradients": teacher_gradients if config.teacher_lr > 0 else {},
        "losses": torch.stack(losses).detach().float(),
        "evaluation_losses": torch.stack(evaluation_losses).float(),
        "gradients": {name: parameter.grad.clone() for name, parameter in student.named_parameters()},
    }


CONFIGS = {
    "kl": DistillationConfig(),
    "kl while the teacher is corrected": DistillationConfig(teacher_lr=1e-4),
    "kl at temperature 2 with cross-entropy and the teacher corrected": DistillationConfig(
        divergence=DivergenceConfig(temperature=2.0), cross_entropy_weight=0.3, teacher_lr=1e-4
    ),
    "kl at temperature 2 with cross-entropy": DistillationConfig(
        divergence=DivergenceConfig(temperature=2.0), cross_entropy_weight=0.3
    ),
}


@pytest.mark.parametrize("layout", ["single", "tp2", "tp2-sp", "pp2"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shape", [STUDENT, TIED_STUDENT], ids=["untied", "tied"])
def test_a_step_gives_the_losses_and_gradients_of_one_process_by_hand(
    ranks: Ranks, tokens: Tensor, shape: ModelShape, config: DistillationConfig, layout: str
) -> None:
    (expected,) = ranks("single").run(step_by_hand, tokens, shape, config)
    results = ranks(layout).run(step, tokens, shape, config)

    assert any(result["losses"] is not None for result in results)
    for rank, result in enumerate(results):
        if result["losses"] is not None:  # the last stage
            assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        for gradients in ("gradients", "teacher_gradients"):
            assert result[gradients].keys() == expected[gradients].keys()
            for name, gradient in result[gradients].items():
                assert_close(
                    gradient,
                    expected[gradients][name],
                    rtol=1e-4,  # float32 sums in another order
                    atol=1e-6,
                    msg=lambda text, rank=rank, name=name: f"{name} on rank {rank} of {layout}: {text}",
                )


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_the_teacher_gets_no_gradient_and_does_not_change(ranks: Ranks, tokens: Tensor, layout: str) -> None:
    for result in ranks(layout).run(step, tokens, STUDENT):
        assert not result["teacher_has_gradient"]
        assert not result["teacher_moved"]


@pytest.mark.parametrize("layout", ["single", "tp2-sp", "pp2"])
def test_evaluation_reports_the_cross_entropy_of_the_student(ranks: Ranks, tokens: Tensor, layout: str) -> None:
    (expected,) = ranks("single").run(step_by_hand, tokens, STUDENT, DistillationConfig())
    results = ranks(layout).run(step, tokens, STUDENT, training=False)
    for losses in [result["losses"] for result in results if result["losses"] is not None]:
        assert_close(losses, expected["evaluation_losses"], rtol=1e-5, atol=1e-6)


def like_its_teacher(config: DistillationConfig | None = None, **overrides: Any) -> TeacherStudent:
    """A student that says what its teacher says of some tokens, and something else of others."""
    student, teacher = (build_gpt(TEACHER, seed=2, **overrides) for _ in range(2))
    if student.post_process:
        with torch.no_grad():
            student.decoder.final_layernorm.weight[::2] *= 0.4
    return TeacherStudent(student, LiveTeacher(teacher), config, vocab_size=REAL_VOCABULARY)


def watch(tokens: Tensor, hidden_states: bool) -> dict[str, dict[str, Tensor]]:
    """On a rank: a validation and a training step of this data-parallel rank's micro-batches, and what they say."""
    group = parallel_state.get_data_parallel_group()
    tokens = tokens[group.rank() :: group.size()]  # of three micro-batches, two on the first of two ranks
    hidden = HiddenStateConfig(enabled=hidden_states, mapping="explicit", pairs=[[0, 3], [3, 1]])
    options = {"calculate_per_token_loss": True, "deallocate_pipeline_outputs": True}
    model = like_its_teacher(DistillationConfig(hidden_states=hidden), **options)

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        mask = loss_mask(batch)
        output = model(batch[:, :-1], torch.arange(S).expand(B, S), causal_mask(S), labels=batch[:, 1:], loss_mask=mask)

        def reduce(loss: Tensor | Loss) -> tuple[Tensor, Tensor, Tensor]:
            if isinstance(loss, Tensor):  # in evaluation
                return (loss * mask).sum(), mask.sum().int(), loss
            return loss.sum, loss.count.int(), loss.report[LOSS]

        return output, reduce

    def run(training: bool) -> list[Tensor]:
        model.train(training)
        losses: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(tokens),
            model=model,
            num_microbatches=len(tokens),
            seq_length=S,
            micro_batch_size=B,
            forward_only=not training,
            adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(model),
        )
        return losses

    plain = run(training=False)
    model.begin_validation()
    losses = run(training=False)
    model.end_validation()
    run(training=True)
    model.end_step()
    for watched, alone in zip(losses, plain, strict=True):
        torch.testing.assert_close(watched, alone, rtol=1e-5, atol=1e-6)
    return {"validation": model.validation_losses(), "step": model.step_losses()}


def watch_by_hand(tokens: Tensor) -> dict[str, float]:
    model = like_its_teacher()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in tokens:
        arguments = (batch[:, :-1], torch.arange(S).expand(B, S), causal_mask(S))
        student, teacher = (
            each(*arguments).detach().double()[..., :REAL_VOCABULARY] for each in (model.student, model.teacher.model)
        )
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        for row, mask in enumerate(loss_mask(batch)):
            for place, weight in enumerate(mask):
                p, q = log_p[row, place], log_q[row, place]
                sums += weight * torch.stack([(p.exp() * (p - q)).sum(), (p.argmax() == q.argmax()).double(), one])
    divergence, agreement, weights = sums.tolist()
    return {"divergence": divergence / weights, "agreement": agreement / weights}


one = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("layout", "hidden_states"),
    [("single", False), ("tp2", False), ("tp2-sp", True), ("pp2", False), ("pp2", True), ("dp2", False)],
)
def test_steps_and_validations_measure_divergence_and_agreement_alike_on_every_layout(
    ranks: Ranks, tokens: Tensor, hidden_states: bool, layout: str
) -> None:
    (expected,) = ranks("single").run(watch_by_hand, tokens)
    assert 0.2 < expected["agreement"] < 0.8
    for said in ranks(layout).run(watch, tokens, hidden_states):
        for when in ("validation", "step"):
            for name, value in expected.items():
                assert float(said[when][name]) == pytest.approx(value, rel=1e-5), f"{name} of the {when} on {layout}"


def evaluate_without_a_working_teacher() -> bool:
    model = teacher_student(STUDENT).eval()
    model.teacher.run = None  # calling it would raise
    inputs = torch.zeros(1, S, dtype=torch.long)
    return bool(model(inputs, torch.arange(S)[None], causal_mask(S), labels=inputs).isfinite().all())


def test_the_teacher_does_not_run_in_an_evaluation_that_is_no_validation(ranks: Ranks) -> None:
    assert all(ranks("single").run(evaluate_without_a_working_teacher))


def loss_of_a_student_that_is_its_teacher(tokens: Tensor) -> tuple[Tensor, Tensor]:
    model = TeacherStudent(build_gpt(TEACHER, seed=2).train(), LiveTeacher(build_gpt(TEACHER, seed=2)))
    batch = tokens[0]
    loss = model(batch[:, :-1], torch.arange(S).expand(B, S), causal_mask(S), labels=batch[:, 1:])
    assert loss.count == B * S  # not told a mask, it counts every token
    return loss.sum.detach(), loss.report[LOSS]


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_the_loss_is_zero_when_the_student_is_the_teacher(ranks: Ranks, tokens: Tensor, layout: str) -> None:
    for total, per_token in ranks(layout).run(loss_of_a_student_that_is_its_teacher, tokens):
        assert per_token.shape == (B, S)
        assert total == per_token.count_nonzero() == 0


def keys_of_checkpoints(shape: ModelShape) -> dict[str, list[str]]:
    """Names in plain and distributed checkpoints of a plain student, and of one beside its teacher in every wrapper."""
    plain = build_gpt(shape, seed=1)
    model = teacher_student(shape)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    return {
        "plain": sorted(plain.state_dict()),
        "beside": sorted(model.state_dict()),
        "wrapped": sorted(wrapped.state_dict()),
        "for_save": sorted(model.state_dict_for_save_checkpoint()),
        "sharded plain": sorted(f"module.{key}" for key in plain.sharded_state_dict()),
        "sharded beside": sorted(wrapped.sharded_state_dict()),
        "sharded keys plain": sorted(t.key for t in plain.sharded_state_dict(prefix="module.").values()),
        "sharded keys beside": sorted(t.key for t in model.sharded_state_dict(prefix="module.").values()),
    }


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
@pytest.mark.parametrize("shape", [STUDENT, TIED_STUDENT], ids=["untied", "tied"])
def test_a_checkpoint_holds_the_student_under_its_own_names(ranks: Ranks, shape: ModelShape, layout: str) -> None:
    for keys in ranks(layout).run(keys_of_checkpoints, shape):
        assert keys["plain"] == keys["beside"] == keys["wrapped"] == keys["for_save"]
        assert keys["sharded plain"] == keys["sharded beside"]
        assert keys["sharded keys plain"] == keys["sharded keys beside"]


class Nest(torch.nn.Module):
    """A wrapper that loads by walking its tree, as Lightning's modules do."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def load_students_weights() -> dict[str, bool]:
    other = build_gpt(STUDENT, seed=3)
    result = {}
    for nested in (False, True):
        model = teacher_student(STUDENT)
        teacher_before = {name: value.clone() for name, value in model.teacher.named_parameters()}
        if nested:
            Nest(Nest(model)).load_state_dict(
                {f"module.module.{k}": v for k, v in other.state_dict().items()}, strict=True
            )
        else:
            model.load_state_dict(other.state_dict(), strict=True)
        loaded = dict(other.named_parameters())
        result[f"student, nested={nested}"] = all(
            torch.equal(p, loaded[n]) for n, p in model.student.named_parameters()
        )
        result[f"teacher, nested={nested}"] = all(
            torch.equal(p, teacher_before[n]) for n, p in model.teacher.named_parameters()
        )
    return result


def test_a_plain_student_checkpoint_loads_and_leaves_the_teacher_alone(ranks: Ranks) -> None:
    (result,) = ranks("single").run(load_students_weights)
    assert all(result.values()), result


def load_with_a_missing_weight() -> None:
    model = teacher_student(STUDENT)
    weights = model.state_dict()
    del weights["decoder.final_layernorm.weight"]
    model.load_state_dict(weights, strict=True)


def test_a_student_checkpoint_with_a_missing_weight_is_refused(ranks: Ranks) -> None:
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\) in state_dict: "student\.decoder\.final_layernorm\.weight"'
    ):
        ranks("single").run(load_with_a_missing_weight)


def modes() -> list[bool]:
    model = teacher_student(STUDENT)
    return [
        model.train().teacher.training,
        model.student.training,
        model.eval().student.training,
        model.teacher.training,
    ]


def test_the_teacher_stays_in_eval_mode(ranks: Ranks) -> None:
    assert ranks("single").run(modes) == [[False, True, False, False]]


def bf16_step(tokens: Tensor) -> list[Tensor]:
    student, teacher = (build_gpt(shape, dtype=torch.bfloat16, seed=1) for shape in (STUDENT, TEACHER))
    model = TeacherStudent(student.train(), LiveTeacher(teacher), DistillationConfig(cross_entropy_weight=0.5))
    wrapped = Float16Module(model.config, model)
    batch = tokens[0]
    loss = wrapped(batch[:, :-1], torch.arange(S).expand(B, S), causal_mask(S), labels=batch[:, 1:])
    loss.sum.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.student.parameters())
    return [loss.sum.detach(), *loss.report.values()]


def test_bf16_models_give_a_float32_loss(ranks: Ranks, tokens: Tensor) -> None:
    (values,) = ranks("single").run(bf16_step, tokens)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in values)


def build_mismatched(what: str) -> None:
    teacher = LiveTeacher(build_gpt(TEACHER))
    if what == "vocabulary":
        TeacherStudent(build_gpt(smaller(STUDENT, padded_vocab_size=62)), teacher)
    if what == "sequence_parallel":
        TeacherStudent(build_gpt(STUDENT, sequence_parallel=True), teacher)


@pytest.mark.parametrize(
    ("layout", "what", "message"),
    [
        ("single", "vocabulary", "the student's padded vocabulary of 62 is not the teacher's of 66"),
        ("tp2", "sequence_parallel", "the student has sequence_parallel=True, the teacher False"),
    ],
)
def test_models_that_cannot_stand_side_by_side_are_named(ranks: Ranks, layout: str, what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(layout).run(build_mismatched, what)


def test_config_values_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"distillation.cross_entropy_weight=-1.0 must be at least 0"):
        DistillationConfig(cross_entropy_weight=-1.0)


def only_pipelines_are_adjusted() -> bool:
    model = teacher_student(STUDENT)
    return (adjust_tensor_shapes_fn(model) is not None) == (
        parallel_state.get_pipeline_model_parallel_world_size() > 1
    ) and adjust_tensor_shapes_fn(model.student) is None


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_message_shapes_are_adjusted_only_where_there_are_messages(ranks: Ranks, layout: str) -> None:
    assert all(ranks(layout).run(only_pipelines_are_adjusted))
