"""What already stands: one look and one rule at every door, a stage's own, `compress` and so every SLURM job.

there is nothing                                 made
current: made from the same config and inputs    kept, with one line
made from another config or other inputs         refused, with the first difference; `overwrite=true` replaces it
no artifact of ours                              refused
a report, which shows what is there              made again where something else is there now
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact, finish_what_was_cut_off, is_artifact, open_artifact, stage_begins
from minitron_nemo.checks import Mistake, require
from minitron_nemo.config.identity import as_dict, differences
from minitron_nemo.parallel import is_rank_zero, rank_zero_works
from minitron_nemo.recipe import SHARED, Step, stage_module
from minitron_nemo.run_record import recording
from minitron_nemo.stopping import listening


def make(step: Step, config: Any, *, overwrite: bool, verify_inputs: bool = False, of_chain: bool = False) -> Artifact:
    """The artifact of a step: what stands at its config's `output` where that serves, or what its stage makes now.

    The only place where a recipe's steps are run. Communicates: all ranks.

    Args:
        verify_inputs: read every file of the artifacts that the config names, before the stage starts.
        of_chain: other steps stand before or after it.
    Raises: Mistake: something else stands there, or an input is damaged.
    """
    if rank_zero_works(partial(serves, step, config, overwrite=overwrite)):
        if is_rank_zero():
            print(f"    complete: {config.output}", file=sys.stderr, flush=True)
        return open_artifact(config.output)
    with listening():
        if verify_inputs:
            rank_zero_works(partial(_verify_inputs, step, config))
        stage_begins()
        with recording(step.name, config.output, of_chain=of_chain):
            return stage_module(step.stage).run(config)


def _verify_inputs(step: Step, config: Any) -> None:
    for key, value in _values(as_dict(config), ""):
        if key != "output" and isinstance(value, str) and is_artifact(value):
            shared = key.split(".")[0] in SHARED
            open_artifact(value, key=key if shared else f"{step.name}.{key}", verify=True)


def _values(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of all that is in a config; of a list's parts, the list's key."""
    if isinstance(node, dict):
        for name, each in node.items():
            yield from _values(each, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for each in node:
            yield from _values(each, key)
    else:
        yield key, node


def serves(step: Step, config: Any, *, overwrite: bool = False) -> bool:
    """Whether the artifact at a step's `output` is finished and what its config and inputs would make.

    Args:
        overwrite: one that differs does not serve; else that is a mistake.
    Raises: Mistake: it differs, with the first difference in words, or it is none.
    """
    output = Path(config.output)
    finish_what_was_cut_off(output)
    if not is_artifact(output):
        _require_empty(output, step, "output")
        _require_room_for_teacher(step, config, overwrite)
        return False
    reason: str | None
    try:
        artifact = open_artifact(output, key=f"{step.name}.output")
    except Mistake as error:
        reason = f"damaged: {str(error).rstrip('.')}"
    else:
        reason = _difference(artifact, step, config)
    require(
        reason is None or overwrite or step.stage == "report",
        f"{output} is complete but {reason}. Remove it, choose another run_dir, or set overwrite=true.",
    )
    if reason is not None:
        _require_room_for_teacher(step, config, overwrite)
    return reason is None


def _require_empty(place: Path, step: Step, key: str) -> None:
    require(
        not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())),
        f"{place} is there and is no artifact: {step.stage} would take its place. Set {step.name}.{key} to "
        "another place, or remove it.",
    )


def _require_room_for_teacher(step: Step, config: Any, overwrite: bool) -> None:
    """The same rule where `distill` writes a second artifact, hours later.

    Raises: Mistake: something stands there that this config did not make.
    """
    if getattr(config, "corrected_teacher", None) is None:
        return
    place = Path(config.corrected_teacher)
    finish_what_was_cut_off(place)
    if not is_artifact(place):
        _require_empty(place, step, "corrected_teacher")
        return
    made = open_artifact(place, key=f"{step.name}.corrected_teacher").manifest
    require(
        overwrite or (made["stage"] == "correct-teacher" and not any(differences(made["config"], config))),
        f"{step.name}.corrected_teacher={place} is complete and was not made by this step with these values. Set it to "
        "another place, remove it, or set overwrite=true.",
    )


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
