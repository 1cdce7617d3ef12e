"""cancel: end the run in a directory, and say what was done, job by job.

Of a submission, SLURM cancels every job that waits or runs (scancel). A run in a shell on this machine is sent SIGTERM:
it keeps what it has done, as far as its stage can, and ends with exit code 75; the same command goes on there. A signal
that comes 10 seconds after the first ends it at once, if no checkpoint is being written. Of one on another machine,
this says where to ask for it.

Exit code 0: done, or there was nothing to cancel; 1: not all of it could be; 2: there is no run there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from minitron_nemo import status
from minitron_nemo.cluster import queue
from minitron_nemo.run_record import Record


def run(run_dir: Path) -> int:
    """Cancel what goes on and print it. Returns: the exit code. Raises: NothingThere: no run there."""
    seen = status.look(run_dir)
    done = [*_jobs(seen), *_processes(seen)]
    for _, words in done:
        print(words)
    if not done:
        print(f"{run_dir}: nothing of it runs or waits, so there is nothing to cancel.")
    return int(not all(well for well, _ in done))


def _jobs(seen: status.RunSeen) -> Iterator[tuple[bool, str]]:
    """Whether it went well, and in words, for each job that SLURM has not ended."""
    jobs = [(step.step.name, step.job) for step in seen.steps if step.job is not None]
    if not seen.slurm_answers:
        ids = " ".join(str(job.job_id) for _, job in jobs)
        yield False, f"SLURM cannot be asked here (squeue). On a machine where it can: scancel {ids}"
        return
    alive = [(name, task) for name, job in jobs for task in job.tasks if task.unfinished]
    if not alive:
        return
    # the last first: one that waits for another is not told that this was cancelled
    problem = queue.cancel([task.name for _, task in reversed(alive)])
    for name, task in alive:
        ended = "cancelled" if problem is None else f"could not be cancelled ({problem})"
        yield problem is None, f"job {task.name}: {name}, {task.words}: {ended}"


def _processes(seen: status.RunSeen) -> Iterator[tuple[bool, str]]:
    """The same for each process that SLURM did not start for this submission."""
    for step in seen.steps:
        for record in step.records:
            if (step.job is not None and record.job is not None) or record.runs() is False:
                continue
            if step.state == status.RUNNING:
                yield _end(step.step.name, record, seen.run_dir)


def _end(name: str, record: Record, run_dir: Path) -> tuple[bool, str]:
    process = f"process {record.pid} on {record.host}: {name}"
    if record.runs() is None:
        job = f", or anywhere: scancel {record.job}" if record.job else ""
        return False, f"{process}, which cannot be ended from here. Run there: minitron cancel {run_dir}{job}"
    try:
        os.kill(record.pid, signal.SIGTERM)
    except ProcessLookupError:
        return True, f"{process} has ended"
    except PermissionError:
        return False, f"{process} belongs to another user, who alone may end it."
    return True, f"{process}, told to stop; it keeps what it can and ends with exit code 75"
