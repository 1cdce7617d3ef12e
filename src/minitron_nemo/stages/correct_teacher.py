"""correct-teacher: a brief fine-tuning of the teacher on the data it will teach (arXiv:2408.11796, teacher correction).

Cross-entropy at a low learning rate, all of the teacher's weights. Where teacher and distillation data differ, this is
what makes the teacher's predictions worth learning.
"""

from __future__ import annotations

from pathlib import Path

from minitron_nemo import platform
from minitron_nemo.artifact import Artifact
from minitron_nemo.config.stages import CorrectTeacherConfig
from minitron_nemo.nemo.models import PrunableGPTModel
from minitron_nemo.nemo.optim import build_optimizer
from minitron_nemo.runtime.model_artifact import open_model
from minitron_nemo.stages.training import prepare_layout, run_training
from minitron_nemo.text.blend import open_blend


def run(config: CorrectTeacherConfig) -> Artifact:
    source = open_model(config.model, key="correct_teacher.model", trust_checkpoint=config.trust_checkpoint)
    inputs = [*source.artifacts, *(artifact for artifact, _ in open_blend(config.data))]
    prepare_layout(config.trainer, source.shape, seq_length=config.trainer.seq_length, seed=config.seed)
    optimizer = build_optimizer(
        config.training.optim, steps=config.training.steps, dtype=platform.dtype_of(config.trainer.precision)
    )
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
        config=config,
        inputs=inputs,
    )
