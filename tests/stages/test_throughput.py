"""The stage on a finished chain, and its numbers in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from support.door import Door
from support.report_runs import Page
from support.tiny import TinyChain

QUICK = [
    "throughput.batch_size=2",
    "throughput.prompt_tokens=8",
    "throughput.new_tokens=24",
    "throughput.repeats=3",
    "throughput.max_batch_size=4",
]


def test_teacher_and_student_of_a_chain_are_timed_and_the_report_shows_it(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for artifact in tiny_chain.run_dir.iterdir():
        if artifact.name != "report":
            (run_dir / artifact.name).symlink_to(artifact)
    overrides = [each for each in tiny_chain.overrides if not each.startswith("run_dir=")] + [f"run_dir={run_dir}"]

    done = door("throughput", *overrides, *QUICK)
    assert done.code == 0, done.err
    made = open_artifact(run_dir / "throughput")
    found = json.loads((made.path / "throughput.json").read_text())
    rows = {(row["label"], row["batch_size"]): row for row in found["rows"]}
    assert list(rows) == [("teacher", 2), ("student", 2), ("teacher", 4), ("student", 4)]
    student = rows["student", 2]
    shape = open_artifact(run_dir / "distilled").metrics["parameters"]
    assert (student["parameters"], student["weights"]) == (shape, "its own")
    assert [Path(given["path"]).name for given in made.manifest["inputs"]] == ["export"]
    assert made.metrics["decode_times_first_model"]["teacher"] == 1
    assert "| teacher | 2 | 8 + 24 |" in (made.path / "table.md").read_text() and "Throughput" in done.out

    reported = door("report", *overrides)
    assert reported.code == 0, reported.err
    page = Page((run_dir / "report" / "report.html").read_text())
    speed = [row for row in page.rows if len(row) == 9 and row[2].startswith("transformers")]
    assert [row[0] for row in speed] == ["teacher", "distilled"] * 2  # by their names in the report
    assert speed[1][6] == f"{student['decode_tokens_per_s']:,.1f}"
    assert "The largest batch is 2 doubled, at most 4 sequences" in page.text
    times = student["decode_tokens_per_s"] / rows["teacher", 2]["decode_tokens_per_s"]
    said = f"tokens/s at batch 2 (transformers), {times:.2f}x the teacher's."
    assert said in page.text  # also where the best student is another one of the same shape


def test_a_context_that_is_too_short_is_named_by_the_door(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    refused = door("throughput", *tiny_chain.overrides, f"throughput.output={tmp_path / 'it'}")
    assert (
        "throughput.prompt_tokens=128 and new_tokens=64 are 192 tokens, and teacher reads at most 64" in refused.mistake
    )
    assert "throughput.batch_size=0 must be at least 1" in door(
        "throughput", *tiny_chain.overrides, "throughput.batch_size=0"
    ).mistake  # fmt: skip


@pytest.mark.parametrize("models", ["[]", "[{model: embedded, name: x}]"])
def test_models_that_say_nothing_are_refused_by_the_door(door: Door, models: str, tmp_path: Path) -> None:
    output = f"throughput.output={tmp_path / 'it'}"
    assert "throughput.models" in door("throughput", "recipe=quickstart", f"throughput.models={models}", output).mistake
