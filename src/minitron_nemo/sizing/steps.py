"""From a recipe's steps to jobs: which models each step holds, on which layout, and what passes through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minitron_nemo.config.plan import PlanConfig
from minitron_nemo.config.search import SearchConfig
from minitron_nemo.config.stages import (
    CorrectTeacherConfig,
    DistillConfig,
    EstimateImportanceConfig,
    EvaluateConfig,
    ExportHfConfig,
    ImportHfConfig,
    PretrainConfig,
    PruneConfig,
    TeacherLogitsConfig,
)
from minitron_nemo.config.trainer import Batch, Layout, Recomputation, TrainerConfig
from minitron_nemo.recipe import Step
from minitron_nemo.search.halving import rungs_of, steps_in_all
from minitron_nemo.shape import ModelShape
from minitron_nemo.sizing.activations import FLOAT32
from minitron_nemo.sizing.cost import checkpoint_bytes
from minitron_nemo.sizing.jobs import CROSS_ENTROPY, DIVERGENCE, NONE, STREAMED, Job, Model
from minitron_nemo.sizing.shapes import Shapes, student_shape, teacher_shape
from minitron_nemo.text.teacher_records import asked_format

BF16 = 2


@dataclass(frozen=True)
class Planned:
    """A step, and what it runs; None: no model, or one process's work."""

    step: Step
    values: Any
    job: Job | None


def planned(step: Step, values: Any, shapes: Shapes, plan: PlanConfig) -> Planned:
    """Of steps in their order: each tells `shapes` what it makes.

    Raises: ValueError, FileNotFoundError: a model that nobody makes, or a shape that cannot be.
    """
    read = _JOBS.get(step.stage)
    return Planned(step, values, None if read is None else read(step.name, values, shapes, plan))


def _part(values: Any, kind: type) -> Any:
    """Of a stage's trainer the fields of one of its groups."""
    return kind(**{field.name: getattr(values, field.name) for field in dataclasses.fields(kind)})


def _element(precision: str) -> int:
    return FLOAT32 if precision == "fp32" else BF16  # auto is bf16 on an accelerator


def _artifact(shape: ModelShape, element: int) -> dict[str, int]:
    return {"artifact": shape.num_parameters * element}


def _import(name: str, config: ImportHfConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    shape, element = teacher_shape(config, plan), _element(config.trainer.precision)
    shapes.make(config.output, shape)
    return Job((Model("model", shape),), _part(config.trainer, Layout), element, disk=_artifact(shape, element))


def _training(trainer: TrainerConfig, steps: int, models: tuple[Model, ...], loss: str) -> Job:
    """What training stages share; FLOPs are those of every model at once."""
    element, tokens = _element(trainer.precision), steps * trainer.tokens_per_step
    flops = sum(model.shape.flops_per_token(trainer.seq_length, training=model.trained) for model in models)
    disk: dict[str, int] = {}
    for model in models:
        if model.trained:
            disk = disk or _artifact(model.shape, element)
            disk["checkpoint"] = disk.get("checkpoint", 0) + checkpoint_bytes(model.shape, element)
    return Job(
        models,
        _part(trainer, Layout),
        element,
        batch=_part(trainer, Batch),
        global_batch_size=trainer.global_batch_size,
        recomputation=_part(trainer, Recomputation),
        loss=loss,
        tokens=tokens,
        flops=tokens * flops,
        disk=disk,
        notes=("two checkpoints stand while a new one is written",),
    )


def _correct(name: str, config: CorrectTeacherConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    shape = shapes.at(config.model, f"{name}.model")
    shapes.make(config.output, shape)
    return _training(config.trainer, config.training.steps, (Model("model", shape, trained=True),), CROSS_ENTROPY)


def _pretrain(name: str, config: PretrainConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    if config.shape:
        shape = ModelShape.from_dict(config.shape)
    else:
        key = "like" if config.like is not None else "initial"
        shape = shapes.at(getattr(config, key), f"{name}.{key}")
    shapes.make(config.output, shape)
    return _training(config.trainer, config.training.steps, (Model("model", shape, trained=True),), CROSS_ENTROPY)


def _distill(name: str, config: DistillConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    student = Model("student", shapes.at(config.student, f"{name}.student"), trained=True)
    shapes.make(config.output, student.shape)
    models: tuple[Model, ...] = (student,)
    if config.teacher_logits is None:
        teacher = shapes.at(config.teacher, f"{name}.teacher")
        if config.corrected_teacher is not None:
            shapes.make(config.corrected_teacher, teacher)
        learns = config.distillation.teacher_lr > 0
        models = (student, Model("teacher", teacher, trained=learns, offloaded=config.offload_teacher))
    job = _training(config.trainer, config.training.steps, models, DIVERGENCE)
    if config.distillation.hidden_states.enabled:
        job = dataclasses.replace(job, notes=(*job.notes, "memory of hidden-state losses is not reckoned"))
    return job


def _search(name: str, config: SearchConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    """Candidates are smaller than what they are cut from, which bounds their memory and time."""
    shape, training = shapes.at(config.model, f"{name}.model"), config.training
    halving = config.halving
    steps = steps_in_all(
        halving.survivors,
        rungs_of(training.steps, halving.rungs),
        keep=halving.keep,
        never_before=halving.never_before,
    )
    models = (Model("student", shape, trained=True), Model("teacher", shape))
    job = _training(config.trainer, steps, models, DIVERGENCE)
    return dataclasses.replace(job, notes=("an upper bound: candidates are smaller than the model", *job.notes))


def _passes(trainer: Any, shapes: list[ModelShape], loss: str, samples: int | None, passes: float = 1) -> Job:
    """A stage that runs samples forward only, `passes` times through the first model and once through the others."""
    tokens = None if samples is None else samples * trainer.seq_length
    each = [shape.flops_per_token(trainer.seq_length) for shape in shapes]
    roles = ["model", *["teacher"] * (len(shapes) - 1)]
    return Job(
        tuple(Model(role, shape) for role, shape in zip(roles, shapes, strict=True)),
        _part(trainer, Layout),
        _element(trainer.precision),
        batch=_part(trainer, Batch),
        loss=loss,
        tokens=tokens,
        flops=None if tokens is None else int(tokens * (passes * each[0] + sum(each[1:]))),
    )


def _estimate(name: str, config: EstimateImportanceConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    shape, samples, depth = shapes.at(config.model, f"{name}.model"), config.importance.num_samples, config.depth
    passes = 1.0
    if depth.reads_samples:  # every size of block costs up to half of L passes, and so does every layer dropped
        rounds = len(depth.block_sizes) * bool(depth.metrics) + depth.greedy.drop * (depth.greedy.metric is not None)
        passes += depth.num_samples / samples * rounds * shape.num_layers / 2
    return _passes(config.trainer, [shape], NONE, samples, passes)


def _prune(name: str, config: PruneConfig, shapes: Shapes, plan: PlanConfig) -> Job | None:
    source = shapes.at(config.model, f"{name}.model")
    target, element = student_shape(config, source), _element(config.trainer.precision)
    shapes.make(config.output, target)
    if config.offline:
        return None
    notes = ("the calibrated surgery's passes are not reckoned",) if config.surgery.runs_model(source, target) else ()
    models = (Model("student", target), Model("teacher", source))
    return Job(models, _part(config.trainer, Layout), element, disk=_artifact(target, element), notes=notes)


def _store(name: str, config: TeacherLogitsConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    shape = shapes.at(config.model, f"{name}.model")
    job = _passes(config.trainer, [shape], STREAMED, config.num_samples)
    stored = asked_format(config, shape.padded_vocab_size)
    per_token, most = stored.most_bytes_per_token, "" if stored.all_alike else "at most "
    disk = {} if job.tokens is None else {"store": job.tokens * per_token}
    return dataclasses.replace(job, disk=disk, notes=(f"{most}{per_token} bytes are stored of each token",))


def _evaluate(name: str, config: EvaluateConfig, shapes: Shapes, plan: PlanConfig) -> Job | None:
    if config.model in shapes.exported:  # a Hugging Face folder: lm_eval's own class asks it in one process
        return None
    held = [shapes.at(config.model, f"{name}.model")]
    if config.teacher is not None and config.num_samples != 0:
        held.append(shapes.at(config.teacher, f"{name}.teacher"))
    job = _passes(config.trainer, held, DIVERGENCE if len(held) > 1 else STREAMED, config.num_samples)
    notes = ("time of the tasks is not reckoned",) if config.has_tasks else ()
    return dataclasses.replace(job, notes=notes)


def _export(name: str, config: ExportHfConfig, shapes: Shapes, plan: PlanConfig) -> Job:
    shape = shapes.at(config.model, f"{name}.model")
    shapes.exported.add(config.output)
    element = FLOAT32 if config.dtype == "fp32" else BF16
    layout = dataclasses.replace(_part(config.trainer, Layout), context_parallel_size=1)
    held = FLOAT32 if config.verify else element
    notes = (f"transformers holds {shape.num_parameters * FLOAT32 / 2**30:.0f} GiB on rank 0's host",)
    return Job(
        (Model("model", shape),),
        layout,
        held,
        disk={"export": shape.num_parameters * element},
        notes=notes if config.verify else (),
    )


_JOBS: dict[str, Callable[[str, Any, Shapes, PlanConfig], Job | None]] = {
    "import-hf": _import,
    "correct-teacher": _correct,
    "pretrain": _pretrain,
    "estimate-importance": _estimate,
    "prune": _prune,
    "search": _search,
    "teacher-logits": _store,
    "distill": _distill,
    "evaluate": _evaluate,
    "export-hf": _export,
}
