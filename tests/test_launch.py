"""The ways in: `minitron`, `python launch/<stage>.py` and torchrun run the same stages and make the same thing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from minitron_nemo.artifact import open_artifact
from minitron_nemo.cli import DOORS, main
from minitron_nemo.conf_tree import recipes
from minitron_nemo.recipe import STAGES
from support.door import ROOT, Door, environment
from support.nodes import torchrun_on_two_nodes
from support.patience import run_patiently
from support.tiny import STEPS, TinyChain

COMMANDS = {
    "python": [sys.executable, "launch/distill.py"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "launch/distill.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "layout"), [("python", []), ("torchrun", ["trainer.tensor_model_parallel_size=2"])], ids=COMMANDS
)
def test_a_launched_distillation_has_the_losses_of_the_chain(
    tiny_chain: TinyChain, tmp_path: Path, launcher: str, layout: list[str]
) -> None:
    expected = losses(tiny_chain.run_dir / "distilled")
    done = run_patiently(
        [*COMMANDS[launcher], *tiny_chain.overrides, *layout, f"distill.output={tmp_path / 'distilled'}"],
        cwd=ROOT,
        env=environment() | {"PET_STANDALONE": "1"},  # torchrun's --standalone: a free port, beside other runs
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "distilled") == pytest.approx(expected, abs=1e-4)  # TP sums in another order


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(tiny_chain: TinyChain, tmp_path: Path) -> None:
    """Two agents of two ranks each: tensor parallelism within a node, data parallelism between them. Nobody says how
    many nodes there are."""
    output = tmp_path / "distilled"
    layout = ["trainer.tensor_model_parallel_size=2", "trainer.micro_batch_size=1", "trainer.tensorboard=true"]
    agents = torchrun_on_two_nodes(
        "launch/distill.py", *tiny_chain.overrides, *layout, f"distill.output={output}", processes_per_node=2
    )
    for agent in agents:
        assert agent.code == 0, agent.screen
    assert losses(output) == pytest.approx(losses(tiny_chain.run_dir / "distilled"), abs=1e-4)


def test_a_step_that_shares_a_stage_is_run_by_naming_its_section(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation"
    done = door("evaluate", *tiny_chain.overrides, "section=evaluate_pruned", f"evaluate_pruned.output={output}")
    assert done.code == 0, done.err
    expected = open_artifact(tiny_chain.run_dir / "evaluation_pruned").metrics
    assert open_artifact(output).metrics["held_out_loss"] == pytest.approx(expected["held_out_loss"], abs=1e-6)


def losses(model: Path) -> list[float]:
    records = [json.loads(line) for line in (model / "history.jsonl").read_text().splitlines()]
    found = [record["loss"] for record in records if "loss" in record]
    assert len(found) == STEPS
    return found


def test_every_stage_has_a_door_and_a_script_that_opens_it() -> None:
    assert set(DOORS) == {*STAGES, "compress", "plan", "submit"}
    opened = {}
    for script in (ROOT / "launch").glob("*.py"):
        (opened[script.stem],) = re.findall(r'main\(\["(.+?)", \*sys\.argv\[1:\]\]\)', script.read_text())
    # plan reckons and submit hands scripts to SLURM: nothing of them runs under torchrun
    assert opened == {door.replace("-", "_"): door for door in DOORS if door not in ("plan", "submit")}


def test_without_a_stage_the_usage_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    alone, asked = capsys.readouterr().out.split("usage: minitron <stage>")[1:]
    assert alone == asked
    assert ", ".join(DOORS) in alone
    assert "       minitron status RUNDIR\n       minitron cancel RUNDIR\n\nstages: " in alone
    assert f"recipes: {', '.join(recipes())}" in alone


@pytest.mark.parametrize("door", DOORS)
def test_help_of_a_stage_needs_no_recipe(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([door, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: minitron {door} recipe=<name>")
    assert f"\n{door}: " in shown
    assert f"keys: minitron {door} recipe=quickstart --cfg job" in shown


def test_hydras_options_answer(door: Door) -> None:
    config = door("distill", "recipe=quickstart", "distill.training.steps=7", "--cfg", "job")
    assert config.code == 0 and config.err == ""
    assert OmegaConf.create(config.out).distill.training.steps == 7
    section = door("distill", "recipe=quickstart", "--cfg", "job", "--package", "prune")
    assert {"model", "importance", "target", "output"} <= set(OmegaConf.create(section.out))
    assert f"recipe: {', '.join(recipes())}" in door("distill", "recipe=quickstart", "--help").out
    assert "recipe/quickstart" in door("distill", "recipe=quickstart", "--info", "defaults").out


def test_submit_names_a_mistake_of_any_step_before_it_writes(door: Door, tmp_path: Path) -> None:
    done = door(
        "submit", "recipe=quickstart", f"run_dir={tmp_path / 'run'}", "estimate_importance.importance.num_samples=0"
    )
    assert "num_samples=0 must be at least 1" in done.mistake
    assert not (tmp_path / "run").exists()


def test_a_mistyped_stage_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distil", "recipe=quickstart"]) == 2
    assert capsys.readouterr().err == "minitron: distil is not a stage; did you mean distill?\n"
