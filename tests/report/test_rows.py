"""The run in numbers: which models are rows, what they are measured against, what is admitted to be missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.stages import ReportConfig, ReportRow
from minitron_nemo.report import summary
from minitron_nemo.stages.report import run
from support.report_runs import LOSSES, STUDENT, TEACHER, TOKENS, report_of, write_evaluation, write_model, write_run


def summary_of(run_dir: Path, recipe: str = "quickstart") -> dict[str, Any]:
    config = report_of(run_dir, recipe)
    return summary(config.run_dir, config.rows, config.expected_order)


def labels(values: dict[str, Any]) -> list[str]:
    return [row["label"] for row in values["rows"]]


def write_distilled_twice(run_dir: Path) -> None:
    """A second distillation, of a step that no recipe of the package has."""
    twice = write_model(
        run_dir, "distilled_twice", "distill", STUDENT, [open_artifact(run_dir / "distilled")], tokens=TOKENS
    )
    write_evaluation(run_dir, twice, 2.99)


def test_rows_stand_as_the_recipe_says(tmp_path: Path) -> None:
    values = summary_of(write_run(tmp_path))

    assert labels(values) == [
        "teacher", "corrected teacher", "distilled (calibrated)", "distilled", "pruned + CE", "from scratch",
        "pruned only",
    ]  # fmt: skip
    assert values["reference_teacher"] == "corrected_teacher" and values["order"]["holds"]
    assert values["missing"] == []


def test_a_step_of_ones_own_gets_a_row_from_the_config_alone(tmp_path: Path) -> None:
    write_distilled_twice(write_run(tmp_path))
    rows = [
        ReportRow(str(tmp_path / "teacher"), teacher=True),
        ReportRow(str(tmp_path / "distilled_twice"), "distilled, and again"),
        *(ReportRow(str(tmp_path / name)) for name in ("distilled", "pruned_ce")),
    ]
    values = summary(tmp_path, rows, ["distilled_twice", "distilled", "pruned_ce"])

    assert labels(values)[:5] == ["corrected_teacher", "teacher", "distilled, and again", "distilled", "pruned_ce"]
    assert (
        values["order"]["holds"]
        and "holds: distilled, and again 2.990 < distilled 3.050" in values["order"]["statement"]
    )
    assert values["rows"][2]["gap_to_teacher"] == pytest.approx(2.99 - LOSSES["teacher"])
    assert values["other_evaluations"] == {}


def test_a_step_of_ones_own_gets_a_row_beside_those_of_the_recipe_it_begins_from(tmp_path: Path) -> None:
    write_distilled_twice(write_run(tmp_path))
    values = summary_of(tmp_path)

    assert labels(values)[-2:] == ["pruned only", "distilled_twice"]
    order = summary(tmp_path, report_of(tmp_path).rows, ["distilled_twice", "distilled", "distilled_thrice"])["order"]
    assert "distilled_twice 2.990 < distilled 3.050" in order["statement"]
    assert "no held-out loss is known: distilled_thrice." in order["statement"]
    assert values["rows"][-1]["gap_to_teacher"] == pytest.approx(2.99 - LOSSES["corrected_teacher"])


def test_without_rows_every_model_is_one_after_those_it_was_made_from(tmp_path: Path) -> None:
    write_distilled_twice(write_run(tmp_path))
    values = summary(tmp_path)

    assert labels(values) == [
        "teacher", "corrected_teacher", "student_pruned", "distilled", "distilled_calibrated", "distilled_twice",
        "from_scratch", "pruned_ce",
    ]  # fmt: skip
    assert values["reference_teacher"] == "corrected_teacher"
    assert values["order"] == {"holds": None, "complete": False, "statement": ""} and values["missing"] == []


def test_a_model_of_another_place_has_a_row_and_its_evaluation_counts(tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "models", "teacher", "import-hf", TEACHER)
    run_dir = tmp_path / "run"
    pruned = write_model(run_dir, "student_pruned", "prune", STUDENT, [teacher])
    write_evaluation(run_dir, teacher, 2.9)
    write_evaluation(run_dir, pruned, 4.2)
    values = summary(run_dir, [ReportRow(str(teacher.path), teacher=True)])

    assert [(row["name"], row["label"]) for row in values["rows"]] == [
        (str(teacher.path), "teacher"),
        ("student_pruned", "student_pruned"),
    ]
    assert values["rows"][1]["gap_to_teacher"] == pytest.approx(1.3)


def test_missing_models_are_named_and_what_else_is_missing_with_the_stage_that_makes_it(tmp_path: Path) -> None:
    teacher = write_model(tmp_path, "teacher", "import-hf", TEACHER)
    write_evaluation(tmp_path, teacher, 2.91)
    (tmp_path / "distilled.partial").mkdir()
    values = summary_of(tmp_path)

    assert "pruned_ce: no artifact, so no row 'pruned + CE'." in values["missing"]
    assert "importance (stage estimate-importance): no artifact." in values["missing"]
    assert "export (stage export-hf): no artifact." in values["missing"]
    assert not any("teacher:" in missing and "corrected" not in missing for missing in values["missing"])
    assert not any("calibrated" in missing for missing in values["missing"])  # optional
    claim = "The expected order (distilled < pruned + CE < pruned only) cannot be checked."
    assert values["order"]["statement"].startswith(claim)


def test_a_run_that_only_prunes_misses_no_training(tmp_path: Path) -> None:
    teacher = write_model(tmp_path, "teacher", "import-hf", TEACHER)
    write_evaluation(tmp_path, teacher, 2.91)
    write_evaluation(tmp_path, write_model(tmp_path, "student_pruned", "prune", TEACHER), 4.2)
    values = summary_of(tmp_path, "prune")

    assert labels(values) == ["teacher", "pruned only"]
    assert [sentence.split()[0] for sentence in values["missing"]] == ["importance", "export"]
    assert values["order"]["statement"].startswith("Nothing was trained in this run")
    assert summary(tmp_path)["order"]["statement"].startswith("Nothing was trained in this run")
    (tmp_path / "distilled.training").mkdir()
    assert summary_of(tmp_path, "prune")["order"]["statement"].startswith("The expected order")


def test_a_model_without_evaluation_keeps_its_row_and_leaves_the_order_open(tmp_path: Path) -> None:
    values = summary_of(write_run(tmp_path, {**LOSSES, "pruned_ce": None}))

    row = next(row for row in values["rows"] if row["name"] == "pruned_ce")
    assert row["held_out_loss"] is None and row["gap_to_teacher"] is None and row["tokens"] == TOKENS
    assert values["order"]["holds"] is True and values["order"]["complete"] is False
    assert values["order"]["statement"].startswith("As far as it can be checked, the expected order holds")
    assert "no held-out loss is known: pruned + CE." in values["order"]["statement"]


def test_an_evaluation_of_an_earlier_version_does_not_count(tmp_path: Path) -> None:
    write_run(tmp_path)
    pruned = open_artifact(tmp_path / "student_pruned")
    write_model(tmp_path, "distilled", "distill", STUDENT, [pruned], tokens=2 * TOKENS)
    values = summary_of(tmp_path)

    assert next(row for row in values["rows"] if row["name"] == "distilled")["held_out_loss"] is None
    assert any("evaluation_distilled was made from an earlier version of distilled" in note for note in values["notes"])
    assert any(
        "equal training tokens: " in sentence and ", distilled 81,920" in sentence for sentence in values["fairness"]
    )


def test_a_moved_run_is_still_read(tmp_path: Path) -> None:
    moved = write_run(tmp_path / "before").rename(tmp_path / "after")
    for values in (summary_of(moved), summary(moved, report_of(tmp_path / "before").rows)):
        assert {row["name"]: row["held_out_loss"] for row in values["rows"]} == LOSSES
        assert values["notes"] == []


def test_a_loss_that_is_not_finite_is_said_and_keeps_the_json_valid(tmp_path: Path) -> None:
    write_run(tmp_path, {**LOSSES, "pruned_ce": math.nan})
    artifact = run(report_of(tmp_path))
    values = json.loads((artifact.path / "summary.json").read_text(), parse_constant=pytest.fail)

    assert "The held-out loss of pruned_ce is nan, not a finite number: its training diverged." in values["notes"]
    assert "pruned + CE" in values["order"]["statement"].split("Not compared")[1]


def test_an_empty_or_absent_run_directory_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished artifact"):
        run(ReportConfig(tmp_path, tmp_path / "report"))
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory\. Set run_dir"):
        run(ReportConfig(tmp_path / "nowhere", tmp_path / "report"))
    assert list(tmp_path.iterdir()) == []
