"""distill: the pruned student learns the corrected teacher's logits, by config its hidden states too.

The retraining of arXiv:2407.14679. Validation measures the student's cross-entropy, comparable with every other run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron.core import parallel_state
from torch.utils.data import Dataset

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.config.stages import DistillConfig
from minitron_nemo.distillation.stored_teacher import TeacherInStore
from minitron_nemo.distillation.teacher import TeacherAtHand, TeacherSource, require_can_learn
from minitron_nemo.parallel import rank_zero_says
from minitron_nemo.plan import PruningPlan
from minitron_nemo.runtime.layout import prepare_layout, require_splits
from minitron_nemo.runtime.model_artifact import ModelInput
from minitron_nemo.runtime.training_run import Trained, Trainee
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape
from minitron_nemo.stages.training import run_training
from minitron_nemo.text.blend import open_blend
from minitron_nemo.text.stored_samples import samples_of
from minitron_nemo.text.teacher_store import TeacherStore
from minitron_nemo.text.tokenizer_files import tokenizer_digest


def run(config: DistillConfig, *, pause_at: int | None = None) -> Artifact:
    """
    Args:
        pause_at: as `TrainingRun.pause_at`.
    Raises: Paused: it has come there.
    """
    student = engine.open_model(config.student, key="distill.student")
    blend = open_blend(config.data)
    lesson = _at_hand(config, student) if config.teacher_logits is None else _stored(config, student, blend)
    return run_training(
        Trainee(
            student.shape,
            student.tokenizer,
            student.vocab_size,
            weights=student.path,
            teacher=lesson.teacher,
            plan=lesson.plan,
            distillation=config.distillation,
        ),
        stage="distill",
        label="distillation",
        trainer=config.trainer,
        training=config.training,
        data=config.data,
        output=Path(config.output),
        config=config,
        inputs=[*lesson.artifacts, *student.artifacts, *(artifact for artifact, _ in blend)],
        train_dataset=lesson.samples,
        trained=partial(_keep_teacher, config, lesson),
        pause_at=pause_at,
    )


def _keep_teacher(config: DistillConfig, lesson: _Lesson, trained: Trained) -> None:
    """Write the teacher that was corrected, if it is asked for."""
    if config.corrected_teacher is None:
        return
    assert trained.teacher_core is not None
    before = engine.open_model(config.teacher, key="distill.teacher")
    with writing(config.corrected_teacher, stage="correct-teacher", config=config, inputs=lesson.artifacts) as draft:
        engine.save_model(trained.teacher_core, before.shape, before.tokenizer, draft.path)
        draft.facts["vocab_size"] = before.vocab_size
        draft.metrics.update(parameters=before.shape.num_parameters, steps=config.training.steps)


class _Lesson(NamedTuple):
    """Who teaches, and what of."""

    teacher: TeacherSource
    artifacts: list[Artifact]
    """What the teacher is read from."""
    plan: PruningPlan | None = None
    """By which the student was cut from it."""
    samples: Callable[[int], Dataset] | None = None
    """Where the teacher's answers come with them; None: those of the data."""


def _at_hand(config: DistillConfig, student: ModelInput) -> _Lesson:
    """The teacher is loaded beside the student."""
    teacher = engine.open_model(config.teacher, key="distill.teacher")
    require(
        tokenizer_digest(teacher.tokenizer) == tokenizer_digest(student.tokenizer)
        and teacher.shape.padded_vocab_size == student.shape.padded_vocab_size,
        f"distill.teacher={teacher.path} and distill.student={student.path} do not share a tokenizer and vocabulary "
        f"({teacher.shape.padded_vocab_size} and {student.shape.padded_vocab_size} rows); their logits cannot be "
        "compared. Use a student pruned from a model with the teacher's tokenizer.",
    )
    prepare_layout(config.trainer, student.shape, seq_length=config.trainer.seq_length, seed=config.seed)
    require_splits(teacher.shape, config.trainer)
    if config.distillation.teacher_lr > 0:
        tied, stages = teacher.shape.share_embeddings_and_output_weights, config.trainer.pipeline_model_parallel_size
        require_can_learn(tied=tied, pipeline_stages=stages)
    plan = config.plan or (student.path if rank_zero_says(PruningPlan.is_in(student.path)) else None)
    return _Lesson(
        TeacherAtHand(teacher.shape, teacher.path, config.offload_teacher),
        teacher.artifacts,
        plan=None if plan is None else plan_of_both(config, Path(plan), teacher.shape, student.shape),
    )


def plan_of_both(config: DistillConfig, path: Path, teacher: ModelShape, student: ModelShape) -> PruningPlan:
    """Raises: ValueError: a plan that is named, or that hidden losses go by, and cuts other models than these."""
    plan, hidden = PruningPlan.load(path), config.distillation.hidden_states
    by_plan = [name for name in ("mapping", "projection_init") if hidden.enabled and getattr(hidden, name) == "plan"]
    if config.plan is None and not by_plan:
        return plan
    for role, planned, model in (("teacher", plan.source, teacher), ("student", plan.target, student)):
        for dim in (*PRUNABLE_DIMS, "kv_channels"):
            cuts, has = getattr(planned, dim), getattr(model, dim)
            require(
                cuts == has,
                f"distill.plan={path} is of another {role}: its {dim} is {cuts}, and that of distill.{role}="
                f"{getattr(config, role)} {has}. Name the plan by which this student was cut from this teacher"
                f"{''.join(f', or another distillation.hidden_states.{name}' for name in by_plan)}.",
            )
    return plan


def _stored(config: DistillConfig, student: ModelInput, blend: list[tuple[Artifact, float]]) -> _Lesson:
    """What the teacher said is read with the samples."""
    assert config.teacher_logits is not None
    store = TeacherStore.open(config.teacher_logits, key="distill.teacher_logits")
    store.require_of_teacher(config.teacher)
    store.require_fits(
        config.distillation.divergence,
        seq_length=config.trainer.seq_length,
        vocab_size=student.vocab_size,
        tokenizer=tokenizer_digest(student.tokenizer),
    )
    prepare_layout(config.trainer, student.shape, seq_length=config.trainer.seq_length, seed=config.seed)
    here = parallel_state.is_pipeline_last_stage()
    samples = samples_of(store, blend, seed=config.data.seed, with_teacher=here)
    return _Lesson(TeacherInStore(store.format.temperature), [store.artifact], samples=samples)
