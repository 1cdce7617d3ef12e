"""submit: hand a rendered chain to SLURM, each job waiting until the one before has succeeded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig

from minitron_nemo.checks import Mistake, NothingThere, require
from minitron_nemo.cluster import queue
from minitron_nemo.cluster.render import StageJob, StageScript, render_chain
from minitron_nemo.cluster.resources import of_step
from minitron_nemo.conf_tree import group_of
from minitron_nemo.config.slurm import SlurmConfig
from minitron_nemo.run_record import ListedStep, read_steps, write_steps

JOBS = "jobs.json"


class SlurmRefused(Mistake, ChildProcessError):
    """SLURM did not take a job, in its own words."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that SLURM has accepted, and the one it waits for."""

    name: str
    script: str
    job_id: int
    after: int | None


def run(config: DictConfig, jobs: Sequence[StageJob], of_chain: Sequence[str] = ()) -> None:
    """Render the jobs of a chain, in its order, and submit them; with submit.dry_run=true, only render.

    Args:
        config: a composed recipe: `run_dir`, `slurm`, `submit`.
        of_chain: names of all the recipe's steps, of which the jobs may be one.
    Raises: Mistake: a step of an earlier submission is still to be made there, or what `submit_chain` says.
    """
    slurm: SlurmConfig = group_of(config, "slurm", SlurmConfig)
    if config.submit.dry_run:
        for script in render_chain(config.run_dir, jobs, slurm, of_chain=of_chain):
            print(f"rendered {script.path}")
        print("Nothing was submitted: submit.dry_run=true.")
        return
    names = {job.name for job in jobs}
    require_sbatch()
    require_image(slurm, sorted(names))
    others = still_at_work(Path(config.run_dir))
    twice = [f"{job.name} ({job.job_id})" for job in others if job.name in names]
    require(
        not twice,
        f"run_dir={config.run_dir}: {', '.join(twice)} of an earlier submission waits or runs there. Wait for it, end "
        f"it with minitron cancel {config.run_dir}, or choose another run_dir.",
    )
    submit_chain(render_chain(config.run_dir, jobs, slurm, of_chain=of_chain), beside=others)
    _, listed = read_steps(Path(config.run_dir)) or ("", [])
    steps = [step for step in listed if step.name in {job.name for job in others}]
    write_steps(config.run_dir, "submit", [*steps, *(ListedStep(job.name, job.stage, job.output) for job in jobs)])


def stage_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides of a command line that a stage understands: all but those of the submission itself, who
    starts the ranks, and the section, which each job has its own of."""
    own = re.compile(r"[+~]*(section|slurm|submit|launcher)([.=@].*)?")
    return tuple(override for override in overrides if not own.fullmatch(override))


def require_sbatch() -> None:
    """Raises: NothingThere: this machine cannot submit."""
    require(
        shutil.which("sbatch") is not None,
        "sbatch was not found: submitting needs the SLURM client commands, on a login node for instance. "
        "To run here, use compress or the stage itself with launcher=local. To write the scripts without submitting "
        "them, set submit.dry_run=true.",
        NothingThere,
    )


def require_image(slurm: SlurmConfig, steps: Sequence[str]) -> None:
    """Raises: NothingThere: a container image that is a file, and not there; other names are the runtime's to find."""
    for step in steps:
        image = of_step(slurm, step).container_image
        is_file = image is not None and (image.startswith(("/", "./", "../")) or image.endswith((".sqsh", ".sif")))
        require(
            not is_file or Path(str(image)).exists(),
            f"slurm.container_image={image} is not there, as {step} would find it. Make it with enroot import or "
            "apptainer pull, on a disk that all nodes see.",
            NothingThere,
        )


def still_at_work(run_dir: Path) -> list[SubmittedJob]:
    """Of what was submitted there last, the jobs that wait or run; none where SLURM or the record cannot be asked."""
    try:
        jobs = [SubmittedJob(**each) for each in json.loads((run_dir / "slurm" / JOBS).read_text())]
    except (OSError, ValueError, TypeError):
        return []
    known = queue.ask([job.job_id for job in jobs]) or {}
    return [job for job in jobs if any(task.unfinished for task in known.get(job.job_id, ()))]


def submit_chain(
    scripts: Sequence[StageScript], *, beside: Sequence[SubmittedJob] = (), say: Callable[[str], None] = print
) -> list[SubmittedJob]:
    """Submit the scripts in order, each with `afterok` on the one before; `say` gets one line per job.

    The jobs are recorded in jobs.json beside the scripts, after those that run `beside` them. When a job fails, those
    after it are cancelled by SLURM rather than left pending for ever. When SLURM refuses one, those already accepted
    are cancelled: a chain runs as a whole or not at all.

    Raises: NothingThere: no sbatch on this machine. SlurmRefused: its words are quoted.
    """
    require_sbatch()
    jobs: list[SubmittedJob] = []
    for script in scripts:
        previous = jobs[-1].job_id if jobs else None
        jobs.append(SubmittedJob(script.name, str(script.path), _sbatch(script, previous, jobs), previous))
        waits = "" if previous is None else f", after job {previous}"
        say(f"job {jobs[-1].job_id}: {script.name}{waits} ({script.path})")
    record = scripts[0].path.with_name(JOBS)
    record.write_text(json.dumps([asdict(job) for job in (*beside, *jobs)], indent=2) + "\n")
    return jobs


def _sbatch(script: StageScript, after: int | None, accepted: Sequence[SubmittedJob]) -> int:
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    # No --chdir: the job starts in the directory of the submission, where relative paths in overrides were meant.
    done = subprocess.run([*command, str(script.path)], capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.strip().split(";")[0])  # "id" or "id;cluster"
    cancelled = _cancel([job.job_id for job in accepted])
    raise SlurmRefused(
        f"SLURM refused {script.name}: {' '.join(done.stderr.split())}. {cancelled}"
        f"Correct the config group `slurm` (partition, account, time, nodes) and submit again; script: {script.path}"
    )


def _cancel(job_ids: Sequence[int]) -> str:
    """Cancel what was accepted before the refusal; says so, or which jobs are left to cancel by hand."""
    if not job_ids:
        return ""
    listed = " ".join(str(job_id) for job_id in job_ids)
    done = subprocess.run(["scancel", *listed.split()], capture_output=True, text=True)
    return f"Jobs before it were cancelled: {listed}. " if done.returncode == 0 else f"Now run: scancel {listed}. "
