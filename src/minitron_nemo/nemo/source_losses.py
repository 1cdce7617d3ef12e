"""Validation losses of each source of a blend, beside that of all the held-out text together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from minitron_nemo import platform
from minitron_nemo.by_source import SourceSums
from minitron_nemo.distillation.loss import AGREEMENT, DIVERGENCE, LOSS
from minitron_nemo.distillation.teacher_student import teacher_student_in
from minitron_nemo.runtime.forward import summed


class SourceLosses(pl.Callback):
    """Holds what the last validation has found of each source whose text it has read."""

    def __init__(self, sources: Sequence[str]) -> None:
        """
        Args:
            sources: names, as their samples are numbered.
        """
        self.sources = list(sources)
        self.of_last_validation: dict[str, float] = {}
        """validation_loss/<source>, and where a teacher runs beside it validation_divergence/<source> and
        validation_agreement/<source>: means over the source's tokens that count, equal on every rank."""
        self._sums: SourceSums | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        distillation = teacher_student_in(pl_module.module)
        compares = distillation is not None and distillation.teacher.can_validate
        parts = [LOSS, *([DIVERGENCE, AGREEMENT] if compares else [])]
        self._sums = SourceSums(parts, len(self.sources), platform.device())
        pl_module.validation_loss_reduction.by_source = self._sums
        if distillation is not None:
            distillation.by_source = self._sums

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Communicates: dp and cp (sum), pp (from the last stage)."""
        assert self._sums is not None
        parts, sums = self._sums.parts, self._sums.sums
        total = summed([sums.flatten()], values=sums.numel()).view(sums.shape).tolist()
        self.of_last_validation = {
            f"validation_{part}/{source}": value / weight
            for part, of_sources in zip(parts, total, strict=True)
            for source, (value, weight) in zip(self.sources, of_sources, strict=True)
            if weight > 0
        }
