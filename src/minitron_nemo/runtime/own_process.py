"""Work in a process that is a run of one rank, whatever run starts it.

For what asks torch.distributed itself how many ranks there are, as Megatron-core does when it saves: `rank_zero_works`
makes a rank alone for this package only. The process is started anew (`spawn`), so that it joins no group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

from minitron_nemo.quiet import hush

T = TypeVar("T")

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def in_own_process(work: Callable[..., T], *arguments: object) -> T:
    """What a module's function returns there; picklable, as its arguments. Raises: what it raises."""
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (torch.get_num_threads(),)) as process:
        return process.submit(work, *arguments).result()


def _begin(threads: int) -> None:
    for name in _OF_A_LAUNCHER:
        os.environ.pop(name, None)
    hush()
    torch.set_num_threads(threads)
