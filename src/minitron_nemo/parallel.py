"""The process groups we talk over, and the collectives, named by what they do.

Every function takes its group; a group of None or of one rank goes through the same code and returns its input's value.
Collectives are differentiable nowhere: they carry statistics, weights and losses, not activations.

Habits of all ranks of a run, which need no group; a plain process counts as a run of one rank:

    rank_zero_works     long work on one rank while the others wait, however long
    by_rank_zero        a function that is always such work
    rank_zero_says      what one rank saw, on a disk that others may see later
    agree               a choice that follows from numbers, which processors may round differently
    barrier             all have come here
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

P = ParamSpec("P")
T = TypeVar("T")


# ---- all ranks of the run --------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks of the run; 1 for rank 0 while it works for all (`rank_zero_works`)."""
    return dist.get_world_size() if dist.is_initialized() and not _at_work_for_all else 1


def ranks_per_node() -> int:
    """Equal on every node; torchrun says how many it started on this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def local_rank() -> int:
    """Among those of this node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_rank_zero() -> bool:
    """Whether this is the process that works for all; a process alone is."""
    return rank() == 0


def default_store() -> dist.Store | None:
    """The key-value store through which the ranks met; None where they have not."""
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether an error is what remains where another rank was killed, or the network broke: nothing this one did."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def world() -> ProcessGroup | None:
    """The group of all ranks."""
    return dist.group.WORLD if dist.is_initialized() and not _at_work_for_all else None


def barrier() -> None:
    """Go on when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def rank_zero_says(value: T) -> T:
    """Rank 0's small picklable value, on every rank; others pass what they like. Communicates: all ranks."""
    if world_size() == 1:
        return value
    said: list[Any] = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def agree(value: Tensor) -> Tensor:
    """Rank 0's tensor on every rank, where all have one of this shape and dtype on their device.

    For choices that follow from numbers: of nearly equal ones another processor may choose others.
    Communicates: all ranks.
    """
    return broadcast_from(value, source=0, group=world())


def rank_zero_works(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, the only one that does it; a small picklable value.

    The others ask the run's store now and then whether it is done, so that no time-out of a process group ends work
    that takes long. Those on its node idle, and their threads are `work`'s. Within `work` rank 0 is a run of one rank:
    what all ranks do elsewhere, it does alone there.
    Communicates: all ranks, once it is done.
    Raises: on every rank, what `work` raises on rank 0; a RuntimeError with its text elsewhere where it cannot travel.
    """
    if world_size() == 1:
        return work()
    store = default_store()
    assert store is not None
    turn = store.add(f"{_WORK}/{rank()}", 1)  # every rank counts for itself, and all come to the same number
    done = f"{_WORK}/done/{turn}"
    result: T | None = None
    error: BaseException | None = None
    if is_rank_zero():
        try:
            with _for_all():
                result = work()
        except BaseException as raised:  # whatever ended it, the others must not wait for ever
            error = raised
        store.set(done, "")
    else:
        _wait_for(store, done)
    result, travelled = rank_zero_says((result, _that_travels(error)))
    if error is not None or travelled is not None:
        raise error or travelled  # type: ignore[misc]
    return result  # type: ignore[return-value]


def rank_zero_leads(lead: Callable[[Callable[[Any], Any]], T], take_part: Callable[[Any], Any]) -> T:
    """What `lead(together)` returns on rank 0, which alone runs it; a small picklable value, on every rank.

    Each `together(task)` within runs `take_part(task)` on every rank and returns what it returned on rank 0; `task` is
    picklable. Between two of them the others ask the run's store now and then, as in `rank_zero_works`. But for
    `together`, what all ranks do must not be done within `lead`.
    Communicates: all ranks, at every task and at the end.
    Raises: on every rank, what `lead` raises on rank 0, or `take_part` on every rank.
    """
    if world_size() == 1:
        return lead(take_part)
    store = default_store()
    assert store is not None
    turn = store.add(f"{_WORK}/{rank()}", 1)
    calls, taking_part = 0, False

    def say(more: bool, said: Any) -> tuple[bool, Any]:
        nonlocal calls
        calls += 1
        key = f"{_WORK}/led/{turn}/{calls}"
        if is_rank_zero():
            store.set(key, "")
        else:
            _wait_for(store, key)
        return rank_zero_says((more, said))

    def together(task: Any) -> Any:
        nonlocal taking_part
        say(True, task)
        taking_part = True
        found = take_part(task)
        taking_part = False
        return found

    if not is_rank_zero():
        more, said = say(True, None)
        while more:
            take_part(said)
            more, said = say(True, None)
        result, error = said
    else:
        result, error = None, None
        try:
            result = lead(together)
        except BaseException as raised:  # whatever ended it, the others must not wait for ever
            if taking_part:
                raise  # so do they
            error = raised
        say(False, (result, _that_travels(error)))
    if error is not None:
        raise error
    return result


def by_rank_zero(work: Callable[P, T]) -> Callable[P, T]:
    """A function that rank 0 does for all, as `rank_zero_works`. Every rank calls."""

    @functools.wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> T:
        return rank_zero_works(functools.partial(work, *args, **kwargs))

    return done


@contextmanager
def _for_all() -> Iterator[None]:
    global _at_work_for_all
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, min(len(os.sched_getaffinity(0)), threads * ranks_per_node())))
    _at_work_for_all = True
    try:
        yield
    finally:
        _at_work_for_all = False
        torch.set_num_threads(threads)


@contextmanager
def undistributed() -> Iterator[None]:
    """Libraries that ask hear that torch.distributed has not begun; for rank 0's work in one that has barriers."""
    initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = initialized


def told_by(value: T, *, source: int, group: ProcessGroup | None) -> T:
    """The small picklable value of the rank whose index within `group` is `source`, on every rank of it.

    The others ask the run's store now and then whether it has come here, so that no time-out of a process group ends
    work that takes long.
    Communicates: group, once it is there.
    """
    store = default_store()
    if group_size(group) == 1 or store is None:
        return value
    assert group is not None
    teller = dist.get_global_rank(group, source)
    turn = store.add(f"{_WORK}/heard/{teller}/{rank()}", 1)  # every rank counts, and all come to the same number
    told = f"{_WORK}/told/{teller}/{turn}"
    if rank() == teller:
        store.set(told, "")
    else:
        _wait_for(store, told)
    return gather_objects(value, group=group)[source]


_at_work_for_all = False
_WORK = "minitron_nemo/work"
_LONGEST_PAUSE = 1.0  # seconds between two questions to the store


def _wait_for(store: dist.Store, key: str) -> None:
    """By asking: `store.wait` has a time-out, and keeps the process's other threads from the store."""
    pause = 0.001
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _that_travels(error: BaseException | None) -> BaseException | None:
    """The error if it can be made anew from its arguments, as unpickling does; else one that says the same."""
    if error is None:
        return None
    try:
        pickle.dumps(copy.copy(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} on rank 0: {error}")
    return error


# ---- groups ----------------------------------------------------------------------------------------------------------


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


def send_to(tensor: Tensor, *, to: int, group: ProcessGroup) -> Work:
    """Begin to send to the rank whose index within `group` is `to`; the tensor must last until the work is waited for.

    The other rank calls `receive_from`.
    """
    work = dist.isend(tensor, dist.get_global_rank(group, to), group=group)
    assert work is not None
    return work


def receive_from(buffer: Tensor, *, source: int, group: ProcessGroup) -> Tensor:
    """The buffer, filled with what the rank whose index within `group` is `source` sends."""
    dist.recv(buffer, dist.get_global_rank(group, source), group=group)
    return buffer


def exchange(mine: Sequence[Tensor], theirs: Sequence[Tensor], *, to: int, source: int, group: ProcessGroup) -> None:
    """Send tensors to one rank of `group` and fill buffers from another; each is called so on its side."""
    transfers = [dist.P2POp(dist.isend, each.contiguous(), dist.get_global_rank(group, to), group) for each in mine]
    transfers += [dist.P2POp(dist.irecv, each, dist.get_global_rank(group, source), group) for each in theirs]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()


def gather_objects(local: T, *, group: ProcessGroup | None) -> list[T]:
    """Every rank's small picklable object, in rank order; for names and sizes, never for tensors."""
    if group_size(group) == 1:
        return [local]
    everyone: list[Any] = [None] * group_size(group)
    dist.all_gather_object(everyone, local, group=group)
    return everyone
