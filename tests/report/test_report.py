"""The report of a run: what it says, what it admits is missing, and that it asks nothing of the network."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.config.stages import ReportConfig
from minitron_nemo.importance import Importance
from minitron_nemo.importance.scores import moment_sizes
from minitron_nemo.pruning import plan_from_importance
from minitron_nemo.report import summary, summary_table
from minitron_nemo.report.correlation import ranks as places
from minitron_nemo.report.correlation import spearman
from minitron_nemo.report.figures import GRID, INK, PAPER, SERIES, smoothed
from minitron_nemo.report.rows import count, order_of
from minitron_nemo.report.run import read_history
from minitron_nemo.report.scores import kept_mask, share_kept_from_top
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.report import run

TEACHER = ModelShape("llama", 3, 24, 40, 6, 2, 8, padded_vocab_size=64, seq_length=32)
STUDENT = TEACHER.pruned_to(hidden_size=16, ffn_hidden_size=27, num_attention_heads=4)
LOSSES = {
    "teacher": 2.91, "corrected_teacher": 2.88, "distilled": 3.05, "pruned_ce": 3.18, "from_scratch": 3.9,
    "student_pruned": 6.2, "distilled_calibrated": 3.01,
}  # fmt: skip
TOKENS = 40_960


def write_model(
    folder: Path,
    name: str,
    stage: str,
    shape: ModelShape,
    inputs: tuple[Artifact, ...] = (),
    *,
    tokens: int = 0,
    loss: float = 3.0,
) -> Artifact:
    with writing(folder / name, stage=stage, config={"name": name, "tokens": tokens}, inputs=inputs) as draft:
        (draft.path / "shape.json").write_text(json.dumps(shape.to_dict()))
        draft.metrics["parameters"] = shape.num_parameters
        if tokens:
            draft.metrics.update(tokens=tokens, training_seconds=12.5)
            steps = 20
            with (draft.path / "history.jsonl").open("w") as file:
                for step in range(1, steps + 1):
                    value = loss + 2 * math.exp(-step / 4)
                    seen = tokens * step // steps
                    record = {
                        "step": step,
                        "tokens": seen,
                        "loss": value,
                        "lr": 1e-3,
                        "grad_norm": None,
                        "seconds": 0.5,
                    }
                    file.write(json.dumps(record) + "\n")
                    if step % 5 == 0:
                        line = {
                            "step": step,
                            "tokens": seen,
                            "validation_loss": value + (2.85 if stage == "distill" else 0.02),
                        }
                        if stage == "distill":
                            line |= {"validation_divergence": value + 0.01, "validation_agreement": 0.2 + step / 40}
                        file.write(json.dumps(line) + "\n")
    return open_artifact(folder / name)


def write_evaluation(folder: Path, model: Artifact, loss: float) -> Artifact:
    name = f"evaluation_{model.path.name}"
    with writing(folder / name, stage="evaluate", config={}, inputs=(model,)) as draft:
        draft.metrics.update(held_out_loss=loss, perplexity=math.exp(loss), tokens=8192)
        draft.facts["model"] = str(model.path)
    return open_artifact(folder / name)


def importance_of(shape: ModelShape) -> Importance:
    generator = torch.Generator().manual_seed(0)
    moments = {
        axis: torch.rand(size, generator=generator, dtype=torch.float64) + 0.01
        for axis, (size, *_) in moment_sizes(shape).items()
    }
    return Importance(shape, moments, num_samples=48, depth={"block_influence": {1: torch.tensor([0.9, 0.2, 0.7])}})


def write_run(folder: Path, losses: Mapping[str, float | None] = LOSSES) -> Path:
    """A whole run, as the stages leave it; a variant whose loss is None is not evaluated."""
    models = {"teacher": write_model(folder, "teacher", "import-hf", TEACHER)}
    models["corrected_teacher"] = write_model(
        folder, "corrected_teacher", "correct-teacher", TEACHER, (models["teacher"],), tokens=TOKENS // 4, loss=2.9
    )
    importance = importance_of(TEACHER)
    with writing(folder / "importance", stage="estimate-importance", config={}, inputs=(models["teacher"],)) as draft:
        importance.save(draft.path)
    with writing(folder / "student_pruned", stage="prune", config={}, inputs=(models["teacher"],)) as draft:
        plan_from_importance(importance, TEACHER, STUDENT).save(draft.path)
        (draft.path / "shape.json").write_text(json.dumps(STUDENT.to_dict()))
    models["student_pruned"] = open_artifact(folder / "student_pruned")
    for name, stage, loss in (
        ("distilled", "distill", 0.2),
        ("distilled_calibrated", "distill", 0.15),
        ("pruned_ce", "pretrain", 3.2),
        ("from_scratch", "pretrain", 4.0),
    ):
        models[name] = write_model(folder, name, stage, STUDENT, (models["student_pruned"],), tokens=TOKENS, loss=loss)
    for name, value in losses.items():
        if value is not None:
            write_evaluation(folder, models[name], value)
    with writing(folder / "export", stage="export-hf", config={}, inputs=(models["distilled"],)) as draft:
        draft.metrics["max_logit_difference"] = 3.4e-6
    return folder


class Page(HTMLParser):
    """Collects what the claims below ask for; fails on tags that do not close."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def page_of(run_dir: Path) -> Page:
    artifact = run(ReportConfig(run_dir, run_dir / "report"))
    return Page((artifact.path / "report.html").read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The report of a whole run, for tests that only read."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    return run(ReportConfig(folder, folder / "report"))


def test_a_whole_run_is_reported_with_every_model_picture_and_stage(report: Artifact) -> None:
    page = Page((report.path / "report.html").read_text())

    parameters = count(STUDENT.num_parameters)
    assert ["distilled", parameters, "3.050", "21.12", "+0.170", "41.0k", "12"] in page.rows
    assert ["teacher", count(TEACHER.num_parameters), "2.910", "18.36", "+0.030", "\u2013"] in [
        row[:-1] for row in page.rows
    ]
    assert ["pruned only", parameters, "6.200", "492.75", "+3.320", "0"] in [row[:-1] for row in page.rows]
    assert page.tags.count("svg") == 6  # curves, neurons, heads, hidden channels, layers, aggregations
    assert ["ffn (in each layer)", "40", "27", "13", "68%"] in page.rows
    assert ["hidden_size", "24", "16", "67%"] in page.rows
    assert ["kv_channels", "8", "8", "="] in page.rows
    for stage in ("import-hf", "correct-teacher", "estimate-importance", "prune", "distill", "evaluate", "export-hf"):
        assert stage in page.text
    assert open_artifact(report.path.parent / "distilled").digest in page.text
    assert "at most\n3.4e-06" in page.text
    assert "agreement is the share of validation tokens" in " ".join(page.text.split())
    assert "Missing or in doubt" not in page.text


EXPERTS = dataclasses.replace(
    TEACHER, family="qwen3_moe", num_moe_experts=4, moe_ffn_hidden_size=20, moe_shared_expert_intermediate_size=12,
    moe_router_topk=2, moe_layer_freq=(1, 0, 1),
)  # fmt: skip


def test_every_score_of_an_importance_artifact_is_drawn(tmp_path: Path) -> None:
    """An importance of every axis, by several depth metrics and block sizes, and two more to compare with."""
    blocks = {n: torch.rand(4 - n, generator=torch.Generator().manual_seed(n)) for n in (1, 2)}
    depth = {
        "block_influence": blocks,
        "kl": {1: 2 * blocks[1]},
        "loss": {1: -blocks[1]},
        "greedy": {1: torch.arange(3.0)},
    }
    full = importance_of(EXPERTS)
    for axis in ("expert", "expert_ffn", "shared_expert_ffn"):
        full.moments[axis][1] = 0
    full = dataclasses.replace(full, depth=depth)
    student = EXPERTS.pruned_to(num_moe_experts=3, moe_ffn_hidden_size=15, hidden_size=16)
    for name, importance in (
        ("importance", full),
        ("importance_on_code", full),
        ("importance_of_another_model", dataclasses.replace(importance_of(TEACHER), depth={})),
    ):
        with writing(tmp_path / name, stage="estimate-importance", config={}) as draft:
            importance.save(draft.path)
    with writing(tmp_path / "student_pruned", stage="prune", config={}) as draft:
        plan_from_importance(full, EXPERTS, student).save(draft.path)
    page = page_of(tmp_path)

    # neurons of dense layers, of shared and of routed experts; experts, heads, hidden channels; four depth metrics;
    # agreement of aggregations, of depth metrics, of artifacts
    assert page.tags.count("figure") == page.tags.count("svg") == 6 + 4 + 3
    assert ["expert (in each layer)", "4", "3", "1", "75%"] in page.rows
    assert ["expert_ffn (in each expert)", "20", "15", "5", "75%"] in page.rows
    for said in (
        "Neurons inside the routed experts.", "A dot marks a kept expert.", "Block influence: ", "KL: ", "Loss: ",
        "Greedy: ", "Between the ways to make one score", "Between the depth metrics", "layer, block_influence",
        "artifacts of one shape (3 layers, hidden size 24)", "importance_on_code",
    ):  # fmt: skip
        assert said in page.text
    figure = page.text[page.text.index("Between the depth metrics") - 400 :]
    assert "-1.00" in figure and "1.00" in figure  # loss is the opposite of kl, which is block influence
    assert len(page.ids) == len(set(page.ids))


def test_rank_correlation_shares_places_between_ties_and_leaves_out_rows_without_order() -> None:
    first = torch.tensor([[1.0, 2.0, 2.0, 4.0], [5.0, 6.0, 7.0, 8.0], [3.0, 3.0, 3.0, 3.0]])
    second = torch.tensor([[10.0, 30.0, 20.0, 40.0], [0.4, 0.3, 0.2, 0.1], [1.0, 2.0, 3.0, 4.0]])

    assert places(first).tolist() == [[0, 1.5, 1.5, 3], [0, 1, 2, 3], [1.5, 1.5, 1.5, 1.5]]
    # places less their mean: (-1.5, 0, 0, 1.5) and (-1.5, .5, -.5, 1.5), so 4.5 / sqrt(4.5 * 5); the next row -1
    expected = (4.5 / math.sqrt(4.5 * 5) - 1) / 2
    torch.testing.assert_close(
        spearman(torch.stack([first, second])), torch.tensor([[1, expected], [expected, 1]], dtype=torch.float64)
    )
    assert spearman(torch.stack([first[2], second[2]])).isnan().tolist() == [[True, True], [True, False]]


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
    assert {f"--{name.replace('_', '-')}" for name in SERIES} <= used
    for variable in used:
        assert f"{variable}:" in light and f"{variable}:" in dark
    assert not re.search("|".join((*SERIES.values(), INK, GRID, PAPER)), body)


def test_paths_with_html_in_them_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    folder = tmp_path / "<b>a&b[red]<script>x"
    folder.mkdir()
    page = page_of(write_run(folder))

    assert "script" not in page.tags and "b" not in page.tags
    assert "<b>a&b[red]<script>x" in page.text


def test_missing_artifacts_are_named_with_the_stage_that_makes_them(tmp_path: Path) -> None:
    teacher = write_model(tmp_path, "teacher", "import-hf", TEACHER)
    write_evaluation(tmp_path, teacher, 2.91)
    (tmp_path / "distilled.partial").mkdir()
    page = page_of(tmp_path)

    for name, stage in (("distilled", "distill"), ("importance", "estimate-importance"), ("export", "export-hf")):
        assert f"Missing: {name} (stage {stage})" in page.text
    assert "Missing: teacher" not in page.text
    assert "svg" not in page.tags
    assert "The expected order (distilled < pruned + CE < from scratch < pruned only) cannot be checked." in page.text


def test_a_run_that_only_prunes_misses_no_training(tmp_path: Path) -> None:
    teacher = write_model(tmp_path, "teacher", "import-hf", TEACHER)
    write_evaluation(tmp_path, teacher, 2.91)
    write_evaluation(tmp_path, write_model(tmp_path, "student_pruned", "prune", TEACHER), 4.2)
    values = summary(tmp_path)
    assert [sentence.split()[0] for sentence in values["missing"]] == ["importance", "export"]
    assert values["order"]["statement"].startswith("Nothing was trained in this run")
    (tmp_path / "distilled.training").mkdir()
    assert any(sentence.startswith("distilled (stage distill)") for sentence in summary(tmp_path)["missing"])


def test_a_model_without_evaluation_keeps_its_row_and_leaves_the_order_open(tmp_path: Path) -> None:
    values = summary(write_run(tmp_path, {**LOSSES, "pruned_ce": None}))

    row = next(row for row in values["rows"] if row["name"] == "pruned_ce")
    assert row["held_out_loss"] is None and row["gap_to_teacher"] is None and row["tokens"] == TOKENS
    assert values["order"]["holds"] is True and values["order"]["complete"] is False
    assert values["order"]["statement"].startswith("As far as it can be checked, the expected order holds")
    assert "no held-out loss is known: pruned + CE." in values["order"]["statement"]


@pytest.mark.parametrize(
    ("losses", "holds", "said"),
    [
        ((3.05, 3.18, 3.9, 6.2), True, "holds: distilled 3.050 < pruned + CE 3.180 < from scratch 3.900 < pruned only"),
        (
            (3.25, 3.18, 3.9, 6.2),
            False,
            "distilled (3.250) was expected below pruned + CE (3.180) and is 0.070 above it",
        ),
        ((3.05, 4.0, 3.9, 6.2), False, "pruned + CE (4.000) was expected below from scratch (3.900)"),
        ((3.05, 3.05, 3.9, 6.2), False, "distilled (3.050) was expected below pruned + CE (3.050) and is equal to it"),
        ((3.05, 3.055, 3.9, 6.2), True, "distilled and pruned + CE are within 0.01: too close to call from one run"),
    ],
)
def test_the_order_is_stated_as_it_is(losses: tuple[float, ...], holds: bool, said: str) -> None:
    names = ("distilled", "pruned_ce", "from_scratch", "student_pruned")
    order = order_of({**dict(zip(names, losses, strict=True)), "teacher": 9.0})

    assert order["holds"] is holds and order["complete"]
    assert said in order["statement"]


def test_an_order_that_fails_is_said_on_the_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, {**LOSSES, "distilled": 3.4}))

    assert "does not hold: distilled (3.400) was expected below pruned + CE (3.180)" in page.text


def test_an_evaluation_of_an_earlier_version_does_not_count(tmp_path: Path) -> None:
    write_run(tmp_path)
    pruned = open_artifact(tmp_path / "student_pruned")
    write_model(tmp_path, "distilled", "distill", STUDENT, (pruned,), tokens=2 * TOKENS)
    values = summary(tmp_path)

    assert next(row for row in values["rows"] if row["name"] == "distilled")["held_out_loss"] is None
    assert any("evaluation_distilled was made from an earlier version of distilled" in note for note in values["notes"])
    assert any(
        "equal training tokens: " in sentence and ", distilled 81,920" in sentence for sentence in values["fairness"]
    )


def test_a_moved_run_is_still_read(tmp_path: Path) -> None:
    moved = write_run(tmp_path / "before").rename(tmp_path / "after")
    values = summary(moved)

    assert {row["name"]: row["held_out_loss"] for row in values["rows"]} == LOSSES
    assert values["notes"] == []


def test_a_loss_that_is_not_finite_is_said_and_keeps_the_json_valid(tmp_path: Path) -> None:
    write_run(tmp_path, {**LOSSES, "from_scratch": math.nan})
    artifact = run(ReportConfig(tmp_path, tmp_path / "report"))
    values = json.loads((artifact.path / "summary.json").read_text(), parse_constant=pytest.fail)

    assert "The held-out loss of from_scratch is nan, not a finite number: its training diverged." in values["notes"]
    assert "from scratch" in values["order"]["statement"].split("Not compared")[1]


def test_the_summary_is_the_same_in_python_json_and_terminal(tmp_path: Path) -> None:
    write_run(tmp_path)
    before: dict[str, Any] = summary(tmp_path)
    artifact = run(ReportConfig(tmp_path, tmp_path / "report"))

    assert json.loads((artifact.path / "summary.json").read_text()) == before == summary(tmp_path)
    shown = io.StringIO()
    Console(width=160, file=shown).print(summary_table(tmp_path))
    for row in before["rows"]:
        assert row["label"] in shown.getvalue() and f"{row['held_out_loss']:.3f}" in shown.getvalue()
    assert "The expected order holds" in shown.getvalue()


def test_the_report_is_a_finished_artifact_that_knows_its_inputs(tmp_path: Path) -> None:
    write_run(tmp_path)
    first = run(ReportConfig(tmp_path, tmp_path / "report"))
    second = run(ReportConfig(tmp_path, tmp_path / "report"))

    assert first.stage == "report" and first.metrics["expected_order_holds"] is True
    assert len(first.manifest["inputs"]) == len(second.manifest["inputs"]) == 16  # never itself
    assert first.manifest["files"] == second.manifest["files"]


def test_an_empty_or_absent_run_directory_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished artifact"):
        run(ReportConfig(tmp_path, tmp_path / "report"))
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory\. Set run_dir"):
        run(ReportConfig(tmp_path / "nowhere", tmp_path / "report"))
    assert list(tmp_path.iterdir()) == []


def test_a_report_may_not_take_the_place_of_its_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would take the place of run_dir"):
        ReportConfig(tmp_path / "run", tmp_path)


def test_a_step_trained_twice_after_a_resume_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    steps = [(1, 5.0), (2, 4.0), (3, 3.9), (2, 4.1), (3, 3.8)]
    file.write_text("".join(json.dumps({"step": s, "tokens": 10 * s, "loss": v}) + "\n" for s, v in steps))

    assert dataclasses.asdict(read_history(file).training) == {"tokens": [10, 20, 30], "values": [5.0, 4.1, 3.8]}
    assert read_history(file).validation_agreement.tokens == []


def test_a_broken_history_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1, "tokens": 10, "loss": 5.0}\n{"step": 2, "tok')
    with pytest.raises(ValueError, match=r"history\.jsonl line 2 is not a history record"):
        read_history(file)


def test_smoothing_keeps_a_constant_and_a_hole_stays_a_hole() -> None:
    assert np.allclose(smoothed(np.array([2.0, 2.0, np.nan, 2.0]), 2), [2.0, 2.0, np.nan, 2.0], equal_nan=True)
    assert np.allclose(smoothed(np.array([1.0, 2.0, 6.0]), 1), [1.5, 3.0, 4.0])


def test_a_plan_by_other_scores_is_told_from_one_by_those_shown() -> None:
    scores = np.array([[5.0, 1.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert share_kept_from_top(scores, np.array([[0, 2], [2, 3]])) == 1.0
    assert share_kept_from_top(scores, np.array([[0, 1], [2, 3]])) == 0.75
    assert kept_mask(np.array([[0, 2], [2, 3]]), 4).tolist() == [[True, False, True, False], [False, False, True, True]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (0, "0"),
        (950, "950"),
        (12_345, "12.3k"),
        (999_999, "1.00M"),
        (6_530_000, "6.53M"),
        (8.03e9, "8.03B"),
    ],
)
def test_counts_read_with_three_digits(value: int | None, text: str) -> None:
    assert count(value) == text
