"""correct-teacher: a brief fine-tuning of the teacher on the data it will teach (arXiv:2408.11796, teacher correction).

Cross-entropy at a low learning rate, all of the teacher's weights. Where teacher and distillation data differ, this is
what makes the teacher's predictions worth learning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minitron_nemo.artifact import Artifact
from minitron_nemo.engine.checkpoint import open_model
from minitron_nemo.engine.data import DataConfig
from minitron_nemo.engine.models import PrunableGPTModel
from minitron_nemo.engine.optim import build_optimizer
from minitron_nemo.engine.training import TrainerConfig, TrainingConfig
from minitron_nemo.stages.training import config_dict, prepare_layout, run_training


@dataclass
class CorrectTeacherConfig:
    model: str = ""
    """Model artifact of the teacher as it came."""
    trust_checkpoint: bool = False
    seed: int = 1234
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str = "runs/corrected_teacher"


def run(config: CorrectTeacherConfig) -> Artifact:
    source = open_model(config.model, key="correct_teacher.model", trust_checkpoint=config.trust_checkpoint)
    inputs = [*source.artifacts, *(artifact for artifact, _ in config.data.blend())]
    prepare_layout(config.trainer, source.shape, seed=config.seed)
    optimizer = build_optimizer(config.training.optim, steps=config.training.steps, bf16=config.trainer.bf16)
    return run_training(
        PrunableGPTModel(source.shape, initial=source.path, optim=optimizer, **config.trainer.recomputation),
        stage="correct-teacher",
        label="teacher correction",
        tokenizer_path=source.tokenizer,
        vocab_size=source.vocab_size,
        trainer=config.trainer,
        training=config.training,
        data=config.data,
        output=Path(config.output),
        config=config_dict(config),
        inputs=inputs,
    )
