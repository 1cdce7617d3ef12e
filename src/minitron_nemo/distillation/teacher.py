"""A teacher is an answer: what `TeacherStudent` asks of the one it learns from, and the teacher that runs beside it.

    LiveTeacher      a model of any size on the same ranks, on the same tokens
    StoredTeacher    what a model once said of them, in the batch; see stored_teacher.py

    output    what its part of a stage hands to the next    [s/cp, b, message_width]; s/(cp*tp) with SP
    answer    on the last stage                             hidden states and output weight, or the likeliest tokens

Communication: what a live model does by itself, and where it learns tp in its own loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from minitron_nemo import platform
from minitron_nemo.checks import require
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.distillation.loss import Answer, Walk, cross_entropy_loss
from minitron_nemo.distillation.offload import keep_on_host
from minitron_nemo.distillation.output_head import output_weight, without_logits
from minitron_nemo.divergence.fused_linear import OutputHead, WeightedLoss
from minitron_nemo.shape import ModelShape

Tokens: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""input_ids and position_ids [b, s/cp], and the attention mask."""


class Teacher(Protocol):
    """Its part on one pipeline stage. One that has weights is an nn.Module, so that they move with the student's."""

    @property
    def message_width(self) -> int:
        """Channels of its output in the message between pipeline stages; 0: none travels."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Keys of a batch that hold its answers, each [b, s/cp, ...]."""

    @property
    def can_validate(self) -> bool:
        """Whether it answers for any tokens, those of a validation too."""

    @property
    def model(self) -> GPTModel | None:
        """Whose hidden states can be compared with the student's; None: there is nothing but answers."""

    @property
    def learns(self) -> bool:
        """Whether `model` is trained beside the student, by `own_loss`; then a checkpoint holds it too."""

    def meet(self, student: GPTModel, config: DistillationConfig) -> None:
        """Take one's place beside this student, before the first micro-batch.

        Raises: ValueError: the two do not fit together, or `config` asks for what this teacher cannot give.
        """

    def receive(self, message: Tensor | None) -> None:
        """Its channels of the previous stage's message, [s/cp, b, message_width]; None on the first stage."""

    def run(self, tokens: Tokens, **model_arguments: Any) -> Tensor | None:
        """Its part of a micro-batch: what the message carries on, or on the last stage what `answer` reads.

        None where nothing travels. Called on every stage, before the student's part.
        """

    def answer(self, output: Tensor | None, said: Mapping[str, Tensor]) -> Answer:
        """On the last stage, what it says of the micro-batch's tokens.

        Args:
            output: what `run` gave.
            said: what the batch holds under `reads`.
        """

    def own_loss(
        self, output: Tensor | None, labels: Tensor | None, weights: Tensor, walk: Walk
    ) -> WeightedLoss | None:
        """On the last stage, what it learns by; None: it does not learn.

        Args:
            labels, weights: [b, s/cp].
        """


class LiveTeacher(nn.Module):
    """A model that runs beside the student: in eval mode always, frozen unless it is corrected while it teaches.

    Args:
        model: same stage and layout as the student, any other size.
    """

    reads: tuple[str, ...] = ()
    can_validate = True
    learns = False

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.eval()

    @property
    def message_width(self) -> int:
        return self.model.config.hidden_size

    def meet(self, student: GPTModel, config: DistillationConfig) -> None:
        _require_side_by_side(student, self.model)
        self.learns = config.teacher_lr > 0
        if self.learns:
            tied = self.model.share_embeddings_and_output_weights
            require_can_learn(tied=tied, pipeline_stages=self.model.config.pipeline_model_parallel_size)
        self.model.requires_grad_(self.learns)

    def train(self, mode: bool = True) -> LiveTeacher:
        return super().train(False)  # whatever the student does, the teacher answers the same

    def receive(self, message: Tensor | None) -> None:
        if message is not None:
            # Contiguous: fused layernorms view their input as a matrix.
            message = (message if self.learns else message.detach()).contiguous()
        self.model.set_input_tensor(message)

    def run(self, tokens: Tokens, **model_arguments: Any) -> Tensor:
        with without_logits(self.model), torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            output: Tensor = self.model(*tokens, **model_arguments)
        return output

    def answer(self, output: Tensor | None, said: Mapping[str, Tensor]) -> OutputHead:
        assert output is not None
        return OutputHead(output, output_weight(self.model))

    def own_loss(
        self, output: Tensor | None, labels: Tensor | None, weights: Tensor, walk: Walk
    ) -> WeightedLoss | None:
        """Its cross-entropy on the labels. Communicates: tp."""
        if not self.learns:
            return None
        require(labels is not None, "a teacher that is corrected learns from labels; give them.")
        assert labels is not None
        return cross_entropy_loss(self.answer(output, {}), labels, weights, walk)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # nn.Module loads by walking the tree, so the names in a checkpoint get the place they have in it. What no
        # checkpoint holds is given what it already is.
        saved = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        if self.learns and saved:
            state_dict.update({f"{prefix}model.{name.removeprefix(prefix)}": each for name, each in saved.items()})
        else:
            state_dict.update(self.model.state_dict(prefix=f"{prefix}model."))
        super()._load_from_state_dict(state_dict, prefix, *args)


# ---- where a teacher comes from --------------------------------------------------------------------------------------


class Load(Protocol):
    def __call__(self, shape: ModelShape, weights: Path, *, on_host: bool) -> GPTModel:
        """This rank's part of a model, on the student's layout, in the dtype of its forward pass, with the weights of
        the artifact; in host memory or on the device."""


class TeacherSource(Protocol):
    """A teacher before there is one: what is known of it when no model is built yet."""

    def open(self, load: Load) -> Teacher:
        """This rank's part of it. Communicates: what `load` does."""

    def flops_per_token(self, seq_length: int, *, learns: bool) -> int:
        """What it has to compute of each token of a training step, on all ranks together."""


@dataclass(frozen=True)
class TeacherAtHand:
    """A model artifact that is loaded beside the student."""

    shape: ModelShape
    weights: Path
    offload: bool = False
    """Keep its layers in host memory."""

    def open(self, load: Load) -> LiveTeacher:
        model = load(self.shape, self.weights, on_host=self.offload)
        if self.offload:
            keep_on_host(model.decoder.layers, device=platform.device())
            model.to(platform.device())  # what is left: embedding, output layer, final norm
        return LiveTeacher(model)

    def flops_per_token(self, seq_length: int, *, learns: bool) -> int:
        return self.shape.flops_per_token(seq_length, training=learns)


# ---- what cannot stand side by side ----------------------------------------------------------------------------------


def require_can_learn(*, tied: bool, pipeline_stages: int) -> None:
    """Raises: ValueError: a teacher cannot be corrected beside a student on so many stages.

    Args:
        tied: its output layer is its embedding.
    """
    require(
        not tied or pipeline_stages == 1,
        f"distillation.teacher_lr cannot be set for a teacher with tied embeddings on {pipeline_stages} pipeline "
        "stages: Megatron adds the tied gradients of one model only. Set trainer.pipeline_model_parallel_size=1, or "
        "correct the teacher beforehand.",
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
        "virtual_pipeline_model_parallel_size",
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
