"""`minitron <stage> recipe=<name> key=value ...`: every stage by name, with Hydra overrides.

Nothing heavy is imported at the top: help and mistakes answer at once, and Megatron's checkpoint writer starts a
process that imports this module again.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minitron_nemo.conf_tree import recipes

DOORS = (
    "compress",
    "prepare-data",
    "pretrain",
    "import-hf",
    "correct-teacher",
    "estimate-importance",
    "prune",
    "search",
    "prune-hf",
    "teacher-logits",
    "distill",
    "evaluate",
    "export-hf",
    "throughput",
    "report",
    "plan",
    "submit",
)
LOOKS = ("status", "cancel")
"""What is asked of a run that goes on elsewhere, by its directory alone."""
_USAGE = f"""usage: minitron <stage> recipe=<name> [key=value ...]
       torchrun --nproc-per-node N launch/<stage>.py recipe=<name> [key=value ...]
       minitron status RUNDIR
       minitron cancel RUNDIR

stages: {", ".join(DOORS)}
recipes: {{recipes}}

minitron <stage> --help says what a stage does; Hydra's options follow the recipe: --cfg job shows every key.
minitron status runs/quickstart says how far a run is, in a shell or under SLURM; cancel ends it.
Try: minitron compress recipe=quickstart"""
_STAGE_USAGE = """usage: minitron {door} recipe=<name> [key=value ...]

{about}

recipes: {recipes}
keys: minitron {door} recipe=quickstart --cfg job"""
_LOOK_USAGE = """usage: minitron {look} RUNDIR

{about}"""

# Libraries below us report to their makers unless told otherwise.
_QUIET = {
    "NEMO_ONE_LOGGER_ENABLED": "0",
    "ONE_LOGGER_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "FALSE",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LEPTON_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "NEMO_LOG_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


_SPINS = "1000"
"""Turns for which a thread of libgomp, torch's OpenMP on a CPU, waits awake for the others; by default milliseconds, in
which it holds the core that they need where other processes run too. On two busy cores a step is so 1.7 to 20 times as
fast; alone it takes up to 1.4 times as long, and there nothing is changed (docs/log.md)."""
_BUSY = 0.5
"""Processes at work over the last minute, from which on a machine counts as busy."""


def set_up_environment() -> None:
    """Switch off telemetry and look-ups over the network, and on a busy machine long waits awake; a value the user set
    stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ and os.getloadavg()[0] > _BUSY:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def leave_allocation() -> None:
    """Forget that this process runs inside a SLURM allocation: `torchrun` says who the ranks are, or there is one.
    Lightning and NeMo would take the allocation's variables (SLURM_NTASKS, SLURM_PROCID) for this run's. Which job it
    is of stays known to its record, and to sbatch how to reach the cluster."""
    if job := os.environ.get("SLURM_JOB_ID"):
        from minitron_nemo.run_record import JOB

        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        os.environ[JOB] = job if array is None else f"{array}_{task}"
    for name in [name for name in os.environ if name.startswith("SLURM_") and name not in _OF_THE_CLUSTER]:
        del os.environ[name]


def _about(door: str) -> str:
    """What the stage's module says about itself, read without importing it and NeMo."""
    package = Path(__file__).parent
    elsewhere = {"submit": "cluster/submit.py", "plan": "sizing/__init__.py"}
    elsewhere |= {name: f"{name}.py" for name in ("compress", *LOOKS)}
    file = package / elsewhere.get(door, f"stages/{door.replace('-', '_')}.py")
    return ast.get_docstring(ast.parse(file.read_text())) or door


def _look(look: str, arguments: Sequence[str]) -> int:
    """Run `status` or `cancel`, which import no torch and no Hydra: they answer at once."""
    if {"-h", "--help"} & set(arguments):
        print(_LOOK_USAGE.format(look=look, about=_about(look)))
        return 0
    from importlib import import_module

    from minitron_nemo.checks import Mistake, require

    try:
        require(
            len(arguments) == 1 and not arguments[0].startswith("-") and "=" not in arguments[0],
            f"name one directory, that of the run, and no keys: minitron {look} runs/quickstart",
        )
        return import_module(f"minitron_nemo.{look}").run(Path(arguments[0]))
    except Mistake as error:
        print(f"minitron {look}: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one door. Returns the exit code; a mistake of the user's prints one message, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(recipes=", ".join(recipes())))
        return 0 if arguments else 2
    door, overrides = arguments[0].replace("_", "-"), arguments[1:]
    if door in LOOKS:
        return _look(door, overrides)
    if door not in DOORS:
        from minitron_nemo.checks import did_you_mean

        print(f"minitron: {door} is not a stage; {did_you_mean(door, (*DOORS, *LOOKS))}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(overrides) and not any(override.startswith("recipe=") for override in overrides):
        print(_STAGE_USAGE.format(door=door, about=_about(door), recipes=", ".join(recipes())))
        return 0
    set_up_environment()
    if door != "submit":
        leave_allocation()
    from minitron_nemo import doors

    return doors.open_door(door, overrides)


if __name__ == "__main__":
    sys.exit(main())
