"""The whole chain on a model of fifty thousand parameters: what it makes, skips, refuses and takes up again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from support.artifacts import listing
from support.door import Door, kill_once_there
from support.tiny import STEPS, TinyChain, quickstart_overrides

CHAIN = {
    "teacher": "import-hf",
    "data": "prepare-data",
    "corrected_teacher": "correct-teacher",
    "importance": "estimate-importance",
    "student_pruned": "prune",
    "student_calibrated": "prune",
    "distilled": "distill",
    "distilled_calibrated": "distill",
    "pruned_ce": "pretrain",
    "from_scratch": "pretrain",
    "evaluation_teacher": "evaluate",
    "evaluation_corrected_teacher": "evaluate",
    "evaluation_pruned": "evaluate",
    "evaluation_pruned_calibrated": "evaluate",
    "evaluation_pruned_ce": "evaluate",
    "evaluation_from_scratch": "evaluate",
    "evaluation_distilled": "evaluate",
    "evaluation_distilled_calibrated": "evaluate",
    "export": "export-hf",
    "report": "report",
}


def test_the_chain_makes_every_artifact_and_nothing_else(tiny_chain: TinyChain) -> None:
    assert tiny_chain.done.code == 0, tiny_chain.done.err
    assert {path.name for path in tiny_chain.run_dir.iterdir()} == CHAIN.keys() | {"steps.json"}
    assert {name: open_artifact(tiny_chain.run_dir / name).stage for name in CHAIN} == CHAIN


def test_every_variant_has_a_finite_loss_over_the_same_held_out_tokens(tiny_chain: TinyChain) -> None:
    evaluations = [open_artifact(tiny_chain.run_dir / name).metrics for name in CHAIN if name.startswith("evaluation")]
    assert len({metrics["tokens"] for metrics in evaluations}) == 1
    for metrics in evaluations:
        assert 0 < metrics["held_out_loss"] < 2 * math.log(512)  # near that of a guess among 512 tokens
        assert math.isclose(metrics["perplexity"], math.exp(metrics["held_out_loss"]))


@pytest.mark.parametrize(
    "name", ["corrected_teacher", "distilled", "distilled_calibrated", "pruned_ce", "from_scratch"]
)
def test_every_training_leaves_its_history(tiny_chain: TinyChain, name: str) -> None:
    lines = (tiny_chain.run_dir / name / "history.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]) for record in records)


def test_controls_have_the_shape_and_tokens_of_the_distilled_student(tiny_chain: TinyChain) -> None:
    student = open_artifact(tiny_chain.run_dir / "distilled").metrics
    for control in ("pruned_ce", "from_scratch", "distilled_calibrated"):
        metrics = open_artifact(tiny_chain.run_dir / control).metrics
        assert (metrics["parameters"], metrics["tokens"]) == (student["parameters"], student["tokens"])
    teacher = open_artifact(tiny_chain.run_dir / "teacher").metrics
    assert student["parameters"] < teacher["parameters"]


def test_the_chain_ends_with_a_table_a_sample_and_where_things_are(tiny_chain: TinyChain) -> None:
    screen = tiny_chain.done.out
    students = ("distilled", "distilled (calibrated)", "pruned + CE", "from scratch", "calibrated only", "pruned only")
    for row in ("teacher", "corrected teacher", *students):
        assert f" {row} " in screen, screen
    loss = open_artifact(tiny_chain.run_dir / "evaluation_distilled").metrics["held_out_loss"]
    assert f"{loss:.3f}" in screen
    assert "The exported model continues a prompt:\ndef read_config(path):" in screen
    assert f"Hugging Face model: {tiny_chain.run_dir / 'export'}\n" in screen
    assert f"Report: {tiny_chain.run_dir / 'report' / 'report.html'}\n" in screen
    assert (tiny_chain.run_dir / "report" / "report.html").is_file()
    assert "Traceback" not in tiny_chain.done.err and "Warning" not in tiny_chain.done.err


def test_a_finished_chain_run_again_makes_nothing(door: Door, tiny_chain: TinyChain) -> None:
    before = listing(tiny_chain.directory)
    again = door("compress", *tiny_chain.overrides)
    assert again.code == 0 and listing(tiny_chain.directory) == before
    assert again.err.count("    complete: ") == len(CHAIN)
    assert again.out.splitlines()[:12] == tiny_chain.done.out.splitlines()[:12]  # the same table


def test_a_stages_own_door_keeps_what_is_current(door: Door, tiny_chain: TinyChain) -> None:
    before = listing(tiny_chain.directory)
    names = {stage: name for name, stage in reversed(CHAIN.items())}  # the first of each
    names |= {"pretrain section=pruned_ce": names.pop("pretrain")}
    names |= {"evaluate section=evaluate_teacher": names.pop("evaluate")}
    for command, name in names.items():
        again = door(*command.split(), *tiny_chain.overrides)
        path = tiny_chain.run_dir / name
        assert (again.code, again.out, again.err) == (0, f"{path}\n", f"    complete: {path}\n")
    assert listing(tiny_chain.directory) == before


def test_a_stages_own_door_refuses_what_differs_until_told_to_replace_it(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    run_dir, teacher = tmp_path / "run", tmp_path / "run" / "teacher"
    overrides = quickstart_overrides(tmp_path, tiny_chain.teacher, tiny_chain.corpus)
    assert door("import-hf", *overrides).code == 0
    assert door("report", *overrides).code == 0
    before = listing(run_dir)
    changed = [*overrides, "import_hf.make_vocab_size_divisible_by=64"]
    refused = door("import-hf", *changed)
    assert (
        f"minitron import-hf: {teacher} is complete but was made with make_vocab_size_divisible_by=1, not 64. "
        "Remove it, choose another run_dir, or set overwrite=true." in refused.mistake
    )
    another = door("evaluate", *overrides, f"evaluate.model={teacher}", f"evaluate.output={teacher}", "overwrite=false")
    assert f"{teacher} is complete but was made by stage import-hf, not evaluate." in another.mistake
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    mine = door("import-hf", *overrides, f"import_hf.output={tmp_path / 'mine'}", "overwrite=true")
    assert f"{tmp_path / 'mine'} is there and is no artifact: import-hf would take its place." in mine.mistake
    assert listing(run_dir) == before

    digest = open_artifact(teacher).digest
    replaced = door("import-hf", *changed, "overwrite=true")
    assert replaced.code == 0 and open_artifact(teacher).digest != digest
    replaced = listing(run_dir)
    assert "    complete: " in door("import-hf", *changed, "overwrite=true").err and listing(run_dir) == replaced
    assert "    complete: " not in door("report", *overrides).err  # a report shows what is there, without being asked
    assert open_artifact(run_dir / "report").manifest["inputs"][0]["digest"] == open_artifact(teacher).digest


def test_how_a_step_ran_is_no_reason_to_remake_it(door: Door, tiny_chain: TinyChain) -> None:
    again = door("compress", *tiny_chain.overrides, "trainer.micro_batch_size=1", "data.num_workers=1")
    assert again.code == 0 and again.err.count("    complete: ") == len(CHAIN)


def test_a_changed_key_is_refused_by_name(door: Door, tiny_chain: TinyChain) -> None:
    before = listing(tiny_chain.directory)
    refused = door("compress", *tiny_chain.overrides, "distill.training.optim.lr=0.5")
    assert (
        f"{tiny_chain.run_dir / 'distilled'} is complete but was made with training.optim.lr=0.001, not 0.5. "
        "Remove it, choose another run_dir, or set overwrite=true." in refused.mistake
    )
    assert listing(tiny_chain.directory) == before


def test_a_chain_killed_between_steps_goes_on_and_a_changed_key_remakes_what_hangs_on_it(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    steps = "import_hf,prepare_data,correct_teacher,estimate_importance,prune,evaluate_pruned"
    overrides = [
        *quickstart_overrides(tmp_path, tiny_chain.teacher, tiny_chain.corpus),
        f"compress.steps=[{steps}]",
    ]
    kill_once_there(run_dir / "importance" / "manifest.json", ["compress", *overrides])
    made = [name for name in list(CHAIN)[:5] if (run_dir / name / "manifest.json").is_file()]
    assert "importance" in made and not (run_dir / "evaluation_pruned").exists()
    before = {name: listing(run_dir / name) for name in made}

    resumed = door("compress", *overrides)
    assert resumed.code == 0, resumed.err
    assert resumed.err.count("    complete: ") == len(made)
    assert {name: listing(run_dir / name) for name in made} == before
    assert open_artifact(run_dir / "evaluation_pruned").metrics["held_out_loss"] > 0

    changed = [*overrides, "prune.target.ffn_hidden_size=40"]
    assert "was made with target.ffn_hidden_size=48, not 40" in door("compress", *changed).mistake
    remade = door("compress", *changed, "overwrite=true")
    assert remade.code == 0, remade.err
    assert {name: listing(run_dir / name) for name in made if name != "student_pruned"} == {
        name: listed for name, listed in before.items() if name != "student_pruned"
    }
    pruned, evaluated = open_artifact(run_dir / "student_pruned"), open_artifact(run_dir / "evaluation_pruned")
    assert pruned.manifest["config"]["target"]["ffn_hidden_size"] == 40
    assert evaluated.metrics["parameters"] == pruned.metrics["parameters"]
    assert pruned.digest in [given["digest"] for given in evaluated.manifest["inputs"]]
