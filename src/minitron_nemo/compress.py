"""compress: the steps of a recipe one after the other in one process, so that NeMo is imported and ranks meet once.

A step whose artifact is complete and was made from the same config and inputs is skipped, so a chain that was cut off
goes on where it stopped. All steps' configs are checked before the first one starts. How far it is, `minitron status`
says from elsewhere.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from minitron_nemo.artifact import open_artifact
from minitron_nemo.checks import require
from minitron_nemo.config.stages import ReportConfig
from minitron_nemo.parallel import is_rank_zero, rank_zero_works
from minitron_nemo.recipe import OWN_STEPS, Step, config_of, stage_module
from minitron_nemo.run_record import ListedStep, write_steps
from minitron_nemo.standing import make
from minitron_nemo.stopping import listening


def run(config: DictConfig, steps: Sequence[Step]) -> None:
    """Run the steps of a composed recipe. Raises: Mistake: a config or an input that cannot be; before the first runs
    where that can be seen."""
    require(bool(steps), f"recipe {config.name} has no compress.steps; list the sections to run in order.")
    configs = {step.name: config_of(step, config) for step in steps}
    table = config_of(OWN_STEPS["report"], config)
    for step in steps:
        if check := getattr(stage_module(step.stage), "check", None):
            check(configs[step.name])
    if is_rank_zero():
        listed = [ListedStep(step.name, step.stage, configs[step.name].output) for step in steps]
        write_steps(config.run_dir, "compress", listed)
    started = time.monotonic()
    with listening():  # between two steps too: the next one stops then
        for number, step in enumerate(steps, start=1):
            say(f"[{number}/{len(steps)}] {step.name}")
            values = configs[step.name]
            make(step, values, overwrite=config.overwrite, verify_inputs=config.verify_inputs, of_chain=True)
            let_go()
    rank_zero_works(partial(_close, table, [configs[step.name] for step in steps], time.monotonic() - started))


def say(text: str) -> None:
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)


def let_go() -> None:
    """A step's models, before the next one builds its own: they lie in circles (a trainer and its model know each
    other), which Python looks for when it likes, and on a device in torch's cache."""
    gc.collect()
    torch.cuda.empty_cache()


def _close(table: ReportConfig, configs: Sequence[Any], seconds: float) -> None:
    """What the chain came to: its table, a sample of what was exported, and where things are."""
    from minitron_nemo.report import summary_table

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(summary_table(table.run_dir, table.rows, table.expected_order))
    for made in (open_artifact(values.output) for values in configs):
        if made.facts.get("sample"):
            console.print(f"\nThe exported model continues a prompt:\n{made.facts['sample']}\n", markup=False)
        if made.stage == "export-hf":
            print(f"Hugging Face model: {made.path}")
        elif made.stage == "report":
            print(f"Report: {made.path / 'report.html'}")
    print(f"Took {seconds / 60:.1f} minutes.")
