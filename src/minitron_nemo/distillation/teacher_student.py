"""A trainable student and its teacher as one model that Megatron's schedules, DDP and optimizer can drive.

Each pipeline stage holds its part of both. Between stages one message carries both activations, side by side on the
hidden axis, so that Megatron's own non-interleaved schedule needs only to be told the message's width.

    message     student and teacher activation               [s/cp, b, h_student + h_teacher]; s/(cp*tp) with SP
    loss        last stage: sum, count and report            loss.py

In training the loss is the divergence from the teacher's answer (teacher.py), whose logits are formed a few tokens at a
time and never whole (fused_linear.py), and by config losses between hidden states, which sit on the stages where the
states are (hidden_states.py); in evaluation it is the student's cross-entropy on the labels, one value per token
[b, s/cp], formed as the loss is and comparable with any other run, and the teacher does not run, but for a validation
(`begin_validation`), which measures how far they are apart. A checkpoint of this module is a checkpoint of the student
alone, under the student's own names; where there are hidden losses, their projections and balance are added to it under
`hidden_states.`, and a teacher that learns under `teacher.`.

Communication: what both models do by themselves; tp in the loss (see fused_linear.py); pp carries the message, whose
teacher half is constant (its gradient travels back as zeros); all ranks once at the end of a step or a validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from minitron_nemo.by_source import SourceSums
from minitron_nemo.checks import require
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.distillation.balance import StepSums
from minitron_nemo.distillation.hidden_states import HiddenStateLosses
from minitron_nemo.distillation.loss import (
    AGREEMENT,
    CROSS_ENTROPY,
    DIVERGENCE,
    TEACHER_CROSS_ENTROPY,
    Loss,
    cross_entropy_of_tokens,
    distillation_loss,
    walk_of,
)
from minitron_nemo.distillation.output_head import output_weight, without_logits
from minitron_nemo.distillation.teacher import Teacher, Tokens
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_divergence
from minitron_nemo.parallel import group_rank, group_size
from minitron_nemo.plan import PruningPlan

MessageShape: TypeAlias = tuple[int, int, int]

TEACHER = "teacher."
"""What stands before the names of a teacher that is corrected in a checkpoint."""
HIDDEN_STATES = "hidden_states."
"""What stands before the names of projections and balance in a checkpoint."""


class TeacherStudent(MegatronModule):
    """One pipeline stage of student and teacher.

    Args:
        student: trained; its TransformerConfig is this module's.
        teacher: of the same tokens, on the same stage.
        vocab_size: real entries of the padded vocabulary; None: all are real.
        plan: by which the student was cut from the teacher; hidden losses may ask for it.
    Raises: ValueError: the two cannot stand side by side, or the teacher cannot give what `config` asks for.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: Teacher,
        config: DistillationConfig | None = None,
        *,
        vocab_size: int | None = None,
        plan: PruningPlan | None = None,
    ) -> None:
        super().__init__(config=student.config)
        self.distillation = config or DistillationConfig()
        teacher.meet(student, self.distillation)
        require(
            student.config.virtual_pipeline_model_parallel_size is None,
            "virtual_pipeline_model_parallel_size cannot be used to distil: Megatron's interleaved schedule fixes the "
            "message's width. Set trainer.virtual_pipeline_model_parallel_size=null.",
        )
        self.student = student
        self.teacher: Teacher = teacher
        self.vocab_size = vocab_size
        self.hidden_states: HiddenStateLosses | None = None
        if self.distillation.hidden_states.enabled:
            assert teacher.model is not None  # else it has refused this config
            self.hidden_states = HiddenStateLosses(student, teacher.model, self.distillation.hidden_states, plan)
        hidden_parts = self.hidden_states.parts if self.hidden_states else ()
        self._sums = StepSums([DIVERGENCE, CROSS_ENTROPY, TEACHER_CROSS_ENTROPY, AGREEMENT, *hidden_parts])
        self._validation: StepSums | None = None
        """Of the running validation."""
        self.by_source: SourceSums | None = None
        """What a validation adds to of each source of a blend, beside its own sums; None: they are not asked for."""
        self._riders: dict[int, Tensor] = {}
        """Hidden states that came with the message, by pair."""
        self._last_step: dict[str, Tensor] = {}
        self._last_validation: dict[str, Tensor] = {}
        self.pre_process: bool = student.pre_process
        self.post_process: bool = student.post_process
        self.model_type = student.model_type
        self.vp_stage = None
        self.share_embeddings_and_output_weights: bool = student.share_embeddings_and_output_weights
        self.train(student.training)

    # ---- what happens to a batch ---------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        source: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor | Loss:
        """One micro-batch through this stage.

        Args:
            input_ids, position_ids, labels: [b, s/cp]; labels are read on the last stage only.
            loss_mask: [b, s/cp], on every stage, weight of each token's loss; None: every token counts 1.
            source: [b], of which source of a blend each sample is; read on the last stage, in a validation.
            arguments: what the teacher reads of the batch, on the last stage, in training; all others are handed to
                both models (packed_seq_params, ...).
        Returns:
            last stage: in training the Loss, in evaluation the cross-entropy of each token [b, s/cp], and where labels
            are None the student's logits [b, s/cp, v/tp]; other stages: the message to the next one.
        Communicates: tp, in both models and in the loss.
        """
        tokens = (input_ids, position_ids, attention_mask)
        said = {key: arguments.pop(key) for key in self.teacher.reads if key in arguments}
        weights = torch.ones_like(input_ids) if loss_mask is None else loss_mask
        if self.post_process and labels is None:
            return self.student(*tokens, **arguments)
        if not self.training:
            return self._evaluate(tokens, labels, weights, source, arguments)
        self._begin_micro_batch()
        hidden = self.hidden_states
        riders: list[Tensor] = []
        with hidden.micro_batch(weights, self._riders, self._sums) if hidden else nullcontext():
            teacher_output = self.teacher.run(tokens, **arguments)
            with without_logits(self.student):
                student_output = self.student(*tokens, **arguments)
            if hidden:
                student_output, riders = hidden.finish(student_output)
        if not self.post_process:
            return _side_by_side(student_output, teacher_output, *riders)
        return self._loss(student_output, teacher_output, said, labels, weights)

    def _loss(
        self,
        student_hidden: Tensor,
        teacher_output: Tensor | None,
        said: Mapping[str, Tensor],
        labels: Tensor | None,
        weights: Tensor,
    ) -> Loss:
        """From what the output layers read, [s/cp, b, h] or [s/(cp*tp), b, h]. Communicates: tp."""
        walk = walk_of(self.student, self.vocab_size)
        loss = distillation_loss(
            OutputHead(student_hidden, output_weight(self.student)),
            self.teacher.answer(teacher_output, said),
            self.distillation,
            labels=labels,
            token_weights=weights,
            walk=walk,
            of_teacher=self.teacher.own_loss(teacher_output, labels, weights, walk),
        )
        self._add(self._sums, {part: loss.report[part] for part in self._sums.parts if part in loss.report}, weights)
        return loss

    @torch.no_grad()
    def _evaluate(
        self,
        tokens: Tokens,
        labels: Tensor | None,
        weights: Tensor,
        source: Tensor | None,
        model_arguments: dict[str, Any],
    ) -> Tensor:
        """`forward` in evaluation: the student's own loss, or message; in a validation the teacher runs beside it."""
        sums, teacher_output = self._validation, None
        if sums is not None:
            teacher_output = self.teacher.run(tokens, **model_arguments)
        with without_logits(self.student):
            student_output: Tensor = self.student(*tokens, **model_arguments)
        if not self.post_process:  # no hidden losses, but their place in the message, and that of one who does not run
            width = 0 if teacher_output is None else self.teacher.message_width
            riders = student_output.new_zeros(*student_output.shape[:-1], self._message_extra(after=True) - width)
            return _side_by_side(student_output, teacher_output, riders)
        assert labels is not None
        head = OutputHead(student_output, output_weight(self.student))
        walk = walk_of(self.student, self.vocab_size)
        if sums is None:
            return cross_entropy_of_tokens(head, labels, walk)
        answer, config = self.teacher.answer(teacher_output, {}), self.distillation.divergence
        losses = fused_linear_divergence(head, answer, config, labels=labels.t(), with_agreement=True, **walk)
        assert losses.agreement is not None and losses.cross_entropy is not None
        compared = {DIVERGENCE: losses.divergence.t(), AGREEMENT: losses.agreement.t()}
        self._add(sums, compared, weights)
        if self.by_source is not None and source is not None:
            self.by_source.add(compared, weights, source)
        return losses.cross_entropy.t().contiguous()

    # ---- what a step was -----------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """To be called on every rank after each optimizer step, before a checkpoint of it is written.

        Makes `step_losses` of the step and the hidden losses' weight in the next one.
        Communicates: over all ranks, one all-reduce of a few float64.
        """
        config, hidden = self.distillation, self.hidden_states
        means = self._sums.close(next(self.student.parameters()).device)
        loss = means[DIVERGENCE] + config.cross_entropy_weight * means[CROSS_ENTROPY]
        if config.cross_entropy_weight == 0:
            del means[CROSS_ENTROPY]
        if not self.teacher.learns:
            del means[TEACHER_CROSS_ENTROPY]
        if hidden:
            hidden.forget_recomputation()
            total, weight = torch.stack([means[part] for part in hidden.parts]).sum(), hidden.balance.hidden_weight()
            loss = loss + weight * total
            means |= {"hidden": total, "hidden_weight": weight, "alpha": hidden.balance.alpha.squeeze(0).clone()}
            hidden.balance.end_step(means[DIVERGENCE], total)
        self._last_step = {"loss": loss, **means}

    def step_losses(self) -> dict[str, Tensor]:
        """Parts of the loss of the last ended step, means over its supervised tokens; empty before the first.

        Float64 scalars on the device, equal on every rank: loss (what was minimised), divergence, cross_entropy (if it
        has a weight), hidden/<pair> of each pair, hidden (their sum), its hidden_weight, and alpha within that; beside
        them agreement, the share of tokens whose likeliest next token is the teacher's (agreement.py).
        """
        return dict(self._last_step)

    def begin_validation(self) -> None:
        """From now on, in eval mode, the teacher runs beside the student on every stage, and the two are compared."""
        if self.teacher.can_validate:
            self._validation = StepSums([DIVERGENCE, AGREEMENT])

    def end_validation(self) -> None:
        """To be called on every rank. Communicates: over all ranks, one all-reduce of a few float64."""
        if self._validation is not None:
            self._last_validation = self._validation.close(next(self.student.parameters()).device)
            self._validation = None

    def validation_losses(self) -> dict[str, Tensor]:
        """Divergence and agreement of the last ended validation, means over its supervised tokens; empty before.

        Float64 scalars on the device, equal on every rank.
        """
        return dict(self._last_validation)

    def _add(self, sums: StepSums, parts: Mapping[str, Tensor], weights: Tensor) -> None:
        """Add values of each token, weighted, and the tokens; all [b, s/cp], equal on every tp rank."""
        copies = group_size(self.student.pg_collection.tp)
        for part, per_token in parts.items():
            weighted = torch.where(weights.t() != 0, per_token.detach().t() * weights.t(), 0.0)
            sums.add(part, weighted.sum(dtype=torch.float64), copies=copies)
        sums.add_tokens(weights.sum(), copies=copies)

    def _begin_micro_batch(self) -> None:
        self._sums.micro_batches += 1
        if self.hidden_states and num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
            expected = num_microbatches_calculator.get_num_microbatches()
            require(
                self._sums.micro_batches <= expected,
                f"micro-batch {self._sums.micro_batches} of a step of {expected}: the step before was not ended, and "
                "the hidden losses' weight comes from it. Call end_step() after each optimizer step.",
                RuntimeError,
            )

    # ---- what the pipeline schedule asks -------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """Take the previous stage's message apart; the first stage gets None."""
        message = input_tensor if isinstance(input_tensor, Tensor) or input_tensor is None else input_tensor[0]
        if message is None:
            self.student.set_input_tensor(None)
            self.teacher.receive(None)
            return
        width, teacher_width = self.config.hidden_size, self.teacher.message_width
        # Contiguous: fused layernorms view their input as a matrix.
        self.student.set_input_tensor(message[..., :width].contiguous())
        self.teacher.receive(message[..., width : width + teacher_width])
        if self.hidden_states:
            self._riders = self.hidden_states.take_riders(message[..., width + teacher_width :])

    def adjust_tensor_shapes(
        self, receive_shapes: list[MessageShape], send_shapes: list[MessageShape]
    ) -> tuple[list[MessageShape], list[MessageShape]]:
        """The widths of the messages, for `adjust_tensor_shapes_fn` of Megatron's non-interleaved schedule.

        Megatron knows one model, the student: [s, b, h_student] (s already divided by cp, and by tp under sequence
        parallelism). Gradients have the shapes of the activations they belong to.
        """

        def widened(shapes: list[MessageShape], extra: int) -> list[MessageShape]:
            return [(length, batch, hidden + extra) for length, batch, hidden in shapes]

        return (
            widened(receive_shapes, self._message_extra(after=False)),
            widened(send_shapes, self._message_extra(after=True)),
        )

    def _message_extra(self, *, after: bool) -> int:
        """Channels beside the student's of the message before or after this stage."""
        stage = group_rank(self.student.pg_collection.pp) + after
        riders = self.hidden_states.riders_into(stage) if self.hidden_states else {}
        return self.teacher.message_width + sum(riders.values())

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The student's tied weight, whose gradient Megatron adds over the first and the last stage."""
        return self.student.shared_embedding_or_output_weight()

    # ---- what a checkpoint sees: the student, and what else has learned ------------------------------------------

    @property
    def learning_teacher(self) -> GPTModel | None:
        """The teacher's part here where it learns too."""
        return self.teacher.model if self.teacher.learns else None

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = self.student.state_dict(*args, prefix=prefix, **kwargs)
        kwargs["destination"] = state
        if self.learning_teacher is not None:
            self.learning_teacher.state_dict(prefix=prefix + TEACHER, **kwargs)
        if self.hidden_states:
            self.hidden_states.state_dict(prefix=prefix + HIDDEN_STATES, **kwargs)
        return state

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        sharded: dict[str, Any] = self.student.sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.learning_teacher is not None:
            sharded |= self.learning_teacher.sharded_state_dict(prefix + TEACHER, sharded_offsets, metadata)
        if self.hidden_states:
            sharded |= self.hidden_states.sharded_state_dict(prefix + HIDDEN_STATES)
        return sharded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # nn.Module loads by walking the tree, so the student's names get the place they have in it. Hidden losses are
        # given what they already hold by a checkpoint of a run without them; what hidden losses or a teacher learned in
        # another run is left out where there are none here.
        of_hidden, of_teacher = (
            [name for name in state_dict if name.startswith(prefix + part)] for part in (HIDDEN_STATES, TEACHER)
        )
        not_students = (prefix + HIDDEN_STATES, prefix + TEACHER)
        for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(not_students)]:
            state_dict[f"{prefix}student.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        for name in ([] if self.teacher.learns else of_teacher) + ([] if self.hidden_states else of_hidden):
            del state_dict[name]
        if self.hidden_states and not of_hidden:
            self.hidden_states.state_dict(destination=state_dict, prefix=prefix + HIDDEN_STATES)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _side_by_side(*states: Tensor | None) -> Tensor:
    """One message of the states [s, b, h] that travel."""
    travelling = [state for state in states if state is not None]
    return travelling[0] if len(travelling) == 1 else torch.cat(travelling, dim=-1)


def teacher_student_in(model: nn.Module) -> TeacherStudent | None:
    """The TeacherStudent inside any number of wrappers, if that is what they hold."""
    inner: Any = model
    while not isinstance(inner, TeacherStudent) and hasattr(inner, "module"):
        inner = inner.module
    return inner if isinstance(inner, TeacherStudent) else None


def adjust_tensor_shapes_fn(model: nn.Module) -> Callable[..., Any] | None:
    """What to hand to Megatron's `get_forward_backward_func()(..., adjust_tensor_shapes_fn=...)` for this model.

    None for a model without a teacher and without pipeline stages, where the schedules accept nothing else.
    """
    inner = teacher_student_in(model)
    if inner is not None and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return inner.adjust_tensor_shapes
    return None
