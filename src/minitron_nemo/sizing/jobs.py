"""What the ranks hold and run in a step: the models, on one layout, and the samples that pass through them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from minitron_nemo.config.trainer import Batch, Layout, Recomputation
from minitron_nemo.shape import ModelShape

DIVERGENCE, CROSS_ENTROPY, STREAMED, NONE = "divergence", "cross_entropy", "streamed", "none"
"""What is made of the last hidden states: the distance from a teacher, a chunk of logits at a time; cross-entropy from
whole logits, as Megatron-core trains; cross-entropy of a chunk at a time; nothing."""


@dataclass(frozen=True)
class Model:
    """One of the models that stand beside each other on every rank."""

    role: str
    """student, teacher or model"""
    shape: ModelShape
    trained: bool = False
    offloaded: bool = False
    """Its layers are in host memory, two at a time on the device."""


@dataclass(frozen=True)
class Job:
    """The part of a step that runs models.

    Args:
        layout: what the step reads of `trainer`.
        element: bytes of a number in a forward pass.
    """

    models: tuple[Model, ...]
    layout: Layout
    element: int
    batch: Batch | None = None
    """None: no samples pass."""
    global_batch_size: int | None = None
    """Of a step that trains."""
    recomputation: Recomputation | None = None
    loss: str = NONE
    tokens: int | None = None
    """Over all ranks; None: it is not known before data are prepared."""
    flops: int | None = None
    """Of all tokens, on all ranks together; what is computed twice counts once."""
    disk: dict[str, int] = field(default_factory=dict)
    """What is written -> bytes."""
    notes: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        return any(model.trained for model in self.models)

    @property
    def trained(self) -> Model:
        """The one that learns first of all."""
        return next(model for model in self.models if model.trained)

    def micro_batches(self, ranks: int) -> int:
        """Of a pipeline in one optimizer step; one in a step that does not train."""
        if self.global_batch_size is None or self.batch is None:
            return 1
        data_parallel = ranks // self.layout.model_parallel_size
        return self.global_batch_size // (self.batch.micro_batch_size * data_parallel)

    def changed(self, **values: Any) -> Job:
        """The same with other values of `trainer`, and `offload_teacher`."""
        job = self
        if values.pop("offload_teacher", False):
            models = tuple(replace(model, offloaded=model.role == "teacher") for model in self.models)
            job = replace(job, models=models)
        for part in ("layout", "batch", "recomputation"):
            now = getattr(job, part)
            known = {name: value for name, value in values.items() if now is not None and hasattr(now, name)}
            job = replace(job, **{part: replace(now, **known)}) if known else job
        return job
