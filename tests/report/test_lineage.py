"""Which artifact was made from which, and which plan, importance and export of several a report shows."""

from __future__ import annotations

import os
from pathlib import Path

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.config.stages import ReportRow
from minitron_nemo.report import read_run
from support.report_runs import (
    STUDENT,
    TEACHER,
    TOKENS,
    importance_of,
    page_of,
    report_of,
    write_export,
    write_importance,
    write_model,
    write_pruned,
    write_run,
)


def write_second_cut(run_dir: Path) -> Artifact:
    """Another importance and a cut by it, with no student but itself."""
    teacher = open_artifact(run_dir / "teacher")
    scores = write_importance(run_dir, "importance_on_code", importance_of(TEACHER), [teacher])
    return write_pruned(run_dir, "student_calibrated", importance_of(TEACHER), STUDENT, [teacher, scores])


def test_a_model_is_traced_to_the_cut_it_came_from(tmp_path: Path) -> None:
    write_run(tmp_path)
    twice = write_model(tmp_path, "distilled_twice", "distill", STUDENT, [open_artifact(tmp_path / "distilled")])
    again = write_pruned(tmp_path, "cut_again", importance_of(TEACHER), STUDENT, [twice])
    write_model(tmp_path, "distilled_small", "distill", STUDENT, [twice, again])
    lineage = read_run(tmp_path).lineage

    cuts = lineage.made_by("prune")
    assert lineage.inputs("distilled_small") == ["distilled_twice", "cut_again"]
    assert lineage.nearest("distilled_twice", cuts) == "student_pruned"
    assert lineage.nearest("distilled_small", cuts) == "cut_again"
    assert lineage.nearest("teacher", cuts) is None
    assert lineage.sources_first(["distilled_twice", "student_pruned", "teacher"]) == [
        "teacher", "student_pruned", "distilled_twice"
    ]  # fmt: skip


def test_of_two_plans_the_one_most_students_were_cut_by_is_shown_with_its_importance(tmp_path: Path) -> None:
    write_second_cut(write_run(tmp_path))
    run = read_run(tmp_path, report_of(tmp_path).rows)
    assert (run.pruned, run.importance) == ("student_pruned", "importance")

    page = page_of(report_of(tmp_path))
    assert "The plan is that of student_pruned; also pruned in this run: student_calibrated." in page.text


def test_of_two_plans_with_as_many_students_the_lower_row_is_shown(tmp_path: Path) -> None:
    teacher = write_model(tmp_path, "teacher", "import-hf", TEACHER)
    for name in ("cut_one", "cut_two"):
        write_pruned(tmp_path, name, importance_of(TEACHER), STUDENT, [teacher])
    rows = [ReportRow(str(tmp_path / name)) for name in ("cut_two", "cut_one")]

    assert read_run(tmp_path, rows).pruned == "cut_one"
    assert read_run(tmp_path).pruned == "cut_two"


def test_an_importance_that_no_plan_used_is_shown_where_it_is_the_newest(tmp_path: Path) -> None:
    for age, name in ((100, "importance_on_text"), (200, "importance_on_code")):
        made = write_importance(tmp_path, name, importance_of(TEACHER))
        os.utime(made.path / "manifest.json", (1e9 - age, 1e9 - age))

    assert read_run(tmp_path).importance == "importance_on_text"


def test_of_two_exports_that_of_the_highest_student_speaks_and_both_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_export(tmp_path, "export_of_control", open_artifact(tmp_path / "pruned_ce"), 9.9e-6)
    write_export(tmp_path, "export_of_teacher", open_artifact(tmp_path / "teacher"), 1.1e-6)
    config = report_of(tmp_path)

    assert read_run(tmp_path, config.rows).export == "export"
    text = page_of(config).text
    places = [text.index(f"at most\n{difference}") for difference in ("3.4e-06", "9.9e-06", "1.1e-06")]
    assert places == sorted(places)


def test_tokens_are_those_of_the_models_own_stage(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    assert [run.tokens(name) for name in ("teacher", "student_pruned", "distilled")] == [None, 0, TOKENS]
