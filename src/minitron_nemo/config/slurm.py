"""What a stage asks of SLURM: conf's `slurm` group. The same for every step of a chain, but for those of one process
and for what `slurm.steps` says of single ones."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from minitron_nemo.checks import require
from minitron_nemo.config.ranges import Ranged, ranged

RUNTIMES = ("pyxis", "apptainer")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z-]*")  # man sbatch
SCRIPTS_OWN = ("job-name", "array", "output", "error", "open-mode", "requeue", "no-requeue", "dependency", "chdir")
"""Options of sbatch that slurm/stage.sbatch gives or cannot work with."""
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")  # man sbatch, --time
_MEMORY = re.compile(r"\d+[KMGT]?")  # man sbatch, --mem


def _seconds(time: str) -> int:
    """Of a time limit as sbatch reads it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 is no limit."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass
class SlurmConfig(Ranged):  # conf/slurm/*.yaml
    KEY: ClassVar[str] = "slurm"

    nodes: int = ranged(1, at_least=1)
    """Nodes of each job."""
    processes_per_node: int = ranged(1, at_least=1)
    """Ranks torchrun starts on a node: one per GPU, or per model-parallel rank on CPU nodes."""
    gpus_per_node: int | None = ranged(None, at_least=1)
    """GPUs asked for on each node; null on partitions without GPUs, or where whole nodes are handed out."""
    gpus_of_one_process: int | None = ranged(None, at_least=1)
    """GPUs asked for by a job whose stage is one process (prepare-data, prune-hf, report, prune with offline=true),
    which runs on one node and uses none; null asks for none."""
    partition_of_one_process: str | None = None
    """Partition of such a job, where that of the others gives no job without GPUs; null: `partition`."""
    jobs_of_search: int = ranged(1, at_least=1)
    """Jobs of a search, a SLURM array: each takes candidates that no other works on."""
    cpus_per_task: int | None = ranged(None, at_least=1)
    """CPUs of a node's one task, which torchrun and all its ranks share; null leaves SLURM's default (often 1)."""
    memory: str | None = None
    """Memory per node as sbatch reads it, e.g. 64G (without a letter: MiB); null leaves the partition's default."""
    time: str = "04:00:00"
    """Limit of one job: minutes, H:M:S or D-H:M:S."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    """Features that nodes must have, as sbatch reads them, e.g. `h100&ib`."""
    comment: str | None = None
    mail_user: str | None = None
    mail_type: str | None = None
    """Events that a mail tells of, e.g. `END,FAIL`."""
    directives: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by their long names, e.g. {exclude: node7, switches: 1@10:00}."""
    container_image: str | None = None
    """Image the ranks run in; null runs them on the host."""
    container_runtime: str = "pyxis"
    """Who runs it: `pyxis` (srun's --container-image, enroot) or `apptainer` (`apptainer exec`)."""
    container_mounts: list[str] = field(default_factory=list)
    """Mounts into it, each source:target or source:target:flags. The run directory must be visible inside."""
    modules: list[str] = field(default_factory=list)
    """Environment modules that are loaded first, outside the container."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the ranks, e.g. {NCCL_DEBUG: WARN, NCCL_IB_HCA: mlx5}."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before srun, on the job's first node and outside the container."""
    python: str = sys.executable
    """Interpreter that has minitron_nemo, by default the one that submits; inside a container most often `python`."""
    seconds_before_end: int = ranged(120, at_least=0, at_most=65535)
    """So long before its limit a job tells its stage to save and stop, and queues itself again to go on; 0 to 65535,
    0 never. Must be enough for a step and a checkpoint."""
    requeues: int = ranged(3, at_least=0)
    """How often a job queues itself again whose ranks died without a word: killed, out of host memory, a node lost. One
    that ran out of time, or was told to stop and saved, always does; one whose stage says what is wrong never does."""
    steps: dict[str, Any] = field(default_factory=dict)
    """Other values of these keys for single steps by name, e.g. {distill: {nodes: 16, time: 1-00:00:00}}."""

    @property
    def for_one_process(self) -> SlurmConfig:
        """What a job asks for whose stage is one process."""
        return replace(
            self,
            nodes=1,
            processes_per_node=1,
            gpus_per_node=self.gpus_of_one_process,
            partition=self.partition_of_one_process or self.partition,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.gpus_per_node is None or self.processes_per_node <= self.gpus_per_node,
            f"slurm.processes_per_node={self.processes_per_node} is more than "
            f"slurm.gpus_per_node={self.gpus_per_node}: each rank needs a GPU of its own. "
            f"Set slurm.processes_per_node={self.gpus_per_node} or less, or ask for more GPUs.",
        )
        require(
            _TIME.fullmatch(str(self.time)) is not None,
            f"slurm.time={self.time} is not a time limit. "
            "Write minutes (90), hours:minutes:seconds (04:00:00) or days-hours:minutes:seconds (1-00:00:00).",
        )
        limit = _seconds(str(self.time))
        require(
            limit == 0 or self.seconds_before_end < limit,
            f"slurm.seconds_before_end={self.seconds_before_end} is not below slurm.time={self.time} ({limit} s): each "
            "job would be told to stop as soon as it starts, and the chain would queue itself for ever. Raise "
            "slurm.time well above it, to many checkpoints' time.",
        )
        require(
            self.memory is None or _MEMORY.fullmatch(str(self.memory)) is not None,
            f"slurm.memory={self.memory} is not an amount of memory. Write a whole number and K, M, G or T, e.g. 64G.",
        )
        require(
            not self.container_mounts or self.container_image is not None,
            f"slurm.container_mounts={list(self.container_mounts)} has no container to mount into. "
            "Set slurm.container_image, or leave the mounts out.",
        )
        require(
            self.container_runtime in RUNTIMES,
            f"slurm.container_runtime={self.container_runtime} is not known; use {' or '.join(RUNTIMES)}.",
        )
        for variable in self.environment:
            require(
                _VARIABLE.fullmatch(variable) is not None,
                f"slurm.environment: {variable!r} cannot name a variable. Use letters, digits and '_'.",
            )
        self._require_own_directives()
        for one in fields(self):
            value = getattr(self, one.name)
            for text in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
                require(
                    "\n" not in str(text),
                    f"slurm.{one.name}={text!r} holds a line break, which would end its line in the sbatch script. "
                    "Write it on one line; slurm.setup takes a list with one entry a line.",
                )

    def _require_own_directives(self) -> None:
        """`directives` are options of sbatch that no other key stands for, and the script's own."""
        keys = {each.name.replace("_", "-"): each.name for each in fields(self)}
        keys |= {"mem": "memory", "ntasks-per-node": "processes_per_node", "signal": "seconds_before_end"}
        for option in self.directives:
            require(
                _OPTION.fullmatch(option) is not None,
                f"slurm.directives: {option!r} is no long option of sbatch. Write exclude for --exclude, for instance.",
            )
            key = keys.get(option)
            require(key is None, f"slurm.directives.{option} has a key of its own: set slurm.{key}.")
            require(
                option not in SCRIPTS_OWN,
                f"slurm.directives.{option} is what the script itself says. Leave it out.",
            )
