"""A real SLURM on one node, this one, for as long as a test needs it.

munged, slurmctld and slurmd run on loopback as root, with their files in one temporary directory and on free ports, so
that nothing of a SLURM the machine may already have is touched. No accounting, no cgroups, no task plugin: what is left
is what runs inside a plain container.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
_STILL_SECONDS = 300.0  # in which a job that may start does so, however busy the machine

_SLURM_CONF = """\
ClusterName=minitron-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
FirstJobId={first_job_id}
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# config_overrides: the node has 8 CPUs because we say so, room for jobs side by side, so that only the dependency can
# be what keeps them in order. MinJobAge: finished jobs stay in squeue, which is where their states are read, as there
# is no accounting. cred_expire: a job that is queued again waits until its old credential is worth nothing, 2 minutes
# by default. FirstJobId: two clusters on one machine, each of a process of the suite, have jobs of other numbers, by
# which their ranks meet (slurm/stage.sbatch).


def why_no_slurm() -> str | None:
    """Why a SLURM cannot be started here, or None where it can."""
    if os.geteuid() != 0:
        return "starting munged, slurmctld and slurmd needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(missing)} not found; install them (Debian: slurm-wlm, munge)" if missing else None


class SingleNodeSlurm:
    """The running cluster, as its user sees it: sbatch and the other commands find it through SLURM_CONF."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def wait_for_jobs(self, ids: Sequence[int]) -> dict[int, str]:
        """Final state of each job: COMPLETED, FAILED, CANCELLED, ...; an array's is COMPLETED when all its tasks' are.
        One that runs has the time its script asks for.

        Raises: TimeoutError: none runs or has changed its state for long; the states and the daemons' logs are shown.
        """
        seen: dict[int, str] = {}
        while True:
            states = self.states(ids)
            if set(states) == set(ids) and all(state in ENDED for state in states.values()):
                return states
            if states != seen or "RUNNING" in states.values():
                seen, since = states, time.monotonic()
            if time.monotonic() - since > _STILL_SECONDS:
                raise TimeoutError(f"for {_STILL_SECONDS} s the jobs have been {states}\n{self.logs()}")
            time.sleep(0.5)

    def states(self, ids: Sequence[int]) -> dict[int, str]:
        listed = ",".join(str(job_id) for job_id in ids)
        lines = _output("squeue", "--noheader", "--states=all", f"--jobs={listed}", "--format=%F %T").splitlines()
        found: dict[int, str] = {}
        for job_id, state in (line.split() for line in lines):
            if found.get(int(job_id), "COMPLETED") == "COMPLETED":  # of an array's tasks, the first that has not
                found[int(job_id)] = state
        return found

    def logs(self) -> str:
        """The end of each daemon's log."""
        ends = []
        for log in sorted(self.home.glob("*.log")):
            ends.append("\n".join([f"-- {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]))
        return "\n".join(ends)


@contextmanager
def single_node_slurm() -> Iterator[SingleNodeSlurm]:
    """Start the three daemons, wait until the node is idle, stop them at the end with all their jobs."""
    with ExitStack() as stack:
        # Short, as a Unix socket's path may not be longer than 107 bytes.
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        cluster = SingleNodeSlurm(home)
        _configure(home)
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            environment.delenv(name)  # the suite may itself run in a SLURM job
        environment.setenv("SLURM_CONF", str(home / "slurm.conf"))
        munge = [f"--{key}={home}/munge.{key.split('-')[0]}" for key in ("key-file", "socket", "seed-file")]
        stack.enter_context(_daemon(home, "munged", "--foreground", "--force", *munge, f"--pid-file={home}/munged.pid"))
        _wait_until(lambda: (home / "munge.socket").exists(), "munged has no socket", cluster)
        stack.enter_context(_daemon(home, "slurmctld", "-D"))
        stack.enter_context(_daemon(home, "slurmd", "-D"))
        _wait_until(lambda: _output("sinfo", "--noheader", "--format=%T").strip() == "idle", "node not idle", cluster)
        try:
            yield cluster
        finally:
            _cancel_all_jobs()


def _configure(home: Path) -> None:
    home.chmod(0o755)
    for folder in ("state", "spool"):
        (home / folder).mkdir()
    key = home / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = {"slurmctld_port": first.getsockname()[1], "slurmd_port": second.getsockname()[1]}
    host = socket.gethostname().split(".")[0]
    values = {"home": home, "host": host, "first_job_id": 1 + 100 * (os.getpid() % 199), **ports}
    (home / "slurm.conf").write_text(_SLURM_CONF.format_map(values))
    (home / "cgroup.conf").touch()  # else the machine's own would be read


@contextmanager
def _daemon(home: Path, *command: str) -> Iterator[None]:
    with open(home / f"{command[0]}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cancel_all_jobs() -> None:
    """Leave no step of a failed test behind: a stopped slurmd does not take its jobs along."""
    end = time.monotonic() + 20
    while (left := _output("squeue", "--noheader", "--format=%i").split()) and time.monotonic() < end:
        subprocess.run(["scancel", *left], capture_output=True)
        time.sleep(0.5)


def _wait_until(ready: object, complaint: str, cluster: SingleNodeSlurm) -> None:
    assert callable(ready)
    end = time.monotonic() + _STILL_SECONDS
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{complaint} after {_STILL_SECONDS} s\n{cluster.logs()}")
        time.sleep(0.1)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout
