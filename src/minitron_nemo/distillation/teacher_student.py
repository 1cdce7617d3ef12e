"""A trainable student and its frozen teacher as one model that Megatron's schedules, DDP and optimizer can drive.

Each pipeline stage holds its part of both models. Between stages one message carries both activations, side by side on
the hidden axis, so that Megatron's own non-interleaved schedule needs only to be told the message's width.

    message     student and teacher activation               [s/cp, b, h_student + h_teacher]; s/(cp*tp) with SP
    loss        last stage, one value per token              [b, s/cp]   float32

In training the loss is the forward KL from the teacher's logits; in evaluation it is the student's cross-entropy on the
labels, comparable with any other run, and the teacher does not run. A checkpoint of this module is a checkpoint of the
student alone, under the student's own names.

Communication: what both models do by themselves; tp in the loss (see divergence.py); pp carries the message, whose
teacher half is constant (its gradient travels back as zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from minitron_nemo.checks import require
from minitron_nemo.distillation.divergence import forward_kl

MessageShape: TypeAlias = tuple[int, int, int]


@dataclass
class DistillationConfig:
    """What the student is trained on. The defaults are the papers' final recipe: logits alone, temperature 1."""

    temperature: float = 1.0
    """Above 0; softmax(logits / temperature) of both models. 1 was best of 0.1, 0.5, 1 and 3 (arXiv:2407.14679)."""
    scale_by_temperature_squared: bool = True
    """Multiply the divergence by temperature**2, which keeps the gradient's size (Hinton et al. 2015, section 2)."""
    cross_entropy_weight: float = 0.0
    """At least 0; loss = divergence + weight * cross-entropy on the labels. The papers leave it at 0."""

    def __post_init__(self) -> None:
        require(
            self.temperature > 0,
            f"distillation.temperature={self.temperature} must be above 0; Minitron uses 1.0.",
        )
        require(
            self.cross_entropy_weight >= 0,
            f"distillation.cross_entropy_weight={self.cross_entropy_weight} must be at least 0; Minitron uses 0.",
        )


class TeacherStudent(MegatronModule):
    """One pipeline stage of student and teacher.

    Args:
        student: trained; its TransformerConfig is this module's.
        teacher: same tokens, same stage, any other size; frozen here, put in eval mode and never differentiated.
        vocab_size: real entries of the padded vocabulary; None: all are real.
    Raises: ValueError: the two models cannot stand side by side.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        config: DistillationConfig | None = None,
        *,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(config=student.config)
        _require_side_by_side(student, teacher)
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.distillation = config or DistillationConfig()
        self.vocab_size = vocab_size
        self.pre_process: bool = student.pre_process
        self.post_process: bool = student.post_process
        self.model_type = student.model_type
        self.vp_stage = None
        self.share_embeddings_and_output_weights: bool = student.share_embeddings_and_output_weights
        self.train(student.training)

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
        **model_arguments: Any,
    ) -> Tensor:
        """One micro-batch through this stage.

        Args:
            input_ids, position_ids, labels: [b, s/cp]; labels are read on the last stage only.
            model_arguments: handed to both models (packed_seq_params, ...).
        Returns:
            last stage: loss of each token [b, s/cp], or the student's logits [b, s/cp, v/tp] where labels are None;
            other stages: the message to the next one.
        Communicates: tp, in both models and in the loss.
        """
        tokens = (input_ids, position_ids, attention_mask)
        if self.post_process and (labels is None or not self.training):
            return self.student(*tokens, labels=labels, **model_arguments)
        student_output = self.student(*tokens, **model_arguments)
        if not self.training:
            return F.pad(student_output, (0, self.teacher.config.hidden_size))  # the message keeps its width
        with torch.no_grad():
            teacher_output = self.teacher(*tokens, **model_arguments)
        if not self.post_process:
            return torch.cat([student_output, teacher_output], dim=-1)
        return self._loss(student_output, teacher_output, labels)

    def _loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        """[b, s/cp] from logits [b, s/cp, v/tp]. Communicates: tp."""
        config = self.distillation
        loss = forward_kl(
            student_logits,
            teacher_logits,
            temperature=config.temperature,
            tp_group=self.student.pg_collection.tp,
            vocab_size=self.vocab_size,
            scale_by_temperature_squared=config.scale_by_temperature_squared,
        )
        if config.cross_entropy_weight > 0:
            # Megatron's cross-entropy overwrites the logits it is given; the divergence reads them again in backward.
            own_logits = student_logits.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            loss = loss + config.cross_entropy_weight * self.student.compute_language_model_loss(labels, own_logits)
        return loss

    # ---- what the pipeline schedule asks -------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """Take the previous stage's message apart; the first stage gets None."""
        message = input_tensor if isinstance(input_tensor, Tensor) or input_tensor is None else input_tensor[0]
        if message is None:
            self.student.set_input_tensor(None)
            self.teacher.set_input_tensor(None)
            return
        width = self.config.hidden_size
        # Contiguous: fused layernorms view their input as a matrix.
        self.student.set_input_tensor(message[..., :width].contiguous())
        self.teacher.set_input_tensor(message[..., width:].detach().contiguous())

    def adjust_tensor_shapes(
        self, receive_shapes: list[MessageShape], send_shapes: list[MessageShape]
    ) -> tuple[list[MessageShape], list[MessageShape]]:
        """The widths of the messages, for `adjust_tensor_shapes_fn` of Megatron's non-interleaved schedule.

        Megatron knows one model, the student: [s, b, h_student] (s already divided by cp, and by tp under sequence
        parallelism). Gradients have the shapes of the activations they belong to.
        """
        extra = self.teacher.config.hidden_size

        def widened(shapes: list[MessageShape]) -> list[MessageShape]:
            return [(length, batch, hidden + extra) for length, batch, hidden in shapes]

        return widened(receive_shapes), widened(send_shapes)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The student's tied weight, whose gradient Megatron adds over the first and the last stage."""
        return self.student.shared_embedding_or_output_weight()

    # ---- what a checkpoint sees: the student ---------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.student.state_dict(*args, **kwargs)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return self.student.sharded_state_dict(prefix, sharded_offsets, metadata)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # nn.Module loads by walking the tree, so the student's names get the place they have in it; the teacher is
        # given what it already holds.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}student.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        state_dict.update(self.teacher.state_dict(prefix=f"{prefix}teacher."))
        super()._load_from_state_dict(state_dict, prefix, *args)


def adjust_tensor_shapes_fn(model: nn.Module) -> Callable[..., Any] | None:
    """What to hand to Megatron's `get_forward_backward_func()(..., adjust_tensor_shapes_fn=...)` for this model.

    None for a model without a teacher and without pipeline stages, where the schedules accept nothing else.
    """
    inner: Any = model
    while not isinstance(inner, TeacherStudent) and hasattr(inner, "module"):
        inner = inner.module
    if isinstance(inner, TeacherStudent) and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return inner.adjust_tensor_shapes
    return None


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
