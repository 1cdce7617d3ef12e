"""The page of a run: what it says, and that it asks nothing of the network."""

from __future__ import annotations

import re
from pathlib import Path

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.config.stages import ReportConfig
from minitron_nemo.report.figures.svg import CSS_VARIABLES, SERIES
from minitron_nemo.report.table import count
from minitron_nemo.stages.report import run
from support.report_runs import LOSSES, STUDENT, TEACHER, Page, page_of, report_of, write_model, write_run


def test_a_whole_run_is_reported_with_every_model_picture_and_stage(report: Artifact) -> None:
    page = Page((report.path / "report.html").read_text())

    parameters = count(STUDENT.num_parameters)
    assert ["distilled", parameters, "3.050", "21.12", "+0.170", "41.0k", "12"] in page.rows
    assert ["teacher", count(TEACHER.num_parameters), "2.910", "18.36", "+0.030", "\u2013"] in [
        row[:-1] for row in page.rows
    ]
    assert ["pruned only", parameters, "6.200", "492.75", "+3.320", "0"] in [row[:-1] for row in page.rows]
    assert page.tags.count("svg") == 7  # curves, of sources, neurons, heads, hidden channels, layers, aggregations
    assert ["ffn (in each layer)", "40", "27", "13", "68%"] in page.rows
    assert ["hidden_size", "24", "16", "67%"] in page.rows
    assert ["kv_channels", "8", "8", "="] in page.rows
    for stage in ("import-hf", "correct-teacher", "estimate-importance", "prune", "distill", "evaluate", "export-hf"):
        assert stage in page.text
    assert open_artifact(report.path.parent / "distilled").digest in page.text
    assert "at most\n3.4e-06" in page.text
    assert "took 10.2k tokens more" in page.text
    assert "agreement is the share of validation tokens" in " ".join(page.text.split())
    assert "llama.cpp K-quants (rows of hidden_size=16, ffn_hidden_size=27 stay in 16 bits" in page.text
    assert "Missing or in doubt" not in page.text


def test_the_file_asks_nothing_of_the_network(report: Artifact) -> None:
    text = (report.path / "report.html").read_text()
    page = Page(text)

    assert page.addresses and all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    references = re.findall(r"url\(#([^)]*)\)", text) + [a[1:] for a in page.addresses if a.startswith("#")]
    assert references and set(references) <= set(page.ids)


def test_pictures_follow_the_page_into_light_and_dark(report: Artifact) -> None:
    text = (report.path / "report.html").read_text()
    style, body = text.split("</style>", 1)

    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert {"--teacher", *(f"--series-{number}" for number in (1, 2, 3, 4))} <= used
    for variable in used | set(CSS_VARIABLES.values()):
        assert f"{variable}:" in light and f"{variable}:" in dark
    for colour in SERIES:
        assert f"{CSS_VARIABLES[colour]}: {colour};" in light
    assert not re.search("|".join(CSS_VARIABLES), body)


def test_paths_with_html_in_them_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    folder = tmp_path / "<b>a&b[red]<script>x"
    folder.mkdir()
    page = page_of(report_of(write_run(folder)))

    assert "script" not in page.tags and "b" not in page.tags
    assert "<b>a&b[red]<script>x" in page.text


def test_a_run_of_one_model_has_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    write_model(tmp_path, "teacher", "import-hf", TEACHER)
    page = page_of(report_of(tmp_path))

    assert "Missing: an evaluation of teacher" in page.text and "Missing: distilled: no artifact" in page.text
    assert "svg" not in page.tags


def test_an_order_that_fails_is_said_on_the_page(tmp_path: Path) -> None:
    page = page_of(report_of(write_run(tmp_path, {**LOSSES, "distilled": 3.4})))

    assert "does not hold: distilled (3.400) was expected below pruned + CE (3.180)" in page.text


def test_a_report_without_rows_shows_every_model_and_claims_no_order(tmp_path: Path) -> None:
    write_run(tmp_path)
    artifact = run(ReportConfig(tmp_path, tmp_path / "report"))
    text = (artifact.path / "report.html").read_text()

    assert {row[0] for row in Page(text).rows} >= LOSSES.keys()
    assert "expected order" not in text and 'class="verdict' not in text
    assert artifact.metrics["expected_order_holds"] is None


def test_the_report_is_a_finished_artifact_that_knows_its_inputs(tmp_path: Path) -> None:
    config = report_of(write_run(tmp_path))
    first, second = run(config), run(config)

    assert first.stage == "report" and first.metrics["expected_order_holds"] is True
    assert len(first.manifest["inputs"]) == len(second.manifest["inputs"]) == 16  # never itself
    assert first.manifest["files"] == second.manifest["files"]
    assert first.manifest["config"]["rows"][0]["label"] == "teacher"
