"""Who starts the ranks of a command: conf's `launcher` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.ranges import Ranged, ranged

LOCAL, TORCHRUN, SLURM = "local", "torchrun", "slurm"


@dataclass
class LauncherConfig(Ranged):
    """What a command does where nobody has started its ranks yet. Each has a file in conf/launcher."""

    KEY: ClassVar[str] = "launcher"

    kind: str = LOCAL
    """local: one rank, this process. torchrun: its ranks on this machine. slurm: jobs, as `minitron submit`."""
    processes_per_node: int | None = ranged(None, at_least=1)
    """Ranks that torchrun starts on a machine; null: one a device, or one where there is none."""
    nodes: int = ranged(1, at_least=1)
    """Machines on which the same command is started under torchrun."""
    endpoint: str | None = None
    """HOST:PORT of one of them, where they meet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = (LOCAL, TORCHRUN, SLURM)
        require(self.kind in kinds, f"launcher.kind={self.kind} is not known; {did_you_mean(self.kind, kinds)}")
        require(
            self.nodes == 1 or self.endpoint is not None,
            f"launcher.nodes={self.nodes} have to know where they meet. Set launcher.endpoint=HOST:PORT, one of them.",
        )
