"""Surgery on disk: a model artifact or NeMo 2 checkpoint in, the pruned model's files out, a piece at a time.

    a piece of the student, when
    it is its turn to be written  ->  read from the teacher's files  ->  cut along its axes  ->  a file of its own

Resident are one piece (pieces.py), the stored chunk it is read from or its pruned copy, and the piece written before
it; never a model. One process runs it; nothing communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from minitron_nemo.axes import parameter_axes, part_axes
from minitron_nemo.axis_expressions import Axis, KeptOfAxes
from minitron_nemo.hf.config import require_same_shape
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning.surgery import source_of
from minitron_nemo.runtime.distributed_checkpoint import WEIGHTS
from minitron_nemo.runtime.model_artifact import ModelInput
from minitron_nemo.runtime.pieces import MetaCore, StoredWeights, require_one_process, save_pieces
from minitron_nemo.shape import ModelShape


def prune_checkpoint(
    source: ModelInput,
    plan: PruningPlan,
    directory: Path,
    *,
    meta_core: MetaCore,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what `plan` keeps of the weights of `source` to `directory/weights`; the source is not changed.

    Args:
        plan: its source is the model's shape.
        directory: a draft's path (`artifact.writing`).
        dtype: of the weights written; None: as they are stored.
    One process alone; it sets up torch.distributed for itself where that has not been done.
    Raises: ValueError: a plan for another model, several processes, or weights that are cut short, missing or of
        another shape; before anything is written.
    """
    mend = "Prune the model that the plan was made for, or make a plan for this one."
    require_same_shape(source.shape, plan.source, source.path, mend=mend)
    require_one_process("Surgery on disk")
    teacher = StoredWeights(source.path / WEIGHTS, meta_core(plan.source))

    def cut(name: str, number: int, piece: ShardedTensor) -> tuple[torch.dtype, Callable[[], Tensor]]:
        source_name, kept = source_of(name, plan, teacher.read_whole)
        theirs = teacher.pieces[source_name]
        stored, axes = theirs[number], _axes_of(source_name, plan.source, len(theirs))[number]
        written = dtype or teacher.dtype(stored)
        return written, partial(_cut, teacher, stored, axes, plan.source, kept, written)

    save_pieces(meta_core(plan.target), directory, cut)


def _cut(
    teacher: StoredWeights,
    piece: ShardedTensor,
    axes: tuple[Axis, ...],
    shape: ModelShape,
    kept: KeptOfAxes,
    dtype: torch.dtype,
) -> Tensor:
    """A piece of the student, made now."""
    tensor = teacher.read(piece)
    for dim, axis in enumerate(axes):
        tensor = axis.reduce(tensor, dim, shape, kept)
    return tensor.to(dtype).contiguous()


def _axes_of(name: str, shape: ModelShape, count: int) -> list[tuple[Axis, ...]]:
    """The axes of each of a parameter's pieces: of the whole parameter where it is one piece, else of its parts."""
    return [parameter_axes(name).axes] if count == 1 else part_axes(name, shape)
