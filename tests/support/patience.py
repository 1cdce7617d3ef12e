"""How long a test waits for processes: for as long as they are at work, however slowly the machine lets them.

A limit by the clock says more about what else the machine does than about what is waited for. What hangs (in a
collective whose other end is gone, at a lock, at a pipe) sleeps: its main thread takes no processor time at all. The
threads that gloo keeps beside it wake a hundred times a second and are not looked at. What turns in a circle counts as
at work; pytest's own limit, which is long, ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

QUIET_SECONDS = 180.0
AT_WORK = 0.005
"""Of one core. A main thread in a collective takes 0.000 of it, that of torchrun, which looks at its ranks ten times a
second, 0.002, and one that shares a core with a hundred others at work still 0.01."""
LOOK_SECONDS = 1.0


class Patience:
    """Watches processes and all that these started; `over` says when they have stopped working."""

    def __init__(self, processes: Iterable[int], quiet_seconds: float = QUIET_SECONDS) -> None:
        self.processes, self.quiet_seconds = list(processes), quiet_seconds
        self._then = self._used()
        self._since = self._looked = time.monotonic()

    def over(self) -> bool:
        """Whether none has been at work for `quiet_seconds`. To be asked every few seconds, or more often."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            now, self._looked = self._used(), time.monotonic()
            if any(used - self._then.get(process, 0.0) > AT_WORK * self.quiet_seconds for process, used in now.items()):
                self._then, self._since = now, self._looked
        return self._looked - self._since > self.quiet_seconds

    def _used(self) -> dict[int, float]:
        """Seconds that the main thread of each process which has not ended has had of a processor."""
        return dict(_main_threads(self.processes))


def _main_threads(processes: Iterable[int]) -> Iterator[tuple[int, float]]:
    """(process, seconds its main thread has had of a processor) of these and of all that they started."""
    seconds: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _, _, text = (folder / "task" / folder.name / "stat").read_text().rpartition(")")
        except OSError:  # it has ended since
            continue
        _, parent, *fields = text.split()  # proc(5): state, ppid; utime and stime are ten further on
        seconds[int(folder.name)] = (int(fields[9]) + int(fields[10])) / os.sysconf("SC_CLK_TCK")
        children.setdefault(int(parent), []).append(int(folder.name))
    left = list(processes)
    while left:
        process = left.pop()
        if process in seconds:
            yield process, seconds[process]
            left += children.get(process, ())


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that began a session of its own, all it started there, and their children elsewhere.

    Megatron-core's checkpoint writer keeps a process of 200 MB, which does not end because the one that started it did.
    """
    for each, _ in list(_main_threads([process.pid])):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # of a process that has ended, what it left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_patiently(
    command: Sequence[str | Path], *, quiet_seconds: float = QUIET_SECONDS, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with text and a standard output that is kept, for as long as the command is at work.

    Raises: TimeoutError: it hangs; with what it had printed. Nothing of it is left.
    """
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True} | options
    with subprocess.Popen(command, **options) as process:
        patience = Patience([process.pid], quiet_seconds)
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=LOOK_SECONDS)
                    return subprocess.CompletedProcess(command, process.returncode, out, err)
                except subprocess.TimeoutExpired as so_far:
                    if patience.over():
                        said = b"".join(each or b"" for each in (so_far.stdout, so_far.stderr)).decode(errors="replace")
                        raise TimeoutError(f"{command} did nothing for {quiet_seconds:g} s:\n{said}") from None
        finally:
            end(process)
