"""distill: the pruned student learns the corrected teacher's logits, by config its hidden states too.

The retraining of arXiv:2407.14679. Validation measures the student's cross-entropy, comparable with every other run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core import parallel_state
from torch.utils.data import Dataset

from minitron_nemo import platform
from minitron_nemo.artifact import Artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.config.identity import as_dict
from minitron_nemo.config.stages import DistillConfig
from minitron_nemo.distillation.stored_teacher import require_stored_is_enough
from minitron_nemo.nemo.models import DistillationGPTModel, EngineModel, StoredDistillationGPTModel
from minitron_nemo.nemo.optim import build_optimizer
from minitron_nemo.plan import PruningPlan
from minitron_nemo.runtime.model_artifact import ModelInput, open_model, save_model
from minitron_nemo.stages.training import prepare_layout, run_training
from minitron_nemo.text.blend import open_blend
from minitron_nemo.text.stored_samples import TeacherLogits
from minitron_nemo.text.tokenizer import tokenizer_digest


def run(config: DistillConfig) -> Artifact:
    student = open_model(config.student, key="distill.student", trust_checkpoint=config.trust_checkpoint)
    blend = open_blend(config.data)
    lesson = _teacher_at_hand(config, student) if config.teacher_logits is None else _stored(config, student, blend)
    return run_training(
        lesson.model,
        stage="distill",
        label="distillation",
        tokenizer_path=student.tokenizer,
        vocab_size=student.vocab_size,
        trainer=config.trainer,
        training=config.training,
        data=config.data,
        output=Path(config.output),
        config=config,
        inputs=[*lesson.teacher, *student.artifacts, *(artifact for artifact, _ in blend)],
        train_dataset=lesson.samples,
        trained=partial(_keep_teacher, config, lesson),
    )


def _keep_teacher(config: DistillConfig, lesson: _Lesson) -> None:
    """Write the teacher that was corrected, if it is asked for."""
    if config.corrected_teacher is None:
        return
    assert isinstance(lesson.model, DistillationGPTModel)
    before = open_model(config.teacher, key="distill.teacher", trust_checkpoint=config.trust_checkpoint)
    with writing(
        config.corrected_teacher, stage="correct-teacher", config=as_dict(config), inputs=lesson.teacher
    ) as draft:
        save_model(lesson.model.teacher_core, before.shape, before.tokenizer, draft.path)
        draft.facts["vocab_size"] = before.vocab_size
        draft.metrics.update(parameters=before.shape.num_parameters, steps=config.training.steps)


class _Lesson(NamedTuple):
    model: EngineModel
    teacher: list[Artifact]
    samples: Callable[[int], Dataset] | None


def _teacher_at_hand(config: DistillConfig, student: ModelInput) -> _Lesson:
    teacher = open_model(config.teacher, key="distill.teacher", trust_checkpoint=config.trust_checkpoint)
    require(
        tokenizer_digest(teacher.tokenizer) == tokenizer_digest(student.tokenizer)
        and teacher.shape.padded_vocab_size == student.shape.padded_vocab_size,
        f"distill.teacher={teacher.path} and distill.student={student.path} do not share a tokenizer and vocabulary "
        f"({teacher.shape.padded_vocab_size} and {student.shape.padded_vocab_size} rows); their logits cannot be "
        "compared. Use a student pruned from a model with the teacher's tokenizer.",
    )
    prepare_layout(config.trainer, student.shape, seq_length=config.trainer.seq_length, seed=config.seed)
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
        optim=_optimizer(config),
        offload_teacher=platform.dtype_of(config.trainer.precision) if config.offload_teacher else None,
        **config.trainer.recomputation,
    )
    return _Lesson(model, teacher.artifacts, None)


def _stored(config: DistillConfig, student: ModelInput, blend: list[tuple[Artifact, float]]) -> _Lesson:
    assert config.teacher_logits is not None
    divergence = config.distillation.divergence
    require_stored_is_enough(config.distillation)
    store = TeacherLogits.open(config.teacher_logits, key="distill.teacher_logits")
    store.require_of_teacher(config.teacher)
    store.require_fits(
        divergence,
        seq_length=config.trainer.seq_length,
        vocab_size=student.vocab_size,
        tokenizer=tokenizer_digest(student.tokenizer),
    )
    prepare_layout(config.trainer, student.shape, seq_length=config.trainer.seq_length, seed=config.seed)
    samples = store.samples_of(blend, seed=config.data.seed, with_teacher=parallel_state.is_pipeline_last_stage())
    model = StoredDistillationGPTModel(
        student.shape,
        config.distillation,
        student_weights=student.path,
        vocab_size=student.vocab_size,
        temperature=store.format.temperature,
        optim=_optimizer(config),
        **config.trainer.recomputation,
    )
    return _Lesson(model, [store.artifact], samples)


def _optimizer(config: DistillConfig) -> Any:
    return build_optimizer(
        config.training.optim,
        steps=config.training.steps,
        dtype=platform.dtype_of(config.trainer.precision),
        teacher_lr=config.distillation.teacher_lr,
    )
