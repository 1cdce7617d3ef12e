"""A recipe of one's own adds a step to the chain without touching Python."""

from __future__ import annotations

import re
from pathlib import Path

from minitron_nemo.artifact import open_artifact
from support.door import Door
from support.tiny import STEPS, TinyChain

MINE = """
# @package _global_
defaults:
  - quickstart
  - _self_

distill_again:
  student: ${distill.output}
  distillation:
    divergence: {kind: reverse_kl}
  training:
    steps: 2

compress:
  steps:
    - import_hf
    - prepare_data
    - correct_teacher
    - estimate_importance
    - prune
    - distill
    - {stage: distill, name: distill_again, from: distill}
    - {stage: evaluate, name: evaluate_again, from: evaluate}
    - report

evaluate_again:
  model: ${distill_again.output}
"""


def test_a_second_distillation_with_another_loss_is_a_few_lines_of_yaml(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(MINE)
    given = [override for override in tiny_chain.overrides if not override.startswith(("recipe=", "run_dir="))]
    run_dir = tmp_path / "run"

    done = door("compress", "recipe=mine", f"run_dir={run_dir}", *given, "--config-dir", str(tmp_path))

    assert done.code == 0, done.err
    first, again = (open_artifact(run_dir / name).manifest for name in ("distilled", "distill_again"))
    assert again["config"]["distillation"]["divergence"]["kind"] == "reverse_kl"
    assert (first["config"]["training"]["steps"], again["config"]["training"]["steps"]) == (STEPS, 2)
    assert again["config"]["training"]["optim"] == first["config"]["training"]["optim"]  # not said anew: as the first's
    assert again["config"]["teacher"] == first["config"]["teacher"]
    assert [given["path"] for given in again["inputs"]].count(str(run_dir / "distilled")) == 1
    evaluation = open_artifact(run_dir / "evaluate_again")
    assert evaluation.facts["model"] == str(run_dir / "distill_again")
    row = re.search(r"^ *distill_again .*$", done.out, flags=re.MULTILINE)
    assert row is not None and f"{evaluation.metrics['held_out_loss']:.3f}" in row[0]


def test_a_step_of_ones_own_is_run_alone_by_its_section(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(MINE)
    given = [override for override in tiny_chain.overrides if not override.startswith("recipe=")]
    mine = ["recipe=mine", *given, "section=distill_again", f"distill_again.output={tmp_path / 'alone'}"]

    done = door("distill", *mine, "--config-dir", str(tmp_path))

    assert done.code == 0, done.err
    assert open_artifact(tmp_path / "alone").metrics["steps"] == 2
