"""A chain of stages as sbatch scripts, one per stage, from the template slurm/stage.sbatch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import minitron_nemo
from minitron_nemo.checks import require
from minitron_nemo.cluster.resources import of_step, require_steps_among
from minitron_nemo.config.slurm import SlurmConfig

_AS_WRITTEN = ("partition", "account", "qos", "reservation", "constraint", "comment", "mail_user", "mail_type")
"""Options that sbatch and `slurm` have in common."""
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class StageJob:
    """One job: `minitron <stage> <overrides>` on every rank.

    `name` tells jobs of the same stage apart (`from_scratch` and `pruned_ce` are both run by `pretrain`); it names the
    script, its log and the job, and is the stage's where it is left out. A job of `one_process` takes one node.
    """

    stage: str
    overrides: tuple[str, ...] = ()
    name: str = ""
    one_process: bool = False
    output: str = ""
    """Where its artifact will stand, for `minitron status`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.stage)
        require(
            re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name) is not None,
            f"{self.name!r} cannot name a job: use letters, digits, '.', '-' and '_' only.",
        )


@dataclass(frozen=True)
class StageScript:
    """A rendered job: `<run_dir>/slurm/NN-<name>.sbatch`."""

    name: str
    path: Path


def render_chain(
    run_dir: Path | str,
    jobs: Sequence[StageJob],
    slurm: SlurmConfig,
    *,
    of_chain: Sequence[str] = (),
    module: str = "minitron_nemo.cli",
) -> list[StageScript]:
    """Write one sbatch script per job, numbered from 01 in the order they run; scripts of an earlier chain go.

    Args:
        run_dir: made absolute, since a job starts wherever SLURM puts it; must be visible from every node.
        of_chain: other steps of the recipe, of which `slurm.steps` may speak too.
        module: what torchrun runs on every rank (`python -m <module> <stage> <overrides>`).
    Raises: ValueError: no job, or `slurm.steps` speaks of another.
    """
    require(len(jobs) > 0, "There is nothing to submit: the recipe names no step. Add one to compress.steps.")
    require_steps_among(slurm, [*(job.name for job in jobs), *of_chain])
    of_jobs = [of_step(slurm, job.name, one_process=job.one_process) for job in jobs]
    folder = Path(run_dir).resolve() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("[0-9][0-9]-*.sbatch"):
        stale.unlink()
    template = template_path().read_text()
    scripts = []
    for number, (job, of_job) in enumerate(zip(jobs, of_jobs, strict=True), start=1):
        path = folder / f"{number:02d}-{job.name}.sbatch"
        path.write_text(_fill(template, _values(path, job, of_job, module)))
        path.chmod(0o755)
        scripts.append(StageScript(job.name, path))
    return scripts


def template_path() -> Path:
    """slurm/stage.sbatch: inside the installed package, or at the root of the repository it runs from."""
    package = Path(minitron_nemo.__file__).parent
    inside, beside = package / "slurm" / "stage.sbatch", package.parent.parent / "slurm" / "stage.sbatch"
    return inside if inside.is_file() else beside


def _values(path: Path, job: StageJob, slurm: SlurmConfig, module: str) -> dict[str, str | None]:
    """The template's values: quoted for the shell, or for an #SBATCH line where they stand there; None: not set."""
    run_dir = path.parent.parent
    return {
        "job_name": f"minitron-{job.name}",
        "array": f"0-{slurm.jobs_of_search - 1}" if job.stage == "search" and slurm.jobs_of_search > 1 else None,
        "nodes": str(slurm.nodes),
        "processes_per_node": str(slurm.processes_per_node),
        "gpus_per_node": _optional(slurm.gpus_per_node),
        "cpus_per_task": _optional(slurm.cpus_per_task),
        "memory": _optional(slurm.memory),
        "time": str(slurm.time),
        **{option: _directive(getattr(slurm, option)) for option in _AS_WRITTEN},
        "directives": "\n".join(_further(slurm)) or None,
        # %j is the job id, so that a second submission keeps the first one's log
        "log_file": _directive(f"{path.with_suffix('')}-%j.log"),
        "signal": f"B:USR1@{slurm.seconds_before_end}" if slurm.seconds_before_end else None,
        "run_dir": shlex.quote(str(run_dir)),
        "stage": shlex.quote(job.stage),
        "stop_file": shlex.quote(str(path.with_suffix(".stop"))),
        "state_file": shlex.quote(str(path.with_suffix(".state"))),
        "deaths": shlex.quote(str(path.with_suffix(".deaths"))),
        "requeues": str(slurm.requeues),
        "setup": "\n".join(_set_up(slurm)) or None,
        **_container(slurm),
        "python": shlex.quote(slurm.python),
        "module": shlex.quote(module),
        "overrides": " ".join(shlex.quote(override) for override in job.overrides),
    }


def _further(slurm: SlurmConfig) -> list[str]:
    """#SBATCH lines of options that have no key of their own."""
    return [f"#SBATCH --{option}={_directive(str(value))}" for option, value in slurm.directives.items()]


def _set_up(slurm: SlurmConfig) -> list[str]:
    """Shell lines before the ranks start."""
    modules = [f"module load {' '.join(map(shlex.quote, slurm.modules))}"] if slurm.modules else []
    variables = [f"export {name}={shlex.quote(str(value))}" for name, value in slurm.environment.items()]
    return [*modules, *variables, *slurm.setup]


def _container(slurm: SlurmConfig) -> dict[str, str | None]:
    """The image as srun's options, or as the command that stands before python."""
    image, mounts = slurm.container_image, ",".join(slurm.container_mounts)
    values: dict[str, str | None] = dict.fromkeys(("container_image", "container_mounts", "apptainer"))
    if image is None:
        return values
    if slurm.container_runtime == "apptainer":
        gpus = ["--nv"] if slurm.gpus_per_node else []
        command = ["apptainer", "exec", *gpus, *(["--bind", mounts] if mounts else []), image]
        return values | {"apptainer": shlex.join(command)}
    return values | {"container_image": shlex.quote(image), "container_mounts": shlex.quote(mounts) if mounts else None}


def _fill(template: str, values: dict[str, str | None]) -> str:
    """Replace every {{name}} outside comments; a line that names a value which is None is left out."""
    lines = []
    for line in template.splitlines():
        if line.startswith("# "):
            lines.append(line)
            continue
        names = _PLACEHOLDER.findall(line)
        for name in names:
            assert name in values, f"slurm/stage.sbatch names {{{{{name}}}}}, which nothing fills"
        if all(values[name] is not None for name in names):
            lines.append(_PLACEHOLDER.sub(lambda match: values[match[1]] or "", line).rstrip())
    return "\n".join(lines) + "\n"


def _directive(value: str | None) -> str | None:
    """A value on an #SBATCH line, where double quotes hold blanks together and nothing is expanded."""
    return f'"{value}"' if value is not None and " " in value else value


def _optional(value: object) -> str | None:
    return None if value is None else str(value)
