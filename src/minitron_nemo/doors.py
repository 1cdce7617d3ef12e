"""From a command line to a stage: compose the recipe with Hydra, check it against the dataclasses, run.

What a user did wrong ends as one message and exit code 2 on every rank, whichever met it; a run that was told to stop
as one and 75; anything else keeps its traceback, and exit code 1.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from minitron_nemo import ending
from minitron_nemo.checks import Interrupted, Mistake, NothingKept, require
from minitron_nemo.conf_tree import WIRING, conf_dir
from minitron_nemo.config.launcher import SLURM, TORCHRUN
from minitron_nemo.config.stages import runs_in_one_process
from minitron_nemo.launcher import become_torchrun, is_one_of_several, launcher_of
from minitron_nemo.mistakes import MISTAKES, explain
from minitron_nemo.quiet import hush
from minitron_nemo.recipe import (
    OWN_STEPS,
    Step,
    chain_of,
    compose,
    config_dirs,
    config_of,
    find_step,
    follow_tables,
    register_schema,
    require_one_recipe,
    require_own_keys,
    steps_of,
)

INTERRUPTED = 75
"""Exit code of a run that was told to stop and saved (EX_TEMPFAIL of sysexits.h): start it again."""


def open_door(door: str, overrides: Sequence[str]) -> int:
    """Run `door` (a stage, `compress`, `plan`, `submit`) with Hydra `overrides`; returns the exit code: 0, 2 or 75."""
    hush()
    if "--info" in overrides:
        logging.disable(logging.NOTSET)  # Hydra answers through its log
    sys.argv = [f"minitron {door}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions reach us, and we word them

    ending.leave_word(ending.RUNNING)
    try:
        _Command(door, overrides).run()
    except Interrupted as stopped:
        is_up = _time_is_up(stopped)
        ending.leave_word(ending.FAILED if is_up else ending.STOPPED)
        again = " A job whose time ran out does not queue itself again: raise slurm.time." if is_up else ""
        ending.say_once(f"minitron {door}: {stopped}{again}")
        return INTERRUPTED
    except MISTAKES as error:
        if isinstance(error, _Left):
            return ending.told() or 1
        ending.leave_word(ending.FAILED)
        if os.environ.get("MINITRON_TRACEBACK"):
            ending.tell(2)
            raise
        ending.say_once(f"minitron {door}: {explain(error, door, overrides)}")
        ending.tell(2)
        return 2
    except BaseException as error:
        if not ending.is_of_lost_rank(error):
            ending.leave_word(ending.FAILED)
        ending.tell(1)
        raise
    finally:
        ending.stop_listening()
    return 0


class _Command:
    """One command: a run, or the jobs of `--multirun`."""

    def __init__(self, door: str, overrides: Sequence[str]) -> None:
        self._door, self._overrides = door, overrides
        self._steps: Mapping[str, Step] = {}
        self._mistakes: list[Exception] = []  # kept from Hydra, which would announce them in its own words first
        self._failed = False

    def run(self) -> None:
        if any(override.startswith("-") for override in self._overrides):  # Hydra's own options, --cfg and --multirun
            require_one_recipe(self._overrides)
            self._steps = steps_of(self._overrides)
            register_schema(self._steps)
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=WIRING)(self._run_for_hydra)()
        else:  # composed once, where hydra.main composes to find its mode and again to run
            config, self._steps = compose(self._overrides)
            self._run(config, self._overrides)
        if self._mistakes:
            raise self._mistakes[0]

    def _run(self, config: DictConfig, overrides: Sequence[str]) -> None:
        try:
            _run(self._door, config, overrides, self._steps)
        except MISTAKES as error:
            self._mistakes.append(error)
        except RuntimeError as error:
            if not _another_rank_left(error) and ending.told() is None:
                raise
            self._mistakes.append(_Left())

    def _run_for_hydra(self, config: DictConfig) -> None:
        if self._failed or self._mistakes:  # Hydra runs all jobs of a sweep, whatever became of the first
            return
        try:
            follow_tables(config, self._steps)
            self._run(config, self._of_this_job())
        except BaseException:
            self._failed = True
            raise
        if is_one_of_several() and "torch" in sys.modules:
            from minitron_nemo.compress import let_go

            let_go()

    def _of_this_job(self) -> Sequence[str]:
        """Of a sweep the overrides of the job at hand, with the folders that the command names for them all."""
        if not is_one_of_several():
            return self._overrides
        folders = [f"--config-dir={folder}" for folder in config_dirs(self._overrides)]
        return [*HydraConfig.get().overrides.task, *folders]


def _time_is_up(stopped: Interrupted) -> bool:
    """Whether a job's time ran out (slurm/stage.sbatch) on a run that kept nothing. Such a job would begin anew and run
    out again, for ever: it queues itself again only where the file is still there."""
    if not isinstance(stopped, NothingKept) or int(os.environ.get("RANK", 0)) > 0:
        return False
    from minitron_nemo.stopping import STOP_FILE

    file = os.environ.get(STOP_FILE)
    if file is None or not os.path.exists(file):
        return False
    os.remove(file)
    return True


class _Left(Mistake):
    """Another rank has ended the run and says why."""


def _another_rank_left(error: RuntimeError) -> bool:
    """Whether a collective failed because its other end is gone, in the words of gloo; NCCL waits, see `ending`."""
    return any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer"))


def _run(door: str, config: DictConfig, overrides: Sequence[str], steps: Mapping[str, Step]) -> None:
    require_own_keys(config, overrides)
    chain = [find_step(name, steps) for name in chain_of(config)]
    if door == "plan":
        from minitron_nemo.sizing.run import run as reckon

        reckon(config, chain)
        return
    chosen = chain if door in ("compress", "submit") else [_step_of(door, config, steps)]
    launcher = launcher_of(config)
    if door == "submit" or launcher.kind == SLURM:
        from minitron_nemo.cluster import submit

        # what is wrong is said now, not by a job hours later
        jobs = [_job(step, config_of(step, config), overrides) for step in chosen]
        submit.run(config, jobs, [step.name for step in chain])
        return
    if launcher.kind == TORCHRUN:
        for step in chosen:
            config_of(step, config)
        become_torchrun(launcher, door, overrides)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # alone, a stage starts what it needs
        from minitron_nemo.config.trainer import Layout
        from minitron_nemo.runtime.layout import start

        start(Layout(distributed_timeout_minutes=config.trainer.distributed_timeout_minutes))
        ending.listen()
    if door == "compress":
        from minitron_nemo import compress

        compress.run(config, chosen)
        return
    [step] = chosen
    values = config_of(step, config)  # a mistake in it needs no torch
    from minitron_nemo.standing import make

    artifact = make(step, values, overwrite=config.overwrite, verify_inputs=config.verify_inputs)
    if int(os.environ.get("RANK", 0)) == 0:
        print(artifact.path)


def _step_of(stage: str, config: DictConfig, steps: Mapping[str, Step]) -> Step:
    """The step that the door of a stage runs: its own, or the one that `section` names."""
    step = find_step(config.section or stage.replace("-", "_"), steps)
    require(
        step.stage == stage,
        f"section={step.name} is run by another stage: minitron {step.stage} section={step.name} ...",
    )
    return step


def _job(step: Step, values: Any, overrides: Sequence[str]) -> Any:
    """The job of one step: its stage, told which section of the recipe to read where that is not its namesake; before
    the rest, as Hydra takes no override behind its options (--config-dir)."""
    from minitron_nemo.cluster import StageJob, stage_overrides

    section = () if step.name in OWN_STEPS else (f"section={step.name}",)
    given = (*section, *stage_overrides(overrides))
    return StageJob(step.stage, given, step.name, runs_in_one_process(values), values.output)
