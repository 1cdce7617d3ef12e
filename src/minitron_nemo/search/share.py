"""One search that several processes make together: each takes what nobody works on, until all is made.

    <directory>/locks/<name>       locked by who works on it, and says which process that is

The lock is the operating system's (`fcntl.lockf`, on a shared disk too), so it ends with its process, however that
ends: another one goes on with what it left. Who joins late, joins; who never comes, is missed by nobody. What is made
is seen in files, and nothing else passes between the processes, so that one makes the same of a search as many do.

Communication: what rank 0, which holds the locks, says to all ranks.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from minitron_nemo.checks import Interrupted, Mistake
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.run_record import JOB
from minitron_nemo.stopping import told_to_stop

_SECONDS = 1.0
"""Between two looks whether another process is done."""


class Share:
    """This process's part in a search."""

    def __init__(self, directory: Path) -> None:
        self._locks = directory / "locks"

    def out(self, names: Sequence[str], *, made: Callable[[], Collection[str]], make: Callable[[str], object]) -> None:
        """Come back when all of `names` are made: here, by `make`, or by other processes. Every rank calls.

        Args:
            made: those that are there; rank 0 asks.
            make: every rank calls; afterwards its name is among those `made`.
        Raises: Interrupted: told to stop while others work.
        """
        while True:
            held: list[IO[str]] = []
            name = rank_zero_works(partial(self._take, names, made, held))
            if name is None:
                return
            try:
                make(name)
            finally:
                for file in held:
                    file.close()

    def _take(self, names: Sequence[str], made: Callable[[], Collection[str]], held: list[IO[str]]) -> str | None:
        """The first that is neither made nor worked on, locked; None: all are made."""
        said = ""
        while left := [name for name in names if name not in made()]:
            for name in left:
                file = locked(self._locks / name, wait=False)
                if file is None:
                    continue
                if name not in made():  # or it was made before it was free
                    held.append(file)
                    return name
                file.close()
            busy = [name for name in left if name not in made()]
            waiting = ", ".join(f"{name} ({_holder(self._locks / name)})" for name in busy)
            if waiting not in ("", said):
                print(f"    waiting for {waiting}", file=sys.stderr, flush=True)
                said = waiting
            if told_to_stop():
                raise Interrupted(f"Told to stop while others work on {', '.join(left)}. The same command goes on.")
            time.sleep(_SECONDS)
        return None


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """No other process is in such a block of the same file. One rank calls."""
    held = locked(file, wait=True)
    assert held is not None
    with held:
        yield


def locked(file: Path, *, wait: bool) -> IO[str] | None:
    """The file, locked for this process until it is closed; None: another process has it, and we do not wait.

    Where the file system has no locks, nobody is kept out.
    Raises: Mistake: there, as a task of a SLURM array.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    job = os.environ.get(JOB, "")
    opened = file.open("a+")
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
        opened.close()
        return None
    except OSError as error:
        if "_" in job:
            raise Mistake(
                f"{file.parent} lies on a file system without locks ({error.strerror}), so the jobs of an array cannot "
                "share a search there. Set slurm.jobs_of_search=1, or run_dir to another file system."
            ) from error
    opened.truncate(0)
    opened.write(f"{socket.gethostname()}, process {os.getpid()}{job and f', job {job}'}")
    opened.flush()
    return opened


def _holder(file: Path) -> str:
    """Who works on it."""
    return file.read_text()
