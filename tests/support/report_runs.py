"""Runs as the stages leave them, without training anything: what tests of the report read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.config.stages import ReportConfig
from minitron_nemo.pruning import plan_from_importance
from minitron_nemo.recipe import compose, config_of
from minitron_nemo.scores import Importance, moment_sizes
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.report import run

TEACHER = ModelShape("llama", 3, 24, 40, 6, 2, 8, padded_vocab_size=64, seq_length=32)
STUDENT = TEACHER.pruned_to(hidden_size=16, ffn_hidden_size=27, num_attention_heads=4)
LOSSES = {
    "teacher": 2.91, "corrected_teacher": 2.88, "distilled": 3.05, "pruned_ce": 3.18, "from_scratch": 3.9,
    "student_pruned": 6.2, "distilled_calibrated": 3.01,
}  # fmt: skip
TOKENS = 40_960


@cache
def _section(recipe: str) -> ReportConfig:
    config, steps = compose([f"recipe={recipe}", "run_dir=RUN"])
    section: ReportConfig = config_of(steps["report"], config)
    return section


def report_of(run_dir: Path, recipe: str = "quickstart") -> ReportConfig:
    """The report that a recipe asks for, of this run."""
    said = _section(recipe)
    rows = [dataclasses.replace(row, model=str(run_dir / Path(row.model).name)) for row in said.rows]
    return ReportConfig(run_dir, run_dir / "report", rows, said.expected_order)


def write_model(
    folder: Path,
    name: str,
    stage: str,
    shape: ModelShape,
    inputs: Sequence[Artifact] = (),
    *,
    tokens: int = 0,
    loss: float = 3.0,
) -> Artifact:
    """A model artifact; with `tokens`, one that was trained and has a history."""
    with writing(folder / name, stage=stage, config={"name": name, "tokens": tokens}, inputs=inputs) as draft:
        (draft.path / "shape.json").write_text(json.dumps(shape.to_dict()))
        draft.metrics["parameters"] = shape.num_parameters
        if tokens:
            draft.metrics.update(tokens=tokens, training_seconds=12.5)
            records = list(history(stage, tokens, loss))
            (draft.path / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_artifact(folder / name)


def history(stage: str, tokens: int, loss: float, steps: int = 20) -> list[dict[str, float | None]]:
    records: list[dict[str, float | None]] = []
    for step in range(1, steps + 1):
        value, at = loss + 2 * math.exp(-step / 4), {"step": step, "tokens": tokens * step // steps}
        records.append({**at, "loss": value, "lr": 1e-3, "grad_norm": None, "seconds": 0.5})
        if step % 5 == 0 and stage == "distill":
            validation = {"validation_divergence": value + 0.01, "validation_agreement": 0.2 + step / 40}
            validation |= {"validation_loss": value + 2.85}
            for source, more in (("stdlib", -0.1), ("a<b|$c", 0.3)):
                validation[f"validation_loss/{source}"] = value + 2.85 + more
                validation[f"validation_divergence/{source}"] = value + 0.01 + more
            records.append(at | validation)
        elif step % 5 == 0:
            records.append({**at, "validation_loss": value + 0.02})
    return records


def write_pruned(
    folder: Path,
    name: str,
    importance: Importance,
    shape: ModelShape,
    inputs: Sequence[Artifact],
    facts: Mapping[str, Any] = {},
) -> Artifact:
    """A pruned model with its plan."""
    with writing(folder / name, stage="prune", config={}, inputs=inputs) as draft:
        draft.facts.update(facts)
        plan_from_importance(importance, importance.shape, shape).save(draft.path)
        (draft.path / "shape.json").write_text(json.dumps(shape.to_dict()))
    return open_artifact(folder / name)


def write_importance(folder: Path, name: str, importance: Importance, inputs: Sequence[Artifact] = ()) -> Artifact:
    with writing(folder / name, stage="estimate-importance", config={}, inputs=inputs) as draft:
        importance.save(draft.path)
    return open_artifact(folder / name)


def write_evaluation(folder: Path, model: Artifact, loss: float) -> Artifact:
    name = f"evaluation_{model.path.name}"
    with writing(folder / name, stage="evaluate", config={}, inputs=(model,)) as draft:
        draft.metrics.update(held_out_loss=loss, perplexity=math.exp(loss), tokens=8192)
        draft.facts["model"] = str(model.path)
    return open_artifact(folder / name)


def write_export(folder: Path, name: str, model: Artifact, difference: float) -> Artifact:
    with writing(folder / name, stage="export-hf", config={}, inputs=(model,)) as draft:
        draft.metrics["max_relative_logit_difference"] = difference
    return open_artifact(folder / name)


def importance_of(shape: ModelShape) -> Importance:
    generator = torch.Generator().manual_seed(0)
    moments = {
        axis: torch.rand(size, generator=generator, dtype=torch.float64) + 0.01
        for axis, (size, *_) in moment_sizes(shape).items()
    }
    return Importance(shape, moments, num_samples=48, depth={"block_influence": {1: torch.tensor([0.9, 0.2, 0.7])}})


def write_run(folder: Path, losses: Mapping[str, float | None] = LOSSES) -> Path:
    """A whole quickstart; a model whose loss is None is not evaluated."""
    teacher = write_model(folder, "teacher", "import-hf", TEACHER)
    corrected = write_model(
        folder, "corrected_teacher", "correct-teacher", TEACHER, [teacher], tokens=TOKENS // 4, loss=2.9
    )
    importance = importance_of(TEACHER)
    scores = write_importance(folder, "importance", importance, [teacher])
    pruned = write_pruned(folder, "student_pruned", importance, STUDENT, [teacher, scores])
    models = {"teacher": teacher, "corrected_teacher": corrected, "student_pruned": pruned}
    for name, stage, loss in (
        ("distilled", "distill", 0.2),
        ("distilled_calibrated", "distill", 0.15),
        ("pruned_ce", "pretrain", 3.2),
        ("from_scratch", "pretrain", 4.0),
    ):
        models[name] = write_model(folder, name, stage, STUDENT, [pruned], tokens=TOKENS, loss=loss)
    for name, value in losses.items():
        if value is not None:
            write_evaluation(folder, models[name], value)
    write_export(folder, "export", models["distilled"], 3.4e-6)
    return folder


def write_measured_run(folder: Path) -> Path:
    """`write_run` with all else that stages measure: sources, KL, tasks, samples, speed and a search."""
    write_run(folder, dict.fromkeys(LOSSES))
    tasks = {
        "teacher": (0.5, 0.7),
        "corrected_teacher": (0.5, 0.75),
        "distilled": (0.45, 0.675),
        "pruned_ce": (0.4, 0.6),
    }
    for name, loss in LOSSES.items():
        model = open_artifact(folder / name)
        with writing(folder / f"evaluation_{name}", stage="evaluate", config={}, inputs=(model,)) as draft:
            draft.metrics.update(held_out_loss=loss, perplexity=math.exp(loss), tokens=8192, kl=loss - 2.8)
            draft.metrics["sources"] = {
                "stdlib": {"held_out_loss": loss - 0.1, "tokens": 6144, "kl": loss - 2.9},
                "a<b|c": {"held_out_loss": loss + 0.3, "tokens": 2048, "kl": loss - 2.5},
            }
            if name in tasks:
                common = {
                    "metric": "acc_norm",
                    "stderr": 0.01,
                    "higher_is_better": True,
                    "num_fewshot": 5,
                    "samples": 9,
                }
                pairs = zip(("arc", "winogrande"), tasks[name], strict=True)
                draft.metrics["tasks"] = {task: {"value": value} | common for task, value in pairs}
            draft.facts["model"] = str(model.path)
            said = [("greedy", f"{name} returns <b>{'x' * 90}"), ("sampled", f"{name} | wanders")]
            samples = [{"prompt": "def f(x):\n", "mode": mode, "text": text} for mode, text in said]
            (draft.path / "samples.json").write_text(json.dumps(samples))
    _write_throughput(folder)
    _write_search(folder)
    return folder


def _write_throughput(folder: Path) -> None:
    models = [open_artifact(folder / name) for name in ("corrected_teacher", "distilled_calibrated")]
    with writing(folder / "throughput", stage="throughput", config={}, inputs=models) as draft:
        rows = [
            {
                "model": str(model.path), "label": model.path.name, "parameters": 900_000,
                "engine": "transformers", "dtype": "bfloat16",
                "batch_size": 8, "prompt_tokens": 128, "new_tokens": 32, "prefill_tokens_per_s": 9000.0 * speed,
                "decode_tokens_per_s": 120.0 * speed, "time_to_first_token_s": 0.1 / speed,
                "peak_memory_bytes": 3 * 2**30, "largest": False,
            }
            for model, speed in zip(models, (1, 1.5), strict=True)
        ]  # fmt: skip
        (draft.path / "throughput.json").write_text(json.dumps({"machine": "a laptop", "rows": rows, "remarks": []}))


def _write_search(folder: Path) -> None:
    curves = ([[512, 4.0], [1024, 3.5]], [[512, 3.9], [1024, 4.5]], [[512, 4.2]])
    candidates = [
        {
            "id": f"c{number}", "dims": {"hidden_size": 16 + number, "num_layers": 3}, "parameters": 900_000 + number,
            "non_embedding_parameters": 800_000, "memory_bytes": 2_000_000, "time_to_first_token": 0.0123,
            "time_per_output_token": None, "price": 0.1, "loss_cut": 5.0 + number, "kl_cut": 2.0, "curve": curve,
            "tokens": curve[-1][0], "rung": len(curve), "rank": number + 1, "on_front": number == 0,
        }
        for number, curve in enumerate(curves)
    ]  # fmt: skip
    found = {
        "target": "at most 1M parameters", "constraints": ["hidden_size is a multiple of 8"], "tokens_spent": 2560,
        "counts": {"space": 4608, "feasible": 15, "priced": 15, "measured": 5, "distilled": 3},
        "teacher": {"parameters": 2_000_000, "held_out_loss": 2.88}, "candidates": candidates, "winner": "c0",
    }  # fmt: skip
    with writing(folder / "search", stage="search", config={}, inputs=[open_artifact(folder / "teacher")]) as draft:
        draft.metrics["tokens"] = 2560
        (draft.path / "search.json").write_text(json.dumps(found))


class Page(HTMLParser):
    """Collects what tests ask of a page; fails on tags that do not close."""

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


def page_of(config: ReportConfig) -> Page:
    """Write the report and read it as a browser would."""
    return Page((run(config).path / "report.html").read_text())
