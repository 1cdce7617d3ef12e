"""The door `plan`: every step of a recipe reckoned and shown, and kept as JSON where that is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from minitron_nemo.checks import Mistake, require
from minitron_nemo.cluster.resources import of_step, require_steps_among
from minitron_nemo.conf_tree import group_of
from minitron_nemo.config.plan import PlanConfig
from minitron_nemo.config.slurm import SlurmConfig
from minitron_nemo.recipe import Step, config_of
from minitron_nemo.sizing.cost import cost_of
from minitron_nemo.sizing.machine import GIB, Machine
from minitron_nemo.sizing.memory import memory_of
from minitron_nemo.sizing.mends import mends_of
from minitron_nemo.sizing.mistakes import mistakes_of
from minitron_nemo.sizing.shapes import Shapes
from minitron_nemo.sizing.steps import Planned, planned
from minitron_nemo.sizing.tables import Reckoned, as_json, pages


def run(config: DictConfig, steps: Sequence[Step]) -> None:
    """Reckon the steps of a composed recipe, and show it.

    Raises: Mistake: steps that their stages would refuse, all of them; or that do not fit, after the tables.
    """
    require(bool(steps), f"recipe {config.name} has no compress.steps; list the sections to run in order.")
    plan: PlanConfig = group_of(config, "plan", PlanConfig)
    machine = Machine.of(plan, group_of(config, "slurm", SlurmConfig))
    reckoned = reckon(config, steps, plan, machine)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for each in reckoned:
        own = each.machine
        if own != machine:
            nodes = own.ranks // own.ranks_per_node
            console.print(f"{each.name}: {own.ranks} ranks ({nodes} nodes x {own.ranks_per_node})")
    for page in pages(reckoned, plan, machine):
        console.print(page)
        if isinstance(page, Table):
            console.print()
    if plan.output is not None:
        file = Path(plan.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(as_json(reckoned, plan, machine), indent=1) + "\n")
    tight = [each.name for each in reckoned if not each.fits]
    require(
        not tight,
        f"{', '.join(tight)} would take more than the {machine.room_bytes / GIB:.1f} GiB that "
        f"plan.headroom={plan.headroom} leaves of {machine.memory_bytes / GIB:.1f}. What helps stands above.",
    )


def _machine_of(step: Step, slurm: SlurmConfig, machine: Machine) -> Machine:
    """With the ranks that `slurm.steps` gives the step."""
    own = of_step(slurm, step.name)
    return replace(machine, ranks=own.nodes * own.processes_per_node, ranks_per_node=own.processes_per_node)


def reckon(config: DictConfig, steps: Sequence[Step], plan: PlanConfig, machine: Machine) -> list[Reckoned]:
    """Of the steps that run a model. Raises: Mistake: all that their stages would refuse."""
    shapes = Shapes()
    found = [planned(step, config_of(step, config), shapes, plan) for step in steps]
    slurm: SlurmConfig = group_of(config, "slurm", SlurmConfig)
    require_steps_among(slurm, [step.name for step in steps])
    machines = {step.name: _machine_of(step, slurm, machine) for step in steps}
    refused: dict[str, list[str]] = {}
    for each in found:
        if each.job is not None:
            for words in mistakes_of(each.job, each.values.trainer, machines[each.step.name]):
                refused.setdefault(words, []).append(each.step.name)
    if refused:
        nodes = machine.ranks // machine.ranks_per_node
        world = f"slurm.nodes={nodes} x slurm.processes_per_node={machine.ranks_per_node} = {machine.ranks} ranks"
        lines = [f"{', '.join(names)}: {words}" for words, names in refused.items()]
        raise Mistake("\n".join([f"{world}; to mend:", *lines]))
    return [_reckoned(each, machines[each.step.name]) for each in found if each.job is not None]


def _reckoned(each: Planned, machine: Machine) -> Reckoned:
    assert each.job is not None
    memory, cost, again = memory_of(each.job, machine), cost_of(each.job, machine), None
    if each.job.trains:
        again = memory_of(each.job.changed(recompute_granularity="full"), machine)
    fits = memory.total <= machine.room_bytes
    mends = [] if fits else mends_of(each.step.name, each.job, each.values.trainer, machine)
    return Reckoned(each.step.name, each.step.stage, each.job, machine, memory, again, cost, fits, mends)
