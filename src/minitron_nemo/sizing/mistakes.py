"""What a step's stage would refuse on its ranks, asked of the stages' own checks, before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from minitron_nemo.checks import Mistake
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.distillation.teacher import require_can_learn
from minitron_nemo.runtime.layout import (
    require_batch_splits,
    require_recomputed_layers,
    require_samples_split,
    require_splits,
    require_tokens_split,
    require_world_holds,
)
from minitron_nemo.sizing.jobs import Job
from minitron_nemo.sizing.machine import Machine


def mistakes_of(job: Job, trainer: object, machine: Machine) -> list[str]:
    """In words, each once; empty: the stage would start.

    Args:
        trainer: what the step reads of `trainer`.
    """
    found: dict[str, None] = {}
    for check in _checks(job, trainer, machine):
        try:
            check()
        except Mistake as error:
            found[str(error)] = None
    return list(found)


def _checks(job: Job, trainer: object, machine: Machine) -> Iterator[Callable[[], None]]:
    layout, ranks = job.layout, machine.ranks
    yield partial(require_world_holds, layout, ranks)
    for model in job.models:
        yield partial(require_splits, model.shape, layout)
        if job.trains or layout.expert_model_parallel_size > 1:
            yield partial(require_tokens_split, model.shape, layout)
        if job.batch is not None:
            yield partial(require_samples_split, model.shape, layout, job.batch.seq_length)
    if isinstance(trainer, TrainerConfig) and ranks % layout.model_parallel_size == 0:
        yield partial(require_batch_splits, trainer, ranks)
    if isinstance(trainer, TrainerConfig) and job.trains:
        shape, stages = job.trained.shape, layout.pipeline_model_parallel_size
        if stages <= shape.num_layers:
            yield partial(require_recomputed_layers, shape, trainer)
        for model in job.models:
            if model.role == "teacher" and model.trained:
                tied = model.shape.share_embeddings_and_output_weights
                yield partial(require_can_learn, tied=tied, pipeline_stages=stages)
