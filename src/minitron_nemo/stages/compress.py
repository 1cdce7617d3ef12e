"""compress: the steps of a recipe one after the other in one process, so that NeMo is imported and ranks meet once.

A step whose artifact is complete and was made from the same config and inputs is skipped, so a chain that was cut off
goes on where it stopped. All steps' configs are checked before the first one starts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from minitron_nemo.checks import require
from minitron_nemo.recipe import SECTIONS, stage_module, typed_section
from minitron_nemo.runtime.layout import is_rank_zero
from minitron_nemo.stages.training import changes, config_dict


def run(config: DictConfig) -> None:
    steps = list(config.compress.steps)
    require(bool(steps), f"recipe {config.name} has no compress.steps; list the sections to run in order.")
    sections = {step: typed_section(step, config) for step in steps}
    started = time.monotonic()
    made: set[str] = set()
    for number, (step, values) in enumerate(sections.items(), start=1):
        say(f"[{number}/{len(steps)}] {step}")
        if is_artifact(values.output) and _is_current(values, config.compress.overwrite):
            say(f"    complete: {values.output}")
            continue
        stage_module(SECTIONS[step][0]).run(values)
        made.add(step)
    if is_rank_zero():
        _close(config, sections, time.monotonic() - started)


def say(text: str) -> None:
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)


def _is_current(values: Any, overwrite: bool) -> bool:
    """Whether a finished artifact may stand. False: remake it. Raises: ValueError: it differs and overwrite is off."""
    artifact = open_artifact(values.output)
    reason = _difference(artifact, values)
    if reason is None:
        return True
    require(
        overwrite,
        f"{values.output} is complete but {reason}. Remove it, choose another run_dir, or set compress.overwrite=true.",
    )
    return False


def _difference(artifact: Artifact, values: Any) -> str | None:
    """What about a finished artifact no longer fits, in words; None where all does."""
    for key, then, now in changes(artifact.manifest["config"], config_dict(values)):
        return f"was made with {key}={then}, not {now}"
    for given in artifact.manifest["inputs"]:
        if is_artifact(given["path"]) and open_artifact(given["path"]).digest != given["digest"]:
            return f"was made from an earlier {given['path']}"
    return None


def _close(config: DictConfig, sections: dict[str, Any], seconds: float) -> None:
    from minitron_nemo.report import summary_table

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(summary_table(Path(config.run_dir)))
    for step in ("export_hf", "report"):
        if step in sections:
            artifact = open_artifact(sections[step].output)
            if artifact.facts.get("sample"):
                console.print(f"\nThe exported model continues a prompt:\n{artifact.facts['sample']}\n", markup=False)
            name = "Hugging Face model" if step == "export_hf" else "Report"
            target = artifact.path if step == "export_hf" else artifact.path / "report.html"
            print(f"{name}: {target}")
    print(f"Took {seconds / 60:.1f} minutes.")
