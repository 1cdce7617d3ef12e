"""What the job of one step asks of SLURM: the config group `slurm`, and what `slurm.steps` says of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_nemo.checks import Mistake, did_you_mean, require
from minitron_nemo.config.slurm import SlurmConfig


def of_step(slurm: SlurmConfig, name: str, *, one_process: bool = False) -> SlurmConfig:
    """
    Args:
        one_process: the step's stage is one process.
    Raises: Mistake: `slurm.steps` gives the step a key that there is not, or a value that cannot be.
    """
    own, where = slurm.steps.get(name) or {}, f"slurm.steps.{name}"
    of_all = replace(slurm, steps={})
    if one_process:
        of_all = of_all.for_one_process
    require(isinstance(own, dict), f"{where}={own} is no group of keys. Write {where}.nodes=2, for instance.")
    known = {each.name for each in fields(slurm)} - {"steps"}
    for key in own:
        require(key in known, f"{where}.{key} is no key of slurm; {did_you_mean(str(key), known)}")
    try:
        asked = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(of_all), own))
    except (OmegaConfBaseException, Mistake) as error:
        raise Mistake(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(asked, SlurmConfig)
    return asked


def require_steps_among(slurm: SlurmConfig, names: Sequence[str]) -> None:
    """Raises: Mistake: `slurm.steps` speaks of a step that the chain does not have."""
    for step in slurm.steps:
        require(step in names, f"slurm.steps.{step} is no step of this chain; {did_you_mean(step, names)}")
