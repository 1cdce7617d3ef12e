"""A trainable student and its frozen teacher as one model that Megatron's schedules, DDP and optimizer can drive.

Each pipeline stage holds its part of both models. Between stages one message carries both activations, side by side on
the hidden axis, so that Megatron's own non-interleaved schedule needs only to be told the message's width.

    message     student and teacher activation               [s/cp, b, h_student + h_teacher]; s/(cp*tp) with SP
    loss        last stage, one value per token              [b, s/cp]   float32

In training the loss is the divergence from the teacher's logits, which are formed a few tokens at a time and never
whole (fused_linear.py), and by config losses between hidden states, which sit on the stages where the states are
(hidden_states.py); in evaluation it is the student's cross-entropy on the labels, comparable with any other run, and
the teacher does not run, but for a validation (`begin_validation`), which measures how far they are apart. A checkpoint
of this module is a checkpoint of the student alone, under the student's own names; where there are hidden losses, their
projections and balance are added to it under `hidden_states.`.

Communication: what both models do by themselves; tp in the loss (see fused_linear.py); pp carries the message, whose
teacher half is constant (its gradient travels back as zeros); all ranks once at the end of a step or a validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import TOP_K, DistillationConfig, DivergenceConfig
from minitron_nemo.distillation.balance import StepSums
from minitron_nemo.distillation.hidden_states import HiddenStateLosses
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_divergence, fused_linear_loss
from minitron_nemo.divergence.top_k import TopKTeacher
from minitron_nemo.parallel import group_rank, group_size
from minitron_nemo.plan import PruningPlan

MessageShape: TypeAlias = tuple[int, int, int]

DIVERGENCE, CROSS_ENTROPY, AGREEMENT = "divergence", "cross_entropy", "agreement"
TEACHER_CROSS_ENTROPY = "teacher_cross_entropy"
TEACHER = "teacher."
"""What stands before the names of a teacher that is corrected in a checkpoint."""
HIDDEN_STATES = "hidden_states."
"""What stands before the names of projections and balance in a checkpoint."""


class TeacherStudent(MegatronModule):
    """One pipeline stage of student and teacher.

    Args:
        student: trained; its TransformerConfig is this module's.
        teacher: same tokens, same stage, any other size; frozen here, put in eval mode and never differentiated.
        vocab_size: real entries of the padded vocabulary; None: all are real.
        plan: by which the student was cut from the teacher; hidden losses may ask for it.
    Raises: ValueError: the two models cannot stand side by side.
    """

    teacher_is_here = True
    """Whether the teacher can be asked about any tokens, those of a validation too."""

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        config: DistillationConfig | None = None,
        *,
        vocab_size: int | None = None,
        plan: PruningPlan | None = None,
    ) -> None:
        super().__init__(config=student.config)
        _require_side_by_side(student, teacher)
        self.student = student
        self.distillation = config or DistillationConfig()
        self.teacher = teacher.requires_grad_(self.teacher_learns)
        if self.teacher_learns:
            _require_can_learn(teacher)
        self.vocab_size = vocab_size
        self.hidden_states: HiddenStateLosses | None = None
        if self.distillation.hidden_states.enabled:
            self.hidden_states = HiddenStateLosses(student, teacher, self.distillation.hidden_states, plan)
        hidden_parts = self.hidden_states.parts if self.hidden_states else ()
        self._sums = StepSums([DIVERGENCE, CROSS_ENTROPY, TEACHER_CROSS_ENTROPY, AGREEMENT, *hidden_parts])
        self._validation: StepSums | None = None
        """Of the running validation."""
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

    @property
    def teacher_learns(self) -> bool:
        return self.distillation.teacher_lr > 0

    def train(self, mode: bool = True) -> TeacherStudent:
        super().train(mode)
        self.teacher.eval()  # whatever the student does, the teacher answers the same
        return self

    # ---- what happens to a batch ---------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **model_arguments: Any,
    ) -> Tensor:
        """One micro-batch through this stage.

        Args:
            input_ids, position_ids, labels: [b, s/cp]; labels are read on the last stage only.
            loss_mask: [b, s/cp], on every stage, by which the caller weighs the returned loss: the gradient of any
                other weighting would be wrong, as it is formed with the loss. None: the caller may weigh as it likes,
                for a third more of the output layers' work; the hidden losses count every token.
            model_arguments: handed to both models (packed_seq_params, ...).
        Returns:
            last stage: loss of each token [b, s/cp], or the student's logits [b, s/cp, v/tp] where labels are None;
            other stages: the message to the next one.
        Communicates: tp, in both models and in the loss.
        """
        tokens = (input_ids, position_ids, attention_mask)
        if self._validation is not None and not self.training:
            return self._validate(self._validation, tokens, labels, loss_mask, model_arguments)
        if self.post_process and (labels is None or not self.training):
            return self.student(*tokens, labels=labels, **model_arguments)
        if not self.training:
            return F.pad(self.student(*tokens, **model_arguments), (0, self._message_extra(after=True)))
        self._begin_micro_batch()
        hidden = self.hidden_states
        riders: list[Tensor] = []
        weights = torch.ones_like(input_ids) if loss_mask is None else loss_mask
        with (
            hidden.micro_batch(weights, self._riders, self._sums) if hidden else nullcontext(),
            without_logits(self.teacher),
            without_logits(self.student),
        ):
            with torch.set_grad_enabled(self.teacher_learns):
                teacher_output = self.teacher(*tokens, **model_arguments)
            student_output = self.student(*tokens, **model_arguments)
            if hidden:
                student_output, riders = hidden.finish(student_output)
        if not self.post_process:
            return torch.cat([student_output, teacher_output, *riders], dim=-1)
        self._sums.add_tokens(weights.sum(), copies=group_size(self.student.pg_collection.tp))
        return self._loss(student_output, teacher_output, labels, loss_mask)

    def _loss(
        self, student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor | None, loss_mask: Tensor | None
    ) -> Tensor:
        """[b, s/cp] from what the output layers read, [s/cp, b, h] or [s/(cp*tp), b, h]. Communicates: tp."""
        config, options = self.distillation, self._options()
        heads = (OutputHead(student_hidden, output_weight(self.student)), self._teacher_answer(teacher_hidden))
        weight = config.cross_entropy_weight
        options["labels"] = labels.t() if labels is not None and weight > 0 else None
        if loss_mask is None:  # the caller may weigh the tokens as it likes; the logits are formed again in backward
            per_token, entropy, agreement = fused_linear_divergence(*heads, config.divergence, **options)
            total = None
        else:
            mask = loss_mask.t().float()
            loss = fused_linear_loss(*heads, config.divergence, mask, cross_entropy_weight=weight, **options)
            total, per_token, entropy, agreement = loss
        self._add(self._sums, {DIVERGENCE: per_token, CROSS_ENTROPY: entropy, AGREEMENT: agreement}, loss_mask)
        if entropy is not None:
            per_token = per_token + weight * entropy
        if total is not None:  # the values stay, and their sum weighted by the mask has the gradient of the total
            per_token = per_token + _gradient_of(total, mask)
        if self.teacher_learns:
            per_token = per_token + self._correction(teacher_hidden, labels, loss_mask)
        return per_token.t().contiguous()

    def _correction(self, teacher_hidden: Tensor, labels: Tensor | None, loss_mask: Tensor | None) -> Tensor:
        """[s, b] of zeros with the gradient of the teacher's own loss. Communicates: tp.

        Cross-entropy is the divergence from one who is sure of the label.
        """
        require(labels is not None, "a teacher that is corrected learns from labels; give them.")
        assert labels is not None
        indices = labels.t().unsqueeze(-1)
        certain = torch.zeros(indices.shape, device=indices.device)
        label = TopKTeacher(indices, certain, certain[..., 0] - float("inf"))
        head = OutputHead(teacher_hidden, output_weight(self.teacher))
        config, options = DivergenceConfig(kind=TOP_K, k=1), self._options() | {"with_agreement": False}
        if loss_mask is None:
            per_token = fused_linear_divergence(head, label, config, **options).divergence
            correction = per_token - per_token.detach()
        else:
            mask = loss_mask.t().float()
            total, per_token, *_ = fused_linear_loss(head, label, config, mask, **options)
            correction = _gradient_of(total, mask)
        self._add(self._sums, {TEACHER_CROSS_ENTROPY: per_token}, loss_mask)
        return correction

    def _teacher_answer(self, teacher_hidden: Tensor) -> OutputHead | TopKTeacher:
        """What the teacher says of the tokens, in a form the losses read."""
        return OutputHead(teacher_hidden, output_weight(self.teacher))

    def _options(self) -> dict[str, Any]:
        """Of both fused losses."""
        return {
            "tp_group": self.student.pg_collection.tp,
            "vocab_size": self.vocab_size,
            "sequence_parallel": self.student.config.sequence_parallel,
            "gradient_accumulation_fusion": self.student.config.gradient_accumulation_fusion,
            "with_agreement": True,
        }

    @torch.no_grad()
    def _validate(
        self,
        sums: StepSums,
        tokens: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor | None,
        loss_mask: Tensor | None,
        model_arguments: dict[str, Any],
    ) -> Tensor:
        """`forward` in a validation: the student's own loss, or message; the teacher runs beside it."""
        with without_logits(self.teacher):
            teacher_hidden = self.teacher(*tokens, **model_arguments)
        with _outputs_of(self.student.decoder) as student_hidden:
            output: Tensor = self.student(*tokens, labels=labels, **model_arguments)
        if not self.post_process:  # no hidden losses, but their place in the message
            riders = output.new_zeros(*output.shape[:-1], self._message_extra(after=True) - teacher_hidden.shape[-1])
            return torch.cat([output, teacher_hidden, riders], dim=-1)
        heads = (OutputHead(student_hidden[0], output_weight(self.student)), self._teacher_answer(teacher_hidden))
        losses = fused_linear_divergence(*heads, self.distillation.divergence, **self._options())
        self._add(sums, {DIVERGENCE: losses.divergence, AGREEMENT: losses.agreement}, loss_mask)
        weights = torch.ones_like(tokens[0]) if loss_mask is None else loss_mask
        sums.add_tokens(weights.sum(), copies=group_size(self.student.pg_collection.tp))
        return output

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
        if not self.teacher_learns:
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
        if self.teacher_is_here:
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

    def _add(self, sums: StepSums, parts: dict[str, Tensor | None], loss_mask: Tensor | None) -> None:
        """Add values of each token [s, b], masked by [b, s]."""
        for part, per_token in parts.items():
            if per_token is not None:
                weighted = per_token.detach() if loss_mask is None else per_token.detach() * loss_mask.t()
                total = weighted.sum(dtype=torch.float64)
                sums.add(part, total, copies=group_size(self.student.pg_collection.tp))

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
            self.teacher.set_input_tensor(None)
            return
        width, teacher_width = self.config.hidden_size, self.teacher.config.hidden_size
        # Contiguous: fused layernorms view their input as a matrix.
        self.student.set_input_tensor(message[..., :width].contiguous())
        of_teacher = message[..., width : width + teacher_width]
        self.teacher.set_input_tensor((of_teacher if self.teacher_learns else of_teacher.detach()).contiguous())
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
        return self.teacher.config.hidden_size + sum(riders.values())

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The student's tied weight, whose gradient Megatron adds over the first and the last stage."""
        return self.student.shared_embedding_or_output_weight()

    # ---- what a checkpoint sees: the student, and what the hidden losses have learned ----------------------------

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = self.student.state_dict(*args, prefix=prefix, **kwargs)
        kwargs["destination"] = state
        if self.teacher_learns:
            self.teacher.state_dict(prefix=prefix + TEACHER, **kwargs)
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
        if self.teacher_learns:
            sharded |= self.teacher.sharded_state_dict(prefix + TEACHER, sharded_offsets, metadata)
        if self.hidden_states:
            sharded |= self.hidden_states.sharded_state_dict(prefix + HIDDEN_STATES)
        return sharded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # nn.Module loads by walking the tree, so the student's names get the place they have in it; the teacher is
        # given what it already holds, and so are hidden losses by a checkpoint of a run without them. Without hidden
        # losses, what they learned in another run is left out.
        of_hidden = [name for name in state_dict if name.startswith(prefix + HIDDEN_STATES)]
        not_students = (prefix + HIDDEN_STATES, prefix + TEACHER)
        for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(not_students)]:
            state_dict[f"{prefix}student.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        if not self.teacher_learns or not any(name.startswith(prefix + TEACHER) for name in state_dict):
            state_dict.update(self.teacher.state_dict(prefix=prefix + TEACHER))
        if self.hidden_states is None:
            for name in of_hidden:
                del state_dict[name]
        elif not of_hidden:
            self.hidden_states.state_dict(destination=state_dict, prefix=prefix + HIDDEN_STATES)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _gradient_of(total: Tensor, mask: Tensor) -> Tensor:
    """[s, b] of zeros whose sum weighted by the mask has the gradient of the scalar `total`."""
    return (total - total.detach()) * mask / mask.square().sum().clamp(min=1e-12)


@contextmanager
def without_logits(model: GPTModel) -> Iterator[None]:
    """Inside, the last stage's part gives what its output layer would read."""
    post_process = model.post_process
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = post_process


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module returns inside, in order."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def output_weight(model: GPTModel) -> Tensor:
    """[v/tp, h] of the output layer, the embedding's where they are tied."""
    tied = model.share_embeddings_and_output_weights
    weight: Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return weight


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


def _require_can_learn(teacher: GPTModel) -> None:
    require(
        not teacher.share_embeddings_and_output_weights or teacher.config.pipeline_model_parallel_size == 1,
        f"distillation.teacher_lr cannot be set for a teacher with tied embeddings on "
        f"{teacher.config.pipeline_model_parallel_size} pipeline stages: Megatron adds the tied gradients of one model "
        "only. Set trainer.pipeline_model_parallel_size=1, or correct the teacher beforehand.",
    )


def _require_side_by_side(student: GPTModel, teacher: GPTModel) -> None:
    require(
        student.vocab_size == teacher.vocab_size,
        f"the student's padded vocabulary of {student.vocab_size} is not the teacher's of {teacher.vocab_size}; "
        "distillation compares them token by token. Use a student pruned from a model with the teacher's tokenizer.",
    )
    fields = [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
    ]
    if student.config.pipeline_model_parallel_size > 1:
        fields.append("pipeline_dtype")  # one message has one dtype
    for field in fields:
        ours, theirs = getattr(student.config, field), getattr(teacher.config, field)
        require(
            ours == theirs,
            f"the student has {field}={ours}, the teacher {theirs}; both run on the same ranks. Give them the same.",
        )
    require(
        (student.pre_process, student.post_process) == (teacher.pre_process, teacher.post_process),
        "student and teacher are not on the same pipeline stage; give both the same pre_process and post_process.",
    )
    require(
        student.config.virtual_pipeline_model_parallel_size is None
        and teacher.config.virtual_pipeline_model_parallel_size is None,
        "virtual_pipeline_model_parallel_size cannot be used to distil: Megatron's interleaved schedule fixes the "
        "message's width. Set trainer.virtual_pipeline_model_parallel_size=null.",
    )
