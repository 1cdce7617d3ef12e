"""distill: the pruned student learns the corrected teacher's logits, by config its hidden states too.

The retraining of arXiv:2407.14679. Validation measures the student's cross-entropy, comparable with every other run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minitron_nemo.artifact import Artifact
from minitron_nemo.checks import require
from minitron_nemo.distillation.config import DistillationConfig
from minitron_nemo.engine.checkpoint import open_model
from minitron_nemo.engine.data import DataConfig
from minitron_nemo.engine.models import DistillationGPTModel
from minitron_nemo.engine.optim import build_optimizer
from minitron_nemo.engine.tokenizer import tokenizer_digest
from minitron_nemo.engine.training import TrainerConfig, TrainingConfig
from minitron_nemo.pruning import PruningPlan
from minitron_nemo.stages.training import config_dict, prepare_layout, run_training


@dataclass
class DistillConfig:
    teacher: str = ""
    """Model artifact that teaches; the corrected teacher."""
    student: str = ""
    """Model artifact that learns; the pruned student."""
    plan: str | None = None
    """Folder of the plan by which the student was cut from this teacher, for hidden losses that go by it; null: the
    student's own, where prune made it."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    trust_checkpoint: bool = False
    seed: int = 1234
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str = "runs/distilled"


def run(config: DistillConfig) -> Artifact:
    teacher = open_model(config.teacher, key="distill.teacher", trust_checkpoint=config.trust_checkpoint)
    student = open_model(config.student, key="distill.student", trust_checkpoint=config.trust_checkpoint)
    require(
        tokenizer_digest(teacher.tokenizer) == tokenizer_digest(student.tokenizer)
        and teacher.shape.padded_vocab_size == student.shape.padded_vocab_size,
        f"distill.teacher={teacher.path} and distill.student={student.path} do not share a tokenizer and vocabulary "
        f"({teacher.shape.padded_vocab_size} and {student.shape.padded_vocab_size} rows); their logits cannot be "
        "compared. Use a student pruned from a model with the teacher's tokenizer.",
    )
    inputs = [*teacher.artifacts, *student.artifacts, *(artifact for artifact, _ in config.data.blend())]
    prepare_layout(config.trainer, student.shape, seed=config.seed)
    teacher.shape.require_splits_over(
        config.trainer.tensor_model_parallel_size,
        config.trainer.pipeline_model_parallel_size,
        config.trainer.expert_model_parallel_size,
    )
    plan = config.plan or (student.path if PruningPlan.is_in(student.path) else None)
    model = DistillationGPTModel(
        student.shape,
        teacher.shape,
        config.distillation,
        student_weights=student.path,
        teacher_weights=teacher.path,
        vocab_size=student.vocab_size,
        plan=None if plan is None else PruningPlan.load(plan),
        optim=build_optimizer(config.training.optim, steps=config.training.steps, bf16=config.trainer.bf16),
    )
    return run_training(
        model,
        stage="distill",
        label="distillation",
        tokenizer_path=student.tokenizer,
        vocab_size=student.vocab_size,
        trainer=config.trainer,
        training=config.training,
        data=config.data,
        output=Path(config.output),
        config=config_dict(config),
        inputs=inputs,
    )
