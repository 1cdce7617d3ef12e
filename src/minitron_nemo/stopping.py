"""Told to stop? What every loop that takes long asks after a micro-batch, and all ranks hear the same answer.

    SIGTERM or SIGUSR1 to any rank                while a door is open (`listening`); one 10 s later ends it as ever,
                                                  but not while it saves, nor what writes for it (`only_this_process`)
    the file that $MINITRON_STOP_FILE names       signals do not reach ranks on other nodes, or reach torchrun first,
                                                  which gives its ranks 30 seconds; a file on a shared disk does

    stop = Stop()
    for batch in batches:
        ...
        if stop.asked():           # on every rank, equally often
            ... keep what has been done
            raise Interrupted(...)

The doors make exit code 75 of `Interrupted`, and a SLURM job that ends so queues itself again (slurm/stage.sbatch). A
loop asks when something is done, so that a run that is stopped always, gets on all the same.

Communication: all ranks, a maximum of two numbers, about once a second: of the micro-batches between two questions rank
0 says how many there are, from how long the last ones took.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

import torch

from minitron_nemo import platform
from minitron_nemo.parallel import all_reduce_max, is_rank_zero, world, world_size

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "MINITRON_STOP_FILE"
"""Environment variable that names a file; when it appears, the run stops as after a signal."""
_SECONDS_BETWEEN = 1.0
_ONE_TELLING = 10.0  # seconds: a launcher and a job's own script may both send a signal, and each more than once


class _Ear:
    """Whether this process was sent a signal, and who hears it."""

    listening = False
    heard = False
    since = 0.0
    """When it was, of `time.monotonic`."""


@contextmanager
def listening() -> Iterator[None]:
    """Take the stop signals for a question to be answered; the handlers of before come back at the end."""
    if _Ear.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}

    def hear(number: int, frame: FrameType | None) -> None:
        again = _Ear.heard and time.monotonic() - _Ear.since > _ONE_TELLING
        if again or os.getpid() != process:  # or a process that was forked from this one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not _Ear.heard:
            _Ear.heard, _Ear.since = True, time.monotonic()

    _Ear.listening, _Ear.heard = True, False
    for each in STOP_SIGNALS:
        signal.signal(each, hear)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)
        _Ear.listening = _Ear.heard = False


@contextmanager
def only_this_process() -> Iterator[None]:
    """Processes that this thread starts in here never hear a stop signal; this one does, behind it at the latest.

    Around a save: SLURM, torchrun and a node that goes down send their signal to all processes of a job, and
    Megatron-core (0.15.3, 0.16.0) writes a checkpoint by some of its own and waits for ever for one that is gone.
    """
    resource_tracker.ensure_running()  # when it starts, it lets SIGTERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def told_to_stop() -> bool:
    """Whether this process was sent a signal; on rank 0 also whether the file is there."""
    file = os.environ.get(STOP_FILE)
    return _Ear.heard or (is_rank_zero() and file is not None and Path(file).exists())


class Stop:
    """The questions of one loop, in which all ranks take part."""

    def __init__(self) -> None:
        self._alone = world_size() == 1
        self._left = self._every = 1
        self._since = time.monotonic()

    def asked(self) -> bool:
        """Whether any rank was told to stop, as far as it is known; the same on every rank.

        Communicates: now and then, see the module's text.
        """
        if self._alone and _Ear.heard:
            return True
        self._left -= 1
        if self._left > 0:
            return False
        now = time.monotonic()
        at_this_pace = int(self._every * _SECONDS_BETWEEN / max(now - self._since, 1e-9))
        told, every = told_to_stop(), max(1, min(at_this_pace, 2 * self._every))
        if not self._alone:
            told, every = _agree(told, every if is_rank_zero() else 0)
        self._left = self._every = every
        self._since = now
        return told


def _agree(told: bool, every: int) -> tuple[bool, int]:
    """Whether any rank was told, and the number of the one that gives one. Communicates: all ranks."""
    local = torch.tensor([int(told), every], device=platform.device())
    asked, number = all_reduce_max(local, group=world()).tolist()
    return bool(asked), number
