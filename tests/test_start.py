"""What each door imports before it answers: of what is slow to import, only what it needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_nemo.artifact import writing
from minitron_nemo.run_record import ListedStep, write_steps
from minitron_nemo.shape import ModelShape
from support.door import environment
from support.patience import run_patiently

SLOW = (
    *("torch", "megatron", "nemo", "nemo_run", "lightning", "pytorch_lightning", "modelopt"),
    *("transformers", "tokenizers", "datasets", "pyarrow", "pandas"),
    *("numpy", "scipy", "sklearn", "numba", "matplotlib", "tensorboard", "wandb"),
)
TEACHER = ModelShape("llama", 3, 24, 40, 6, 2, 8, padded_vocab_size=64, seq_length=32)
DOORS: dict[str, tuple[str, int, set[str]]] = {
    "help": ("--help", 0, set()),
    "help of a stage": ("prune --help", 0, set()),
    "help of surgery on files": ("prune-hf --help", 0, set()),
    "a mistyped stage": ("prone recipe=quickstart", 2, set()),
    "an unknown key": ("prune recipe=quickstart prune.targett=1", 2, set()),
    "a number out of range": ("distill recipe=quickstart distill.training.steps=0", 2, set()),
    "the composed config": ("prune recipe=quickstart --cfg job", 0, set()),
    "a chain's scripts": ("submit recipe=quickstart submit.dry_run=true run_dir=run", 0, set()),
    "how far a run is": ("status run", 0, set()),
    "what there is to cancel": ("cancel run", 0, set()),
    "a report": ("report recipe=quickstart run_dir=run", 0, {"torch", "numpy", "matplotlib"}),
}
"""Command, its exit code, and which of the slow packages have been imported when it ends."""

LOOK = """
import json, sys
from minitron_nemo.cli import main

code, (seen, *command) = None, sys.argv[1:]
try:
    code = main(command)
except SystemExit as leaving:  # Hydra's way to end
    code = leaving.code or 0
with open(seen, "w") as file:
    json.dump([code, sorted(sys.modules)], file)
"""


@pytest.mark.parametrize("door", DOORS)
def test_a_door_imports_what_it_needs_alone(door: str, tmp_path: Path) -> None:
    command, code, expected = DOORS[door]
    with writing(tmp_path / "run" / "teacher", stage="import-hf", config={}) as draft:  # for the report
        (draft.path / "shape.json").write_text(json.dumps(TEACHER.to_dict()))
        draft.metrics["parameters"] = TEACHER.num_parameters
    listed = ListedStep("import_hf", "import-hf", str(tmp_path / "run" / "teacher"))
    write_steps(tmp_path / "run", "compress", [listed])
    seen = tmp_path / "seen.json"
    done = run_patiently(
        [sys.executable, "-c", LOOK, str(seen), *command.split()],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.STDOUT,
    )
    assert seen.is_file(), done.stdout
    found, modules = json.loads(seen.read_text())
    assert found == code, done.stdout
    assert {name.partition(".")[0] for name in modules} & set(SLOW) == expected


@pytest.mark.parametrize(
    ("load", "given", "changed"),
    [
        (2.0, {}, "1000"),
        (0.1, {}, None),
        (2.0, {"GOMP_SPINCOUNT": "7"}, "7"),
        (2.0, {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_on_a_busy_machine_threads_that_wait_leave_the_core_to_others_soon(
    load: float, given: dict[str, str], changed: str | None
) -> None:
    """As libgomp says itself when torch loads it; a torch may come with another OpenMP, which has no such setting."""
    variables = {name: value for name, value in environment().items() if name != "GOMP_SPINCOUNT"}
    loaded = f"import os; os.getloadavg = lambda: ({load}, 0.0, 0.0)"
    script = f"{loaded}; from minitron_nemo.cli import set_up_environment; set_up_environment(); import torch; "
    script += "print('libgomp' in open('/proc/self/maps').read())"
    command = [sys.executable, "-c", script]
    done = run_patiently(command, env=variables | given | {"OMP_DISPLAY_ENV": "verbose"}, stderr=subprocess.STDOUT)
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stdout)
    if done.stdout.endswith("False\n"):
        pytest.skip("this torch has another OpenMP than libgomp")
    assert found is not None, done.stdout
    assert found[1] == changed if changed else int(found[1]) > 1000
