"""NeMo's model of a student and its teacher; what is trained, saved and evaluated is the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.distillation.loss import LOSS, Loss
from minitron_nemo.distillation.teacher import TeacherSource
from minitron_nemo.distillation.teacher_student import TeacherStudent, teacher_student_in
from minitron_nemo.nemo.models import CountedTokens, EngineModel, build_beside, build_core, nemo_config, to_be_loaded
from minitron_nemo.plan import PruningPlan
from minitron_nemo.runtime.distributed_checkpoint import load_weights
from minitron_nemo.runtime.step import data_step, distillation_step
from minitron_nemo.shape import ModelShape


class HandedOverLoss(CountedTokens):
    """Trains on the loss that the model hands over, whose gradients are formed with its sum.

    NeMo's own reduction, which it extends, expects values per token, weighs them by the loss mask and trains on their
    sum; here that number is what is logged, and the constant values of the report are what it is made from.
    """

    def forward(
        self, batch: dict[str, torch.Tensor], forward_out: Loss
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        _, count, logged = super().forward(batch, forward_out.report[LOSS])
        return forward_out.sum, count, logged


class DistillationGPTModel(EngineModel):
    """A `TeacherStudent` under NeMo's strategy."""

    reduction_class = HandedOverLoss

    def __init__(
        self,
        student: ModelShape,
        teacher: TeacherSource,
        config: DistillationConfig,
        *,
        student_weights: Path,
        vocab_size: int,
        plan: PruningPlan | None = None,
        optim: Any = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            teacher: opened when this rank's part of the student is built.
            plan: by which the student was cut from the teacher; hidden losses may ask for it.
            overrides: fields of the student's TransformerConfig.
        """
        super().__init__(
            nemo_config(student, forward_step_fn=distillation_step, data_step_fn=data_step, **overrides), optim=optim
        )
        self.shape, self.teacher, self.plan = student, teacher, plan
        self.distillation, self.vocab_size = config, vocab_size
        self.student_weights = student_weights

    def build(self, vp_stage: int | None) -> torch.nn.Module:
        to_be_loaded(self.config)
        student = build_core(self.config, self.shape, vp_stage=vp_stage)
        load_weights(student, self.student_weights)

        def load(shape: ModelShape, weights: Path, *, on_host: bool) -> MCoreGPTModel:
            model = build_beside(self.config, shape, vp_stage=vp_stage, on_host=on_host)
            load_weights(model, weights)
            return model

        teacher = self.teacher.open(load)
        return TeacherStudent(student, teacher, self.distillation, vocab_size=self.vocab_size, plan=self.plan)

    def training_flops_per_token(self, seq_length: int) -> int:
        """The student's forward and backward pass, and what the teacher computes."""
        return super().training_flops_per_token(seq_length) + self.teacher.flops_per_token(
            seq_length, learns=self.distillation.teacher_lr > 0
        )

    @property
    def corrected_teacher(self) -> MCoreGPTModel | None:
        """This rank's part of a teacher that learned while it taught, bare Megatron-core; None: it did not."""
        both = teacher_student_in(self.module)
        assert both is not None
        return both.learning_teacher

    def forward(self, **inputs: Any) -> torch.Tensor | Loss:
        """See `TeacherStudent.forward`; NeMo's own signature knows no loss mask."""
        output: torch.Tensor | Loss = self.module(**inputs)
        return output
