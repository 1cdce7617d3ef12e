"""correct-teacher: a brief fine-tuning of the teacher on the data it will teach (arXiv:2408.11796, teacher correction).

Cross-entropy at a low learning rate, all of the teacher's weights. Where teacher and distillation data differ, this is
what makes the teacher's predictions worth learning.
"""

from __future__ import annotations

from pathlib import Path

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact
from minitron_nemo.config.stages import CorrectTeacherConfig
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.training_run import Trainee
from minitron_nemo.stages.training import run_training
from minitron_nemo.text.blend import open_blend


def run(config: CorrectTeacherConfig) -> Artifact:
    source = engine.open_model(config.model, key="correct_teacher.model")
    inputs = [*source.artifacts, *(artifact for artifact, _ in open_blend(config.data))]
    prepare_layout(config.trainer, source.shape, seq_length=config.trainer.seq_length, seed=config.seed)
    return run_training(
        Trainee(source.shape, source.tokenizer, source.vocab_size, weights=source.path),
        stage="correct-teacher",
        label="teacher correction",
        trainer=config.trainer,
        training=config.training,
        data=config.data,
        output=Path(config.output),
        config=config,
        inputs=inputs,
    )
