"""What `engine` asks of a trainer, answered by NeMo 2.x; see `engine.Implementation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_nemo import platform
from minitron_nemo.nemo.context import shape_from_context, write_context
from minitron_nemo.nemo.data_module import build_data_module
from minitron_nemo.nemo.distillation import DistillationGPTModel
from minitron_nemo.nemo.downstream import best_kept
from minitron_nemo.nemo.models import CrossEntropyGPTModel, EngineModel, meta_core, new_core
from minitron_nemo.nemo.optim import build_optimizer
from minitron_nemo.nemo.trainer import fit
from minitron_nemo.runtime.distributed_checkpoint import load_weights
from minitron_nemo.runtime.model_artifact import CONTEXT
from minitron_nemo.runtime.training_run import Trained, TrainingRun
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer import load_tokenizer

__all__ = ["meta_core", "new_core", "read_foreign_shape", "train", "write_context"]


def read_foreign_shape(directory: Path) -> ModelShape:
    """Raises: ValueError: a model class that is not supported."""
    return shape_from_context(directory / CONTEXT / "model.yaml")


def train(run: TrainingRun) -> Trained:
    """See `engine.train`."""
    model = _model(run)
    data = build_data_module(
        run.data,
        load_tokenizer(run.trainee.tokenizer),
        run.trainer.seq_length,
        run.trainer.micro_batch_size,
        run.trainer.global_batch_size,
        index_dir=run.directory / "index",
        train_dataset=run.train_dataset,
    )
    history = fit(model, data, run)
    best = best_kept(run.directory) if run.training.downstream.keep_best else None
    if best is not None:
        load_weights(model.core, best[0])
    teacher = model.corrected_teacher if isinstance(model, DistillationGPTModel) else None
    return Trained(model.core, history, teacher_core=teacher, best=best and best[1])


def _model(run: TrainingRun) -> EngineModel:
    """What is trained, with its optimizer."""
    trainee, dtype = run.trainee, platform.dtype_of(run.trainer.precision)
    options: dict[str, Any] = run.trainer.recomputation
    config, teacher = trainee.distillation, trainee.teacher
    if trainee.shape.num_moe_experts is not None:
        coefficient = run.training.moe_aux_loss_coeff
        if coefficient is not None or teacher is not None:
            options["moe_aux_loss_coeff"] = coefficient or 0.0
    options["optim"] = build_optimizer(
        run.training.optim,
        steps=run.training.steps,
        dtype=dtype,
        teacher_lr=0.0 if config is None else config.teacher_lr,
    )
    if config is None or teacher is None:
        return CrossEntropyGPTModel(trainee.shape, initial=trainee.weights, vocab_size=trainee.vocab_size, **options)
    assert trainee.weights is not None
    return DistillationGPTModel(
        trainee.shape,
        teacher,
        config,
        student_weights=trainee.weights,
        vocab_size=trainee.vocab_size,
        plan=trainee.plan,
        **options,
    )
