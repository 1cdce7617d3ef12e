"""What a person meets at the door who mistyped something: exit code 2 and one message with the mend."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from minitron_nemo import doors
from minitron_nemo.checks import Interrupted, Mistake, NothingKept
from minitron_nemo.conf_tree import recipes
from minitron_nemo.config.stages import PruneConfig
from minitron_nemo.ending import FAILED, RUNNING, STATE_FILE, STOPPED, leave_word
from minitron_nemo.recipe import Step
from minitron_nemo.stopping import STOP_FILE
from support.artifacts import listing
from support.door import ROOT, Door, environment
from support.patience import run_patiently

MISTYPED = {
    "a key with a typing error": (
        ["prune", "recipe=quickstart", "distill.training.stepz=3"],
        "distill.training.stepz is not a key of this recipe; did you mean distill.training.steps? "
        "All keys: minitron prune recipe=quickstart --cfg job",
    ),
    "a key that is nearly another": (
        ["prune", "recipe=quickstart", "trainer.tensor_parallel_size=2"],
        "did you mean trainer.tensor_model_parallel_size?",
    ),
    "a key without its section": (
        ["distill", "recipe=quickstart", "hidden_size=64"],
        "hidden_size is not a key of this recipe; did you mean prune.target.hidden_size or "
        "prune.budget.dims.hidden_size?",
    ),
    "a key like no other": (
        ["distill", "recipe=quickstart", "slurm.zzz=64"],
        "slurm.zzz is not a key of this recipe; known below slurm: ",
    ),
    "a dim with a typing error": (
        ["prune", "recipe=quickstart", "prune.target.hiden_size=64"],
        "prune.target.hiden_size is not in this recipe; did you mean prune.target.hidden_size?",
    ),
    "a dim the recipe leaves alone": (
        ["prune", "recipe=quickstart", "prune.target.num_query_groups=1"],
        "is written with a plus: +prune.target.num_query_groups=...",
    ),
    "a key of an earlier version": (
        ["distill", "recipe=quickstart", "trainer.num_nodes=2"],
        "trainer.num_nodes is no key any more: the launcher says how many nodes there are",
    ),
    "another key of an earlier version": (
        ["import-hf", "recipe=quickstart", "import_hf.trust_checkpoint=true"],
        "trust_checkpoint is no key any more: nothing in a checkpoint is run, whoever made it.",
    ),
    "one that moved": (
        ["compress", "recipe=quickstart", "compress.overwrite=true"],
        "compress.overwrite is no key any more: overwrite=true replaces what differs, at every door.",
    ),
    "a path that reads like such a key": (
        ["import-hf", "recipe=quickstart", "import_hf.model=/nowhere/trust_checkpoint"],
        "import_hf.model=/nowhere/trust_checkpoint",
    ),
    "two keys that do not fit": (
        ["distill", "recipe=quickstart", "distill.training.optim.min_lr=1"],
        "distill.training.optim.min_lr=1.0 must be at most distill.training.optim.lr=0.001.",
    ),
    "an unknown key forced in": (
        ["compress", "recipe=quickstart", "+distill.training.extra=3"],
        "distill.training.extra is not a key of this recipe",
    ),
    "a word for a number": (
        ["prune", "recipe=quickstart", "distill.training.steps=many"],
        "distill.training.steps=many: Value 'many' of type 'str' could not be converted to Integer.",
    ),
    "a number out of range": (
        ["distill", "recipe=quickstart", "distill.training.steps=0"],
        "distill.training.steps=0 must be at least 1; the default is 100.",
    ),
    "no equals sign": (
        ["prune", "recipe=quickstart", "distill.training.steps"],
        "distill.training.steps cannot be read as key=value (missing EQUAL at '<EOF>')",
    ),
    "half a list": (["prune", "recipe=quickstart", "prune.layers=[0"], "prune.layers=[0 cannot be read as key=value"),
    "an unknown recipe": (["prune", "recipe=quickstrat"], "recipe=quickstrat is not a file under"),
    "no recipe": (
        ["prune"],
        f"say which recipe: recipe=<name>. Known: {', '.join(recipes())}.",
    ),
    "an unknown stage": (["prone", "recipe=quickstart"], "prone is not a stage; did you mean prune?"),
    "an unknown section": (["prune", "recipe=quickstart", "section=prun"], "did you mean prune?"),
    "a section of another stage": (
        ["prune", "recipe=quickstart", "section=pruned_ce"],
        "section=pruned_ce is run by another stage: minitron pretrain section=pruned_ce",
    ),
    "an unknown step": (
        ["compress", "recipe=quickstart", "compress.steps=[prune,distil]"],
        "distil is not a section of a recipe; did you mean distill?",
    ),
    "a step of no stage": (
        ["compress", "recipe=quickstart", "compress.steps=[{stage: distil, name: again}]"],
        "compress.steps: distil is not a stage; did you mean distill?",
    ),
    "a step that takes its values from nowhere": (
        ["compress", "recipe=quickstart", "compress.steps=[{stage: distill, name: again, from: distil}]"],
        "compress.steps: again takes its values from distil, which is no step; did you mean distill?",
    ),
    "a step named as another is": (
        ["compress", "recipe=quickstart", "compress.steps=[{stage: evaluate, name: distill}]"],
        "compress.steps: distill is a step of stage distill already. Choose another name.",
    ),
    "a step with a key of its own": (
        ["compress", "recipe=quickstart", "compress.steps=[{stage: distill, name: again, steps: 3}]"],
        "with its values in a section of that name; not known: steps.",
    ),
    "steps that take their values from one another": (
        [
            "compress",
            "recipe=quickstart",
            "compress.steps=[{stage: prune, name: a, from: b}, {stage: prune, name: b, from: a}]",
        ],
        "a takes its values from b takes its values from a, without an end.",
    ),
    "a key of a table that a step takes from another": (
        ["compress", "recipe=quickstart", "prune_calibrated.target.hidden_size=96"],
        "A new entry of prune_calibrated.target is written with a plus: +prune_calibrated.target.hidden_size=",
    ),
    "a recipe without steps": (
        ["compress", "recipe=embedded_teacher"],
        "recipe embedded_teacher has no compress.steps",
    ),
    "a reference to nothing": (["prune", "recipe=quickstart", "run_dir=${nothing}"], "'nothing' not found"),
}


@pytest.mark.parametrize("case", MISTYPED)
def test_a_mistyped_command_is_answered_with_its_mend(door: Door, case: str) -> None:
    command, expected = MISTYPED[case]
    before = listing(door.working_directory)
    assert expected in door(*command).mistake
    assert listing(door.working_directory) == before


def test_a_mistake_in_the_last_step_is_found_before_the_first_one_runs(door: Door, tmp_path: Path) -> None:
    refused = door("compress", "recipe=quickstart", f"run_dir={tmp_path / 'run'}", "export_hf.dtype=fp8")
    assert "export_hf.dtype=fp8 is not known; use bf16 or fp32." in refused.mistake
    assert listing(tmp_path) == {}


def test_the_composed_config_is_shown_on_request(door: Door) -> None:
    shown = door("distill", "recipe=quickstart", "distill.training.steps=17", "--cfg", "job")
    assert shown.code == 0 and "steps: 17" in shown.out and "hidden_size: 160" in shown.out


def torchrun(*command: str) -> tuple[int, str]:
    """Exit code and all that came on the screen, in order."""
    done = run_patiently(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command],
        env=environment(),
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


ON_TWO_RANKS = {
    "met by both ranks": (
        ["launch/prune.py", "prune.model={empty}/teacher"],
        "minitron prune: prune.model={empty}/teacher does not exist.",
    ),
    "met by the one that reads": (
        ["launch/prepare_data.py", "prepare_data.corpus={empty}", "prepare_data.tokenizer=null"],
        "minitron prepare-data: corpus={empty} is a folder without files",
    ),
}


@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_a_mistake_on_two_ranks_is_said_once_and_all_stop(tmp_path: Path, case: str) -> None:
    (script, *overrides), message = ON_TWO_RANKS[case]
    empty, run_dir = tmp_path / "empty", tmp_path / "run"
    empty.mkdir()
    overrides = [override.format(empty=empty) for override in overrides]
    code, screen = torchrun(str(ROOT / script), "recipe=quickstart", f"run_dir={run_dir}", *overrides)
    assert code != 0
    assert len(re.findall("minitron [a-z-]+: ", screen)) == 1, screen
    ours, _, of_torchrun = screen.partition(message.format(empty=empty))
    assert of_torchrun and "Traceback" not in ours, screen
    assert "minitron_nemo" not in of_torchrun, screen  # torchrun's own summary may follow; no stack of ours does
    assert not run_dir.exists()


ONE_CANNOT_GO_ON = """
import os, sys, time, types
import minitron_nemo.ending, minitron_nemo.recipe
from minitron_nemo.checks import Mistake
from minitron_nemo.cli import main

how, who, run_dir = sys.argv[1:]

def run(config):
    from minitron_nemo.parallel import barrier
    if os.environ["RANK"] == who:
        raise Mistake("model=nowhere does not exist.") if how == "mistake" else RuntimeError("a fault of ours")
    time.sleep(600) if how == "mistake" else barrier()  # where no error reaches this rank, and where one does

if __name__ == "__main__":
    minitron_nemo.ending._TO_LEAVE = 1.0
    minitron_nemo.recipe.stage_module = lambda stage: types.SimpleNamespace(run=run)
    sys.exit(main(["evaluate", "recipe=quickstart", f"run_dir={run_dir}"]))
"""


@pytest.mark.parametrize(("how", "who", "code"), [("mistake", 1, 2), ("fault", 1, 1)])
def test_one_rank_that_cannot_go_on_ends_all_with_its_word(tmp_path: Path, how: str, who: int, code: int) -> None:
    """Ranks of two nodes, which no launcher ends together."""
    script = tmp_path / "evaluate.py"
    script.write_text(ONE_CANNOT_GO_ON)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    run = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(script), how, str(who), str(tmp_path / "run")]
    with ThreadPoolExecutor(2) as both:
        started = [
            both.submit(
                run_patiently,
                command,
                env=environment() | run | {"RANK": str(rank), "LOCAL_RANK": "0"},
                stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]
        done = [each.result() for each in started]
    assert [each.returncode for each in done] == [code, code], done
    said, silent = done[who].stdout, done[1 - who].stdout
    if how == "mistake":
        assert said == f"rank {who}: minitron evaluate: model=nowhere does not exist.\n"
    else:
        assert said.strip().endswith("RuntimeError: a fault of ours")
    assert "minitron" not in silent and "Traceback" not in silent, silent


def test_a_job_whose_time_ran_out_queues_itself_again_only_where_something_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slurm/stage.sbatch asks whether the file is still there; one that begins anew would run out of time for ever."""
    file = tmp_path / "01-prepare_data.stop"
    file.touch()
    monkeypatch.setenv(STOP_FILE, str(file))
    assert not doors._time_is_up(Interrupted("saved")) and file.exists()
    assert doors._time_is_up(NothingKept("begins anew")) and not file.exists()


@pytest.mark.parametrize(
    ("raised", "word"),
    [
        (None, "running"),  # the job succeeds, and nobody reads it
        (Interrupted("saved"), "stopped"),
        (NothingKept("begins anew"), "stopped"),
        (Mistake("trainer.seq_length=0"), "failed"),
        (FloatingPointError("a loss that is not finite"), "failed"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1"), "running"),
        (torch.distributed.DistNetworkError("a rank is gone"), "running"),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, Exception) else "",
)
def test_a_run_leaves_its_last_word_for_who_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception | None, word: str
) -> None:
    file = tmp_path / "01-distill.state"
    monkeypatch.setenv(STATE_FILE, str(file))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(doors, "hush", lambda: None)

    def run(*_: object) -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(doors, "_run", run)
    with contextlib.suppress(FloatingPointError, torch.distributed.DistError):
        doors.open_door("distill", ["recipe=quickstart"])
    assert file.read_text() == word


def test_another_rank_leaves_no_word_but_that_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_FILE, str(tmp_path / "state"))
    monkeypatch.setenv("RANK", "1")
    leave_word(STOPPED)
    assert not (tmp_path / "state").exists()
    leave_word(FAILED)
    monkeypatch.setenv("RANK", "0")
    leave_word(RUNNING)  # rank 0 comes later
    assert (tmp_path / "state").read_text() == FAILED


def test_a_job_has_its_own_section_before_hydras_options() -> None:
    step = Step("again", "distill", "distill")
    job = doors._job(step, PruneConfig(), ["recipe=mine", "section=distill", "slurm.nodes=4", "--config-dir", "here"])
    assert job.overrides == ("section=again", "recipe=mine", "--config-dir", "here")
