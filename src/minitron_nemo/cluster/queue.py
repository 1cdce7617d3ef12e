"""What SLURM says of jobs: squeue, and of those that it has forgotten sacct, where there is accounting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_SECONDS = 20.0  # a controller that is down is asked again for minutes
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
FAILED = {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}
COMPLETED, CANCELLED = "COMPLETED", "CANCELLED"


@dataclass(frozen=True)
class Task:
    """A job as SLURM knows it; of an array one task, or those that have not begun, together."""

    job_id: int
    """Of the whole array."""
    name: str
    """As scancel takes it: `123`, `123_4` or `123_[5-7]`."""
    log_id: str
    """What %j is in the name of its log."""
    state: str
    """In SLURM's long words."""
    reason: str
    """Why it waits or failed, in SLURM's words, or its nodes."""

    @property
    def unfinished(self) -> bool:
        """Waiting, running, or in a state that we do not know."""
        return self.state not in FAILED | {COMPLETED, CANCELLED}

    @property
    def words(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else self.state


def ask(job_ids: Sequence[int]) -> dict[int, list[Task]] | None:
    """By job id its tasks, those alone that SLURM knows; None: it cannot be asked here, or does not answer."""
    if not job_ids:
        return {}
    listed = ",".join(map(str, job_ids))
    said = _output(
        "squeue", "--noheader", "--states=all", f"--jobs={listed}", "--format=%i|%F|%A|%T|%r|%N", fine="Invalid job id"
    )
    if said is None:
        return None
    found = _group([_of_squeue(line) for line in said.splitlines()])
    if forgotten := [job_id for job_id in job_ids if job_id not in found]:
        listed = ",".join(map(str, forgotten))
        columns = "--format=JobID,JobIDRaw,State,ExitCode,NodeList"
        said = _output("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={listed}", columns)
        found |= _group([_of_sacct(line) for line in (said or "").splitlines()])
    return found


def cancel(names: Sequence[str]) -> str | None:
    """Cancel jobs or tasks of arrays; what SLURM objects, in its words, or None."""
    try:
        done = subprocess.run(["scancel", *names], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else " ".join(done.stderr.split())


def _of_squeue(line: str) -> Task | None:
    parts = line.strip().split("|")
    if len(parts) != 6 or not parts[1].isdigit():
        return None
    name, job_id, log_id, state, reason, nodes = parts
    why = reason if reason not in ("None", "") else nodes
    return Task(int(job_id), name, log_id, state, why if state != COMPLETED else "")


def _of_sacct(line: str) -> Task | None:
    parts = line.strip().split("|")
    job = re.match(r"\d+", parts[0])
    if len(parts) != 5 or job is None:
        return None
    state = (parts[2].split() or [""])[0].rstrip("+")  # "CANCELLED by 1000"
    reason = f"exit code {parts[3]}" if state in FAILED else parts[4] if state not in (COMPLETED, CANCELLED) else ""
    return Task(int(job[0]), parts[0], parts[1], state, reason)


def _group(tasks: Sequence[Task | None]) -> dict[int, list[Task]]:
    found: dict[int, list[Task]] = {}
    for task in tasks:
        if task is not None:
            found.setdefault(task.job_id, []).append(task)
    return found


def _output(*command: str, fine: str = "") -> str | None:
    """What a command prints; None where it is not there, fails otherwise than with words that are `fine`, or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 or (fine and fine in done.stderr) else None
