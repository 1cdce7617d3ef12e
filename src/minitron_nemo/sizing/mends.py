"""What to change where a step does not fit into a device's memory, with what the change is worth and what it costs.

One change at a time, and where none is enough, two. They are tried on the same arithmetic; those that a stage would
refuse are left out. What more communication costs is not reckoned: of equal hours, the fewer ranks a model the better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.sizing.cost import cost_of
from minitron_nemo.sizing.jobs import Job
from minitron_nemo.sizing.machine import Machine
from minitron_nemo.sizing.memory import memory_of
from minitron_nemo.sizing.mistakes import mistakes_of


@dataclass(frozen=True)
class Mend:
    """A change, in the user's own keys."""

    keys: dict[str, Any]
    memory_bytes: int
    """Of the fullest rank, then."""
    hours: float | None
    """Of the step, then."""
    fits: bool

    @property
    def words(self) -> str:
        return " ".join(f"{key}={str(value).lower() if value is True else value}" for key, value in self.keys.items())


def mends_of(name: str, job: Job, trainer: Any, machine: Machine) -> list[Mend]:
    """The cheapest first: fitting ones by their hours, then the others by what they save."""
    changes = list(_changes(name, job, machine))
    pairs = [{**one, **two} for one, two in itertools.combinations(changes, 2) if not set(one) & set(two)]
    single = [mend for change in changes if (mend := _tried(name, change, job, trainer, machine)) is not None]
    found = single
    if not any(mend.fits for mend in single):
        tried = (_tried(name, change, job, trainer, machine) for change in pairs)
        found = [mend for mend in tried if mend is not None and mend.fits][:3] + single
    now = memory_of(job, machine).total
    useful = [mend for mend in found if mend.memory_bytes < now]
    return sorted(useful, key=lambda mend: (not mend.fits, mend.hours or 0.0 if mend.fits else mend.memory_bytes))


def _changes(name: str, job: Job, machine: Machine) -> Iterator[dict[str, Any]]:
    """Each alone; what is so already is left out."""
    layout = job.layout
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    if tp > 1 and not layout.sequence_parallel:
        yield {"trainer.sequence_parallel": True}
    if job.batch is not None and job.batch.micro_batch_size > 1:
        yield {"trainer.micro_batch_size": max(1, job.batch.micro_batch_size // 2)}
    if job.trains and job.recomputation is not None and job.recomputation.recompute_granularity != "full":
        yield {"trainer.recompute_granularity": "full"}
    teacher = next((model for model in job.models if model.role == "teacher"), None)
    if job.trains and teacher is not None and not teacher.trained and not teacher.offloaded:
        yield {f"{name}.offload_teacher": True}
    for size in (2 * tp, 4 * tp, 8 * tp):
        if size <= machine.ranks_per_node:  # across nodes its reductions are slow
            yield {"trainer.tensor_model_parallel_size": size, "trainer.sequence_parallel": True}
    if job.trains and pp * 2 <= machine.ranks:
        yield {"trainer.pipeline_model_parallel_size": 2 * pp}


def _tried(name: str, keys: dict[str, Any], job: Job, trainer: Any, machine: Machine) -> Mend | None:
    """None: a stage would refuse it."""
    values = {key.rpartition(".")[2]: value for key, value in keys.items()}
    changed = job.changed(**values)
    config = trainer
    if isinstance(trainer, TrainerConfig):
        known = {key: value for key, value in values.items() if hasattr(trainer, key)}
        config = TrainerConfig(**{**vars(trainer), **known})
    if mistakes_of(changed, config, machine):
        return None
    memory, cost = memory_of(changed, machine).total, cost_of(changed, machine)
    hours = None if cost is None else cost.hours
    return Mend(keys, memory, hours, memory <= machine.room_bytes and math.isfinite(memory))
