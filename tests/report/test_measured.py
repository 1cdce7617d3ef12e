"""What a person learns in a minute, and the tables of all that stages measure."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.stages.report import run
from support.artifacts import change_manifest
from support.report_runs import STUDENT, TEACHER, TOKENS, Page, report_of, write_measured_run, write_run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(report_of(write_measured_run(tmp_path_factory.mktemp("measured"))))


@pytest.fixture(scope="module")
def page(measured: Artifact) -> Page:
    return Page((measured.path / "report.html").read_text())


def test_the_top_says_what_was_gained_lost_and_paid(measured: Artifact, page: Page) -> None:
    top = page.text[: page.text.index("The models in numbers")]
    share = STUDENT.num_parameters / TEACHER.num_parameters
    flops = STUDENT.flops_per_token(32) / TEACHER.flops_per_token(32)

    assert "Gained" in top and f"parameters ({share:.0%})." in top  # of the best student, not of the first row alone
    assert top.count("distilled (calibrated)") == 1 and f"A token costs {flops:.0%} of the arithmetic" in top
    assert "It writes 180 tokens/s at batch 8 (transformers), 1.50x the teacher's." in top
    assert "Held-out loss is 3.010 nats per token instead of 2.880, 0.130 more: perplexity 20.29" in top
    assert "0.210 nats (KL) away" in top
    # the cut alone: 6.20 - 2.88; what is left of it 3.01 - 2.88
    assert f"The cut alone cost 3.320; training on 41.0k tokens won back {1 - 0.13 / 3.32:.0%} of that." in top
    assert "CPU-hours over" in top or "GPU-hours" in top
    text = (measured.path / "report.md").read_text()
    assert "**Lost.** Held-out loss is 3.010 nats per token instead of 2.880" in text


def test_what_stages_measured_is_in_tables(page: Page) -> None:
    rows = {tuple(row[:2]): row for row in page.rows if len(row) > 1}

    share = f"{STUDENT.num_parameters / TEACHER.num_parameters:.0%}"
    kept = f"keeps 90% of the teacher at {share} of its parameters (mean over 2 tasks; chance is not taken off)"
    assert ["distilled", "0.450 ± 0.010", "0.675 ± 0.010", kept] in page.rows
    assert ["distilled", "+3.320", "+0.170", "95%", "41.0k", f"{3.15e6 / TOKENS:.3g}"] in page.rows
    assert ["distilled", "3.350", "0.550", "2.950", "0.150"] in page.rows  # sources by name: a<b|c, stdlib
    at, distance = [2 * math.exp(-step / 4) for step in (5, 20)], 0.2 + 0.01
    from_to = [
        f"{at[0] + more:.3f} → {at[1] + more:.3f}"
        for more in (0.2 + 2.85 - 0.1, distance - 0.1, 0.2 + 2.85 + 0.3, distance + 0.3)
    ]
    assert ["distilled", *from_to] in page.rows  # by source: stdlib, a<b|$c
    assert "source-curves-figure_1" in page.ids and "a<b|$c" in page.text
    assert rows["distilled (calibrated)", "900k"][5:8] == ["13,500", "180.0", "0.067"]
    ends = ["5.000", "3.500", "1.02k", "yes"]
    assert ["★ 1", "hidden_size=16, num_layers=3", "900k", "2.0 MB", "12.30", "–", *ends] in page.rows
    assert "4,608 space → 15 feasible" in page.text


def test_teacher_and_student_write_side_by_side_and_what_they_write_is_text(page: Page, measured: Artifact) -> None:
    shown = page.text[page.text.index("What they write") :]
    assert shown.index("corrected_teacher returns") < shown.index("distilled_calibrated returns")
    assert (
        shown.index("distilled_calibrated returns") < shown.index("The other models") < shown.index("pruned_ce returns")
    )
    assert "b" not in page.tags and "script" not in page.tags
    markdown = (measured.path / "report.md").read_text()
    assert "```\ndistilled_calibrated | wanders\n```" in markdown and "a&lt;b\\|c: loss" in markdown


def test_a_search_is_drawn_and_told_to_who_does_not_see_it(page: Page, measured: Artifact) -> None:
    shown = (measured.path / "report.html").read_text()
    sizes, ranks = re.findall(r'<svg [^>]*aria-label="([^"]*)"', shown[shown.index('id="search"') :])[:2]
    assert sizes == (
        "Parameters against held-out loss. On the front: c0. The winner c0 has 900k, after the cut 5.000, after "
        "distillation 3.500; the teacher 2.880."
    )
    assert ranks == "Ranks: after the cut c0, c1, c2; after 512 c1, c0, c2; after 1.02k c0, c1."
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))


def test_the_bill_is_time_times_processes_and_its_sum(tmp_path: Path) -> None:
    write_run(tmp_path)
    for place in sorted(tmp_path.iterdir()):
        cost = {"seconds": 90.0, "processes": 4, "device": "an H100"}
        if place.name == "distilled":
            cost["seconds"] = 7200.0
        change_manifest(place, lambda manifest, cost=cost: manifest.update(cost=cost))
    page = Page((run(report_of(tmp_path)).path / "report.html").read_text())

    row = next(row for row in page.rows if row[:2] == ["distilled", "distill"])
    assert row[2:-1] == ["7,200.0", "4", "an H100", "8.0000", "41.0k"]
    models = {row[0]: row[-1] for row in page.rows if len(row) == 7}
    assert models["pruned only"] == "90", "of the whole stage, not of writing what it made"
    assert models["distilled"] == "12", "of its training"
    others = len([path for path in tmp_path.iterdir() if path.name != "report"]) - 1
    hours, tokens = 8 + others * 0.1, 4 * TOKENS + TOKENS // 4
    files = [file for place in tmp_path.iterdir() if place.name != "report" for file in place.rglob("*")]
    on_disk = sum(file.stat().st_size for file in files if file.is_file() and file.name != "manifest.json")
    said = f"{on_disk / 1e3:.3g} kB"
    assert ["sum", "", f"{7200 + 90 * others:,.1f}", "", "", f"{hours:.4f}", f"{tokens / 1000:.0f}k", said] in page.rows
    assert f"{hours:.2g} GPU-hours (an H100) over {others + 1} steps" in page.text and f"; {said} on disk." in page.text


def test_a_manifest_says_what_its_stage_cost(tmp_path: Path) -> None:
    write_run(tmp_path)
    cost = open_artifact(tmp_path / "teacher").manifest["cost"]

    assert cost["processes"] == 1 and cost["device"] and cost["seconds"] >= 0
    assert json.loads((tmp_path / "teacher" / "manifest.json").read_text())["cost"] == cost
