"""A family: several students of one recipe, each made of the one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from minitron_nemo.checks import Mistake
from minitron_nemo.recipe import chain_of, compose, config_of
from minitron_nemo.shape import ModelShape
from support.door import Door
from support.tiny import TinyChain

FAMILY = """
# @package _global_
defaults:
  - quickstart
  - _self_

family: [half, quarter]

prune_quarter:
  target: {hidden_size: 16}
  layers: [0, 1, 3]

report: {rows: [], expected_order: []}

compress:
  steps: [import_hf, prepare_data, correct_teacher, estimate_importance, prune, distill, evaluate, export_hf, report]
"""
MADE = ["estimate_importance", "prune", "distill", "evaluate", "export_hf"]


def folder_of_recipe(directory: Path) -> Path:
    (directory / "recipe").mkdir()
    (directory / "recipe" / "members.yaml").write_text(FAMILY)
    return directory


def composed(*overrides: str, recipe: str = "nemotron4_15b_to_8b_to_4b") -> dict[str, dict[str, str]]:
    """Of the chain's steps, in their order, what each reads."""
    config, steps = compose([f"recipe={recipe}", "run_dir=run", *overrides])
    keys = ("model", "importance", "teacher", "student")
    configs = {name: config_of(steps[name], config) for name in chain_of(config)}
    return {
        name: {key: getattr(each, key) for key in keys if isinstance(getattr(each, key, None), str)}
        for name, each in configs.items()
    }


@pytest.mark.parametrize(("taught_by", "second"), [("first", "run/teacher"), ("last", "run/distill_8b")])
def test_each_member_is_made_of_the_one_before_and_taught_by_the_first_teacher_or_by_it(
    taught_by: str, second: str
) -> None:
    chain = composed(f"family_teacher={taught_by}")
    members = [f"{step}_{member}" for member in ("8b", "4b") for step in MADE]
    assert list(chain) == ["import_hf", "prepare_data", "evaluate_teacher", *members, "report"]
    for member, source, teacher in (("8b", "run/teacher", "run/teacher"), ("4b", "run/distill_8b", second)):
        scores, cut = f"run/estimate_importance_{member}", f"run/prune_{member}"
        assert chain[f"estimate_importance_{member}"] == {"model": source}
        assert chain[f"prune_{member}"] == {"model": source, "importance": scores}
        assert chain[f"distill_{member}"] == {"teacher": teacher, "student": cut}
        assert chain[f"evaluate_{member}"] == chain[f"export_hf_{member}"] == {"model": f"run/distill_{member}"}


def test_a_member_has_the_values_of_the_step_it_follows_but_for_its_own() -> None:
    """Also those that the command line gives that step."""
    typed = ["distill.training.steps=70", "+prune.target.num_query_groups=4", "+prune_4b.keep.ffn_hidden_size=0.5"]
    config, steps = compose(["recipe=nemotron4_15b_to_8b_to_4b", *typed])
    larger, smaller = (config_of(steps[f"prune_{member}"], config) for member in ("8b", "4b"))
    assert larger.target == {"hidden_size": 4096, "ffn_hidden_size": 16384, "num_query_groups": 4}
    assert smaller.target == larger.target | {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24}
    assert (larger.keep, smaller.keep) == ({}, {"ffn_hidden_size": 0.5})
    assert [config_of(steps[f"distill_{member}"], config).training.steps for member in ("8b", "4b")] == [70, 70]


def test_a_part_of_a_familys_chain_is_run_by_naming_it() -> None:
    assert list(composed("compress.steps=[import_hf,prepare_data]")) == ["import_hf", "prepare_data"]
    assert list(composed("compress.steps=[evaluate_4b,report]")) == ["evaluate_4b", "report"]
    assert list(composed("compress.steps=[distill,report]")) == ["distill_8b", "distill_4b", "report"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["family=[8b,8b]"], "8b must be letters, digits and underscores, and there once"),
        (["family=[8b,'4-b']"], "4-b must be letters, digits and underscores, and there once"),
        (["family_teacher=both"], "family_teacher=both must be first, which teaches all members, or last"),
        (["family=[hf]"], "family: prune_hf is another step already. Name the member otherwise."),
        (["family_teacher=last", "distill.teacher_logits=stored"], "and distill.teacher_logits=stored is of one"),
        (
            ["distill.distillation.teacher_lr=1e-6", "distill.corrected_teacher=run/taught"],
            "distill.corrected_teacher=run/taught would be written by every member of the family.",
        ),
    ],
)
def test_a_family_that_cannot_be_says_why(given: list[str], words: str) -> None:
    with pytest.raises(Mistake) as refused:
        composed(*given)
    assert words in str(refused.value)


def test_a_member_must_be_smaller_than_the_one_before() -> None:
    with pytest.raises(Mistake, match="family: 4b would be what 8b is: prune_4b has the same target and layers"):
        composed("family=[8b,4b]", recipe="nemotron4_15b_to_8b")
    composed("family=[8b,4b]", "+prune.keep.hidden_size=0.5", "prune.target={}", recipe="nemotron4_15b_to_8b")


def test_a_family_of_two_is_made_by_one_command(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    conf, run_dir = folder_of_recipe(tmp_path), tmp_path / "run"
    given = [value for value in tiny_chain.overrides if not value.startswith(("recipe=", "run_dir="))]
    command, folder = ["compress", "recipe=members", f"run_dir={run_dir}", *given], ["--config-dir", str(conf)]

    done = door(*command, *folder)

    assert done.code == 0, done.err
    teacher, half, quarter = (
        ModelShape.from_dict(json.loads((run_dir / name / "shape.json").read_text()))
        for name in ("corrected_teacher", "distill_half", "distill_quarter")
    )
    assert half == teacher.pruned_to(hidden_size=24, ffn_hidden_size=48, num_attention_heads=4)
    assert quarter == half.pruned_to(num_layers=3, hidden_size=16)
    inputs = {given["path"] for given in open_artifact(run_dir / "distill_quarter").manifest["inputs"]}
    assert {str(run_dir / name) for name in ("corrected_teacher", "prune_quarter")} <= inputs
    assert (run_dir / "export_hf_half").is_dir() and (run_dir / "export_hf_quarter").is_dir()
    for member in ("half", "quarter"):
        loss = open_artifact(run_dir / f"evaluate_{member}").metrics["held_out_loss"]
        assert f"{loss:.3f}" in done.out, done.out

    again = door(*command, "family_teacher=last", "compress.steps=[estimate_importance,prune,distill]", *folder)
    assert "distill_quarter is complete but was made with teacher=" in again.mistake
