"""What a run directory holds, read once: the artifacts of its stages, their evaluations and their histories.

Reading is forgiving about what is absent (a report of half a run is wanted while the other half computes) and strict
about what contradicts itself: an evaluation of an earlier version of a model does not count as one of this model.
Everything that is absent or doubtful becomes a sentence in `Run.missing` or `Run.notes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from minitron_nemo.checks import require
from minitron_nemo.shape import ModelShape


@dataclass(frozen=True)
class Variant:
    """One model of a run: where its artifact stands, how the report calls it, which stage makes it."""

    name: str
    label: str
    stage: str
    is_student: bool = True
    is_optional: bool = False
    """A run without it lacks nothing."""


# In the order of the table: the teachers, then the students from the expected best to the expected worst.
VARIANTS = (
    Variant("teacher", "teacher", "import-hf", is_student=False),
    Variant("corrected_teacher", "corrected teacher", "correct-teacher", is_student=False),
    Variant("distilled_calibrated", "distilled (calibrated)", "distill", is_optional=True),
    Variant("distilled", "distilled", "distill"),
    Variant("pruned_ce", "pruned + CE", "pretrain"),
    Variant("from_scratch", "from scratch", "pretrain"),
    Variant("student_calibrated", "calibrated only", "prune", is_optional=True),
    Variant("student_pruned", "pruned only", "prune"),
)
TRAINED = ("corrected_teacher", "distilled_calibrated", "distilled", "pruned_ce", "from_scratch")
"""Variants that training makes; a run may stop before any of them."""
# Artifacts that are no model of the table: name -> the stage that makes it.
OTHERS = {"importance": "estimate-importance", "export": "export-hf"}

_UNFINISHED = (".partial", ".old", ".training")  # what stages leave beside their output until it is whole


@dataclass(frozen=True)
class Curve:
    """One series of a training history over tokens; a step that was trained twice (resume) counts once, the last."""

    tokens: list[int]
    values: list[float]


@dataclass(frozen=True)
class History:
    training: Curve
    validation: Curve
    validation_divergence: Curve
    """From the teacher; empty where it was not measured, as the next."""
    validation_agreement: Curve


@dataclass
class Run:
    """A run directory as found."""

    path: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """By name relative to `path`, every finished artifact but reports."""
    evaluations: dict[str, Artifact] = field(default_factory=dict)
    """By variant name, the evaluation that measured this very version of it."""
    other_evaluations: dict[str, Artifact] = field(default_factory=dict)
    """By evaluated path, evaluations of models that are not a variant of this run."""
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def only_prunes(self) -> bool:
        """Whether the run holds a pruned student and no trace of training one, finished or begun."""
        begun = {place.name.split(".")[0] for place in self.path.iterdir()}
        return "student_pruned" in self.artifacts and begun.isdisjoint(TRAINED)

    def shape(self, name: str) -> ModelShape | None:
        """Shape of a model artifact, or None where the artifact or its shape.json is absent."""
        artifact = self.artifacts.get(name)
        if artifact is None or not (file := artifact.path / "shape.json").is_file():
            return None
        return ModelShape.from_dict(json.loads(file.read_text()))

    def history(self, name: str) -> History | None:
        """Training history of an artifact, or None where there is none."""
        artifact = self.artifacts.get(name)
        if artifact is None or not (file := artifact.path / "history.jsonl").is_file():
            return None
        return read_history(file)


def read_run(run_dir: Path | str) -> Run:
    """Look through a run directory.

    Raises: FileNotFoundError: no such directory, or no finished artifact in it.
    """
    path = Path(run_dir)
    require(
        path.is_dir(),
        f"run_dir={path} is not a directory. Set run_dir to where a chain of stages wrote.",
        FileNotFoundError,
    )
    run = Run(path)
    for place in sorted(_finished_artifacts(path)):
        artifact = open_artifact(place, key="run_dir")
        if artifact.stage != "report":
            run.artifacts[str(place.relative_to(path))] = artifact
    require(
        bool(run.artifacts),
        f"run_dir={path} holds no finished artifact, so there is nothing to report. "
        "Run a stage into it first (minitron compress run_dir=...), or correct run_dir.",
        FileNotFoundError,
    )
    _note_stale_inputs(run)
    _assign_evaluations(run)
    _note_what_is_missing(run)
    return run


def _finished_artifacts(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Artifacts in `folder` and, where a child is none itself (`evaluation/`), in its children."""
    for child in folder.iterdir():
        if not child.is_dir() or child.suffix in _UNFINISHED:
            continue
        if is_artifact(child):
            yield child
        elif depth > 1:
            yield from _finished_artifacts(child, depth - 1)


def read_history(file: Path) -> History:
    """Read history.jsonl: training lines hold `loss`, validation lines `validation_loss`, both nats per token, and of a
    distillation `validation_divergence` and `validation_agreement`, a share.

    Raises: ValueError: a line is not a JSON object with whole `step` and `tokens`.
    """
    keys = ("loss", "validation_loss", "validation_divergence", "validation_agreement")
    found: dict[str, dict[int, tuple[int, float]]] = {key: {} for key in keys}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step, tokens = int(record["step"]), int(record["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} line {number} is not a history record (a JSON object with step and tokens): {line[:80]!r}. "
                "Run the stage that wrote it again, or remove the line."
            ) from error
        for key in keys:
            if key in record:
                found[key][step] = tokens, _number(record[key])
    return History(*(_curve(found[key]) for key in keys))


def _curve(by_step: dict[int, tuple[int, float]]) -> Curve:
    points = [by_step[step] for step in sorted(by_step)]
    return Curve([tokens for tokens, _ in points], [value for _, value in points])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _input_named(run: Run, recorded: str) -> str | None:
    """Name in this run of an input whose path a manifest recorded; the run may have been moved since."""
    written = Path(recorded)
    for candidate in (written, run.path / written):
        if candidate.exists() and candidate.resolve().is_relative_to(run.path.resolve()):
            name = str(candidate.resolve().relative_to(run.path.resolve()))
            if name in run.artifacts:
                return name
    return written.name if not written.exists() and written.name in run.artifacts else None


def _stale_inputs(run: Run, artifact: Artifact) -> list[str]:
    """Names of this run's artifacts that `artifact` was made from in an earlier version."""
    recorded = [(_input_named(run, entry["path"]), entry["digest"]) for entry in artifact.manifest.get("inputs", [])]
    return [name for name, digest in recorded if name is not None and run.artifacts[name].digest != digest]


def _note_stale_inputs(run: Run) -> None:
    for name, artifact in run.artifacts.items():
        for stale in _stale_inputs(run, artifact):
            run.notes.append(f"{name} was made from an earlier version of {stale}; run stage {artifact.stage} again.")


def _assign_evaluations(run: Run) -> None:
    variants = {variant.name for variant in VARIANTS}
    for name, artifact in run.artifacts.items():
        if artifact.stage != "evaluate":
            continue
        model = str(artifact.facts.get("model", ""))
        variant = _input_named(run, model)
        if variant not in variants:
            run.other_evaluations[model or name] = artifact
        elif variant not in _stale_inputs(run, artifact):
            if variant in run.evaluations:
                run.notes.append(f"{variant} was evaluated more than once; {name} is the one shown.")
            run.evaluations[variant] = artifact


def _note_what_is_missing(run: Run) -> None:
    for variant in VARIANTS:
        if run.only_prunes and variant.name in TRAINED:
            continue
        if variant.is_optional and variant.name not in run.artifacts:
            continue
        if variant.name not in run.artifacts:
            run.missing.append(f"{variant.name} (stage {variant.stage}): no artifact, so no row {variant.label!r}.")
        elif variant.name not in run.evaluations:
            run.missing.append(f"an evaluation of {variant.name} (stage evaluate), so its held-out loss is not known.")
    for name, stage in OTHERS.items():
        if name not in run.artifacts:
            run.missing.append(f"{name} (stage {stage}): no artifact.")
