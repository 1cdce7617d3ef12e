"""What all ranks of a run do together: rank 0's work, its word, and agreement."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minitron_nemo.parallel import Groups, agree, barrier, rank, rank_zero_says, rank_zero_works, told_by, world_size
from support.ranks import SOURCES, Ranks


def work_and_leave_a_trace(directory: Path) -> list[str]:
    def work() -> str:
        (directory / f"by-{rank()}").touch()
        return f"done by rank {rank()}"

    return [rank_zero_works(work) for _ in range(3)]


def test_rank_zero_works_alone_and_every_rank_has_what_came_of_it(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks("dp4").run(work_and_leave_a_trace, tmp_path)
    assert found == [["done by rank 0"] * 3] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["by-0"]


def fail_and_go_on() -> tuple[str, str, int]:
    def missing() -> None:
        raise FileNotFoundError("prune.plan=nowhere does not exist.")

    class OfTwo(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} and {two}")

    def odd() -> None:
        raise OfTwo("this", "that")

    said = []
    for work in (missing, odd):
        with pytest.raises((FileNotFoundError, OfTwo, RuntimeError)) as error:
            rank_zero_works(work)
        said.append(f"{error.type.__name__}: {error.value}")
    return said[0], said[1], rank_zero_works(lambda: 7)


def test_an_error_in_rank_zeros_work_is_raised_on_every_rank(ranks: Ranks) -> None:
    first, *others = ranks("dp2").run(fail_and_go_on)
    missing = "FileNotFoundError: prune.plan=nowhere does not exist."
    assert first == (missing, "OfTwo: this and that", 7)
    assert others == [(missing, "RuntimeError: OfTwo on rank 0: this and that", 7)]


def work_longer_than_a_collective_waits(limit: float) -> float:
    """In a process group whose collectives wait `limit` seconds; how long this rank waited for twice as much work."""
    store, own, size = dist.distributed_c10d._get_default_store(), rank(), world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("short", store),
        rank=own,
        world_size=size,
        timeout=timedelta(seconds=limit),
    )
    barrier()
    began = time.monotonic()
    rank_zero_works(lambda: time.sleep(2 * limit))
    return time.monotonic() - began


def test_rank_zeros_work_may_take_longer_than_a_collective_waits(ranks: Ranks) -> None:
    assert all(seconds >= 6 for seconds in ranks("dp2").run(work_longer_than_a_collective_waits, 3.0))


def alone_at_work() -> tuple[int, int, int, str]:
    """Threads before, within and after rank 0's work, and what habits of all ranks come to within it."""

    def work() -> tuple[int, str]:
        barrier()
        inner = rank_zero_works(lambda: rank_zero_says(f"{world_size()} of {dist.get_world_size()}"))
        return torch.get_num_threads(), inner

    before = torch.get_num_threads()
    within, inner = rank_zero_works(work)
    return before, within, torch.get_num_threads(), inner


def test_rank_zero_at_work_is_a_run_of_one_rank_with_the_threads_of_those_that_wait(ranks: Ranks) -> None:
    threads = min(2, len(os.sched_getaffinity(0)))
    assert ranks("dp2").run(alone_at_work) == [(1, threads, 1, "1 of 2")] * 2


def hear_and_agree() -> tuple[str, torch.Tensor]:
    return rank_zero_says(f"rank {rank()}"), agree(torch.tensor([rank(), 1.0 + rank()]))


def test_all_ranks_hear_rank_zero_and_agree_on_its_numbers(ranks: Ranks) -> None:
    for said, agreed in ranks("tp2-dp2").run(hear_and_agree):
        assert said == "rank 0"
        assert agreed.tolist() == [0.0, 1.0]


ALONE = """
from minitron_nemo.parallel import *
assert (rank(), world_size(), is_rank_zero(), world()) == (0, 1, True, None)
barrier()
print(rank_zero_says("said"), rank_zero_works(lambda: "worked"), agree(torch.ones(1)).item())
"""


def hear_one_after_the_other() -> list[str]:
    pp = Groups.from_megatron().pp
    return [told_by(f"rank {rank()}, {time}", source=source, group=pp) for time in range(2) for source in range(2)]


def test_each_rank_of_a_group_tells_the_others_in_its_turn(ranks: Ranks) -> None:
    first, second, third, fourth = ranks("pp2-dp2").run(hear_one_after_the_other)
    assert first == third == ["rank 0, 0", "rank 2, 0", "rank 0, 1", "rank 2, 1"]  # stages are furthest apart
    assert second == fourth == ["rank 1, 0", "rank 3, 0", "rank 1, 1", "rank 3, 1"]


def test_a_plain_process_is_a_run_of_one_rank() -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "said worked 1.0\n"
