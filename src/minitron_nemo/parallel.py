"""The process groups we talk over, and the collectives, named by what they do.

Every function takes its group; a group of None or of one rank goes through the same code and returns its input's value.
Collectives are differentiable nowhere: they carry statistics, weights and losses, not activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")


def group_size(group: ProcessGroup | None) -> int:
    return dist.get_world_size(group) if group is not None else 1


def group_rank(group: ProcessGroup | None) -> int:
    return dist.get_rank(group) if group is not None else 0


@dataclass(frozen=True)
class Groups:
    """The groups this rank belongs to; None where nothing is distributed."""

    tp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    dp: ProcessGroup | None = None
    cp: ProcessGroup | None = None
    ep: ProcessGroup | None = None
    """Ranks among which the experts are shared out."""
    etp: ProcessGroup | None = None
    """Ranks among which one expert is split; as `tp` unless expert_tensor_parallel_size says otherwise."""

    @classmethod
    def from_megatron(cls) -> Groups:
        """Read Megatron-core's parallel state; a single plain process has no groups."""
        from megatron.core import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            return cls()
        return cls(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            dp=parallel_state.get_data_parallel_group(),
            cp=parallel_state.get_context_parallel_group(),
            ep=parallel_state.get_expert_model_parallel_group(),
            etp=parallel_state.get_expert_tensor_parallel_group(),
        )


def all_reduce_sum(local: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """Sum over `group`, a new tensor of the same shape and dtype, equal on every rank."""
    total = local.clone()
    if group_size(group) > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total


def all_reduce_max(local: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """Maximum over `group`, a new tensor of the same shape and dtype, equal on every rank."""
    total = local.clone()
    if group_size(group) > 1:
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    return total


def all_gather_shards(local: Tensor, *, group: ProcessGroup | None) -> list[Tensor]:
    """Every rank's equally shaped tensor, in rank order."""
    if group_size(group) == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(group_size(group))]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards


def broadcast_from(tensor: Tensor, *, source: int, group: ProcessGroup | None) -> Tensor:
    """The tensor of the rank whose index within `group` is `source`; other ranks pass a buffer of the same shape."""
    if group_size(group) > 1:
        assert group is not None
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def gather_objects(local: T, *, group: ProcessGroup | None) -> list[T]:
    """Every rank's small picklable object, in rank order; for names and sizes, never for tensors."""
    if group_size(group) == 1:
        return [local]
    everyone: list[Any] = [None] * group_size(group)
    dist.all_gather_object(everyone, local, group=group)
    return everyone


def default_store() -> Any:
    """The key-value store through which the ranks met; None where they have not."""
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


def is_rank_zero() -> bool:
    """Whether this is the process that works for all; a process alone is."""
    return not dist.is_initialized() or dist.get_rank() == 0
