"""Start the ranks of a command that was started as one process: `launcher=torchrun`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from minitron_nemo.checks import require
from minitron_nemo.conf_tree import group_of
from minitron_nemo.config.launcher import LOCAL, LauncherConfig


def launcher_of(config: DictConfig) -> LauncherConfig:
    """Of a composed recipe; local in a process that is a rank already, whatever the recipe says."""
    asked: LauncherConfig = group_of(config, "launcher", LauncherConfig)
    return LauncherConfig(LOCAL) if "LOCAL_RANK" in os.environ else asked  # WORLD_SIZE some clusters set in every shell


def is_one_of_several() -> bool:
    """Whether Hydra runs this command as a job of `--multirun`."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def torchrun(launcher: LauncherConfig, door: str, overrides: Sequence[str]) -> list[str]:
    """The command that runs `minitron door overrides` on every rank."""
    from minitron_nemo import platform

    several = ["--rdzv-backend=c10d", "--rdzv-id=minitron", f"--rdzv-endpoint={launcher.endpoint}"]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={launcher.nodes}",
        f"--nproc-per-node={launcher.processes_per_node or ('gpu' if platform.has_accelerator() else 1)}",
        *(["--standalone"] if launcher.nodes == 1 else several),
        *("-m", "minitron_nemo.cli", door, *overrides),
    ]


def become_torchrun(launcher: LauncherConfig, door: str, overrides: Sequence[str]) -> None:
    """This process becomes torchrun, which so hears the signals that were meant for it; does not return.

    Raises: Mistake: Hydra would go on with another job of a sweep behind it.
    """
    require(
        not is_one_of_several(),
        "launcher=torchrun starts one run, and --multirun several. Leave launcher out, and start the sweep itself by "
        f"torchrun --nproc-per-node N -m minitron_nemo.cli {door} ...",
    )
    command = torchrun(launcher, door, overrides)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)
