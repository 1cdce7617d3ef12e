"""Real ranks for tests: warm gloo processes on this machine, kept by world size for the whole test session.

    results = ranks("tp2").run(function, *args)        # one result a rank, in rank order

`function` is a module-level function. While it runs, torch.distributed, Megatron's parallel state and the CPU platform
are set up for the layout, the random generators are seeded, and `current_layout()` says what was asked for. Arguments
and results travel by value over pipes between our own processes. An exception is raised again in the test, caused by a
`RankFailure` that names the rank and shows its traceback; ranks that do nothing any more are shown where they hang.

A layout is written `tp2`, `pp2`, `dp2`, `cp2`, `tp2-sp`, `tp2-pp2`, ... or `single`; sizes not named are 1. `dp2-ep2`
spreads experts over the data-parallel ranks, `tp2-sp-ep2-etp1` over the tensor-parallel ones; an expert is split as
`tp` says, unless `etp` says otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.patience import LOOK_SECONDS, QUIET_SECONDS, Patience, end

TESTS = Path(__file__).resolve().parents[1]
SOURCES = TESTS.parent / "src"
SAYS_WHERE_SECONDS = 30.0  # an upper bound: a signal's handler is run at once wherever a process gets to run at all
ALWAYS = timedelta(days=1)  # what hangs is quiet, which is noticed before and says more
GRACE_SECONDS = 5.0  # of quiet, after which nobody waits for the others once a rank has failed: they may wait for it


class RankFailure(RuntimeError):
    """What went wrong on which rank of which layout, with that rank's traceback or log."""


@dataclass(frozen=True)
class Layout:
    """How ranks are divided. `sequence_parallel` changes no group: test functions pass it to their configs."""

    name: str = "single"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @classmethod
    def parse(cls, name: str) -> Layout:
        sizes: dict[str, Any] = {}
        for part in name.split("-") if name != "single" else ():
            match = re.fullmatch(r"(tp|pp|cp|dp|ep|etp)([1-9]\d*)", part)
            if match:
                sizes[match[1]] = int(match[2])
            elif part == "sp":
                sizes["sequence_parallel"] = True
            else:
                raise ValueError(
                    f"layout {name!r}: {part!r} is none of tpN, ppN, cpN, dpN, epN, etpN, sp; write e.g. tp2-sp."
                )
        return cls(name=name, **sizes)


_current_layout: Layout | None = None


def current_layout() -> Layout:
    """The layout this rank was started for; a plain process (the test itself) is `single`."""
    return _current_layout or Layout()


# ---- the test's side -------------------------------------------------------------------------------------------------


class Ranks:
    """The `ranks` fixture: call it with a layout, then `.run` a function there."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def __call__(self, layout: str, *, quiet_seconds: float = QUIET_SECONDS, seed: int = 1234) -> BoundRanks:
        return BoundRanks(self, Layout.parse(layout), quiet_seconds, seed)

    def pool(self, world_size: int) -> _Pool:
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = _Pool(world_size)
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            pool.stop()
        self._pools.clear()


@dataclass(frozen=True)
class BoundRanks:
    """Ranks in one layout."""

    ranks: Ranks
    layout: Layout
    quiet_seconds: float
    seed: int

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` on every rank at once; the results in rank order.

        Raises: what the first failing rank raised, caused by RankFailure; RankFailure where a rank died or hung.
        """
        module = sys.modules[function.__module__]
        job = _Job(
            layout=self.layout,
            seed=self.seed,
            search_path=[entry for entry in sys.path if entry],
            module=function.__module__,
            file=getattr(module, "__file__", None),
            function=function.__qualname__,
        )
        if "<" in job.function:
            raise ValueError(f"{job.function} cannot be found by another process; make it a module-level function.")
        return self.ranks.pool(self.layout.world_size).run(job, pack((args, kwargs)), self.quiet_seconds)


@dataclass(frozen=True)
class _Job:
    layout: Layout
    seed: int
    search_path: list[str]
    module: str
    file: str | None
    function: str
    number: int = 0


@dataclass(frozen=True)
class _Answer:
    """A result; or an exception (None where it cannot travel), its traceback, and when it was raised."""

    value: Any
    trace: str = ""
    ended: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.trace)


class _Pool:
    """`world_size` worker processes and the store they meet at."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.alive = True
        self._jobs = 0
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._logs = [tempfile.NamedTemporaryFile(prefix=f"rank{rank}-") for rank in range(world_size)]  # noqa: SIM115
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = Pipe()
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(SOURCES), str(TESTS), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
            }
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", f"from support.ranks import serve; serve({theirs.fileno()})"],
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=self._logs[rank],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
            theirs.close()
            self._pipes.append(ours)

    def run(self, job: _Job, arguments: bytes, quiet_seconds: float) -> list[Any]:
        self._jobs += 1
        job = _Job(**(job.__dict__ | {"number": self._jobs}))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(pickle.dumps(job))
                pipe.send_bytes(arguments)
            except OSError:
                self._fail(f"rank {rank} of {job.layout.name} had died before the call", [rank])
        at_work = [process.pid for process in self._processes]
        patience = Patience(at_work, quiet_seconds)
        answers: dict[int, _Answer] = {}
        while len(answers) < self.world_size and not patience.over():
            waiting = {self._pipes[rank]: rank for rank in range(self.world_size) if rank not in answers}
            for pipe in wait(list(waiting), LOOK_SECONDS):
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._fail(f"rank {rank} of {job.layout.name} died in {job.function}", [rank])
                if answers[rank].failed:
                    patience = Patience(at_work, min(quiet_seconds, GRACE_SECONDS))
        # what failed first is the cause; its end of a connection closes, which then fails the others
        failed = sorted((rank for rank in answers if answers[rank].failed), key=lambda rank: answers[rank].ended)
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        if failed:
            if missing:
                self.stop()
            error = answers[failed[0]].value
            cause = RankFailure(
                f"rank {failed[0]} of {job.layout.name} failed in {job.function}:\n{answers[failed[0]].trace}"
            )
            raise (error if error is not None else cause) from (cause if error is not None else None)
        if missing:
            hung = f"rank {missing} of {job.layout.name} did nothing for {quiet_seconds:g} s in {job.function}"
            self._fail(hung, missing)
        return [answers[rank].value for rank in range(self.world_size)]

    def _fail(self, message: str, ranks: list[int]) -> None:
        asked = [rank for rank in ranks if self._processes[rank].poll() is None]
        for rank in asked:
            self._processes[rank].send_signal(signal.SIGUSR2)  # faulthandler writes where it stands to the log
        until = time.monotonic() + SAYS_WHERE_SECONDS
        while time.monotonic() < until and not all("most recent call first" in self._tail(rank) for rank in asked):
            time.sleep(0.1)
        time.sleep(0.5)  # to the last line of it
        logs = "".join(f"\n---- log of rank {rank}, end ----\n{self._tail(rank)}" for rank in ranks)
        self.stop()
        raise RankFailure(message + logs)

    def _tail(self, rank: int, characters: int = 6000) -> str:
        return Path(self._logs[rank].name).read_text(errors="replace")[-characters:]

    def stop(self) -> None:
        self.alive = False
        for process in self._processes:
            end(process)  # nothing of theirs outlives the test session
        for pipe in self._pipes:
            pipe.close()
        for log in self._logs:
            log.close()


# ---- by value over the pipe ------------------------------------------------------------------------------------------


class _ByValue(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            # a view would bring its whole storage along, and a gradient history cannot travel
            return value.detach().cpu().clone().__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return NotImplemented


def pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    _ByValue(buffer).dump(value)
    return buffer.getvalue()


# ---- the rank's side -------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Run jobs from the pipe until the test session closes it."""
    import faulthandler

    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
    from minitron_nemo import platform

    platform.activate()
    pipe = Connection(descriptor)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    while True:
        try:
            job: _Job = pickle.loads(pipe.recv_bytes())
            arguments = pipe.recv_bytes()
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # the session is over, however it ended; what was started here goes too
        failed = False
        try:
            _set_up(job, rank, world_size, store)
            args, kwargs = _unpack_beside(job, arguments)
            function = sys.modules[job.module]
            for name in job.function.split("."):
                function = getattr(function, name)
            answer = pack(_Answer(function(*args, **kwargs)))  # type: ignore[operator]
        except BaseException as error:
            failed, ended, trace = True, time.monotonic(), traceback.format_exc()
            try:
                answer = pack(_Answer(error, trace, ended))
                pickle.loads(answer)
            except Exception:  # an exception with its own constructor may not survive the way
                answer = pack(_Answer(None, trace, ended))
        with contextlib.suppress(OSError):  # nobody hears: the next job says so
            pipe.send_bytes(answer)
        _leave_together(dist.PrefixStore(f"job{job.number}", store), rank, world_size, failed)
        _tear_down()


def _set_up(job: _Job, rank: int, world_size: int, store: dist.Store) -> None:
    global _current_layout
    from megatron.core import parallel_state, tensor_parallel

    layout = job.layout
    _current_layout = layout
    # A fresh default group each time: whatever the last function left in flight cannot meet this one's messages.
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"job{job.number}", store),
        rank=rank,
        world_size=world_size,
        timeout=ALWAYS,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    random.seed(job.seed)
    torch.manual_seed(job.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(job.seed)


def _leave_together(store: dist.Store, rank: int, world_size: int, failed: bool) -> None:
    """Keep this rank's ends of all connections until every rank is done with its function. Gloo says on one side that a
    group is connected while the other still shakes hands, which fails where the first has closed meanwhile. A rank that
    failed does not wait: what it closes lets go those that wait for it."""
    store.set(f"done{rank}", "")
    if not failed:
        store.wait([f"done{other}" for other in range(world_size)], ALWAYS)


def _tear_down() -> None:
    global _current_layout
    from megatron.core import num_microbatches_calculator, parallel_state

    num_microbatches_calculator.destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a gloo group that a cycle keeps alive keeps its threads, and they wake a hundred times a second
    _current_layout = None


def _unpack_beside(job: _Job, arguments: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, once the module of the function is loaded under the name the test runner gave it."""
    sys.path.extend(entry for entry in job.search_path if entry not in sys.path)
    if not _is_loaded(job):
        with contextlib.suppress(ModuleNotFoundError):  # a test runner may name modules in a way that the path does not
            importlib.import_module(job.module)
    if not _is_loaded(job):
        assert job.file is not None
        spec = importlib.util.spec_from_file_location(job.module, job.file)
        assert spec is not None and spec.loader is not None
        sys.modules[job.module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[job.module])
    return pickle.loads(arguments)


def _is_loaded(job: _Job) -> bool:
    """Whether the very file is there: two folders of tests may hold modules of one name."""
    module = sys.modules.get(job.module)
    return module is not None and getattr(module, "__file__", None) == job.file
