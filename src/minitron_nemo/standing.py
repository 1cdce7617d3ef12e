"""What already stands: one look and one rule at every door, a stage's own, `compress` and so every SLURM job.

there is nothing                                 made
current: made from the same config and inputs    kept, with one line
made from another config or other inputs         refused, with the first difference; `overwrite=true` replaces it
no artifact of ours                              refused
a report, which shows what is there              made again where something else is there now
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact, finish_what_was_cut_off, is_artifact, open_artifact
from minitron_nemo.checks import require
from minitron_nemo.config.identity import differences
from minitron_nemo.parallel import is_rank_zero, rank_zero_works
from minitron_nemo.recipe import Step, stage_module
from minitron_nemo.stopping import listening


def make(step: Step, config: Any, *, overwrite: bool) -> Artifact:
    """The artifact of a step: what stands at its config's `output` where that serves, or what its stage makes now.

    The only place where a recipe's steps are run. Communicates: all ranks.
    Raises: Mistake: something else stands there.
    """
    if rank_zero_works(partial(serves, step, config, overwrite=overwrite)):
        if is_rank_zero():
            print(f"    complete: {config.output}", file=sys.stderr, flush=True)
        return open_artifact(config.output)
    with listening():
        return stage_module(step.stage).run(config)


def serves(step: Step, config: Any, *, overwrite: bool = False) -> bool:
    """Whether the artifact at a step's `output` is finished and what its config and inputs would make.

    Args:
        overwrite: one that differs does not serve; else that is a mistake.
    Raises: Mistake: it differs, with the first difference in words, or it is none.
    """
    output = Path(config.output)
    finish_what_was_cut_off(output)
    if not is_artifact(output):
        require(
            not output.exists() or (output.is_dir() and not any(output.iterdir())),
            f"{output} is there and is no artifact: {step.stage} would take its place. Set {step.name}.output to "
            "another place, or remove it.",
        )
        return False
    reason = _difference(open_artifact(output), step, config)
    require(
        reason is None or overwrite or step.stage == "report",
        f"{output} is complete but {reason}. Remove it, choose another run_dir, or set overwrite=true.",
    )
    return reason is None


def _difference(artifact: Artifact, step: Step, config: Any) -> str | None:
    """What about a finished artifact no longer fits, in words; None where all does."""
    if artifact.stage != step.stage:
        return f"was made by stage {artifact.stage}, not {step.stage}"
    for key, then, now in differences(artifact.manifest["config"], config):
        return f"was made with {key}={then}, not {now}"
    for given in artifact.manifest["inputs"]:
        if is_artifact(given["path"]) and open_artifact(given["path"]).digest != given["digest"]:
            return f"was made from an earlier {given['path']}"
    if step.stage == "report":  # the one stage whose inputs are what it finds
        then = {given["path"] for given in artifact.manifest["inputs"]}
        if then != {str(found.path) for found in stage_module(step.stage).inputs(config)}:
            return "shows other artifacts than are there now"
    return None
