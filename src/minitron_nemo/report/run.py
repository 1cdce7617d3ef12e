"""What a run directory holds, read once: the artifacts of its stages, their evaluations and their histories.

Reading is forgiving about what is absent (a report of half a run is wanted while the other half computes) and strict
about what contradicts itself: an evaluation of an earlier version of a model does not count as one of this model.
Everything that is absent or doubtful becomes a sentence in `Run.missing` or `Run.notes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from minitron_nemo.checks import NothingThere, reading, require
from minitron_nemo.config.stages import ReportRow
from minitron_nemo.report.histories import HISTORY, History, read_history
from minitron_nemo.report.lineage import Lineage
from minitron_nemo.shape import ModelShape

TEACHERS = ("import-hf", "correct-teacher")
"""Stages whose models are teachers where no row says so."""
IMPORTANCE, EXPORT = "estimate-importance", "export-hf"
SHAPE = "shape.json"  # every model artifact holds one, and no other does

_TRAINING = ".training"
_UNFINISHED = (".partial", ".replaced", ".unfinished", _TRAINING)
"""What stages leave beside their output until it is whole."""


@dataclass(frozen=True)
class Model:
    """One row of the report: a model of the run, there or missing."""

    name: str
    """Of its artifact, as `Lineage` names them."""
    label: str
    is_teacher: bool = False
    is_optional: bool = False
    """A run without it lacks nothing."""


@dataclass
class Run:
    """A run directory as found."""

    path: Path
    lineage: Lineage
    """Every finished artifact but reports."""
    models: list[Model] = field(default_factory=list)
    """The rows, in the order of the table."""
    expected_order: list[Model] = field(default_factory=list)
    """From the lowest held-out loss to the highest; empty: no order is claimed."""
    evaluations: dict[str, Artifact] = field(default_factory=dict)
    """By model name, the evaluation that measured this very version of it."""
    other_evaluations: dict[str, Artifact] = field(default_factory=dict)
    """By evaluated path, evaluations of what is no row."""
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def artifacts(self) -> dict[str, Artifact]:
        return self.lineage.artifacts

    @property
    def students(self) -> list[str]:
        """Names of the rows that are there and are no teachers."""
        return [model.name for model in self.models if not model.is_teacher and model.name in self.artifacts]

    @property
    def nothing_trained(self) -> bool:
        """Whether a row is a pruned model and no trace stands of training any row, finished or begun."""
        stages = [self.artifacts[name].stage for name in self.students]
        trained = any(self.tokens(model.name) or self.history(model.name) for model in self.models)
        begun = any(place.suffix == _TRAINING for place in self.path.iterdir())
        return "prune" in stages and not trained and not begun

    @property
    def pruned(self) -> str | None:
        """The prune artifact whose plan is shown: the one most students were cut by, at a tie the one of the lowest
        row; where no row says it, the newest."""
        found = self.lineage.made_by("prune")
        cuts = [cut for name in reversed(self.students) if (cut := self.lineage.nearest(name, found)) is not None]
        return max(dict.fromkeys(cuts), key=cuts.count) if cuts else self.lineage.newest(found)

    @property
    def importance(self) -> str | None:
        """The importance that is shown: the one of the plan that is shown; where it has none, the newest."""
        found = self.lineage.made_by(IMPORTANCE)
        used = self.lineage.nearest(self.pruned, found) if self.pruned is not None else None
        return used if used is not None else self.lineage.newest(found)

    @property
    def export(self) -> str | None:
        """The export that speaks for the run: that of the highest student; where none is of a student, the newest."""
        found = self.lineage.made_by(EXPORT)
        of_students = ([each for each in found if name in self.lineage.inputs(each)] for name in self.students)
        return self.lineage.newest(next((some for some in of_students if some), found))

    def shape(self, name: str) -> ModelShape | None:
        """Shape of a model artifact, or None where the artifact or its shape.json is absent."""
        artifact = self.artifacts.get(name)
        if artifact is None or not (file := artifact.path / SHAPE).is_file():
            return None
        with reading(file, "Make the artifact again, or copy it again."):
            return ModelShape.from_dict(json.loads(file.read_text()))

    def history(self, name: str) -> History | None:
        """Training history of an artifact, or None where there is none."""
        artifact = self.artifacts.get(name)
        if artifact is None or not (file := artifact.path / HISTORY).is_file():
            return None
        return read_history(file)

    def tokens(self, name: str) -> int | None:
        """Tokens that the model's own stage trained on: 0 of surgery, None where the run cannot know, as of an imported
        teacher."""
        artifact = self.artifacts.get(name)
        if artifact is None:
            return None
        if artifact.stage == "prune":
            return 0
        if (tokens := artifact.metrics.get("tokens")) is not None:
            return int(tokens)
        history = self.history(name)
        return history.training.tokens[-1] if history and history.training.tokens else None


def read_run(run_dir: Path | str, rows: Sequence[ReportRow] = (), expected_order: Sequence[str] = ()) -> Run:
    """Look through a run directory.

    Args:
        rows, expected_order: as in ReportConfig.
    Raises: NothingThere: no such directory, or no finished artifact in it.
    """
    path = Path(run_dir)
    require(
        path.is_dir(),
        f"run_dir={path} is not a directory. Set run_dir to where a chain of stages wrote.",
        NothingThere,
    )
    lineage = Lineage(path, _artifacts(path, rows))
    require(
        bool(lineage.artifacts),
        f"run_dir={path} holds no finished artifact, so there is nothing to report. "
        "Run a stage into it first (minitron compress run_dir=...), or correct run_dir.",
        NothingThere,
    )
    run = Run(path, lineage, _models(lineage, rows))
    run.expected_order = [_expected(run, name) for name in expected_order]
    _note_stale_inputs(run)
    _assign_evaluations(run)
    _note_what_is_missing(run)
    return run


def _artifacts(path: Path, rows: Sequence[ReportRow]) -> dict[str, Artifact]:
    """By name, what stands in the run directory and the rows' models that stand elsewhere; no reports."""
    found = {str(place.relative_to(path)): place for place in sorted(_finished_artifacts(path))}
    places = {place.resolve() for place in found.values()}
    for row in rows:
        if is_artifact(row.model) and Path(row.model).resolve() not in places:
            found[row.model] = Path(row.model)
    opened = {name: open_artifact(place, key="run_dir") for name, place in found.items()}
    return {name: artifact for name, artifact in opened.items() if artifact.stage != "report"}


def _finished_artifacts(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Artifacts in `folder` and, where a child is none itself (`evaluation/`), in its children."""
    for child in folder.iterdir():
        if not child.is_dir() or child.suffix in _UNFINISHED:
            continue
        if is_artifact(child):
            yield child
        elif depth > 1:
            yield from _finished_artifacts(child, depth - 1)


def _model(lineage: Lineage, row: ReportRow) -> Model:
    """A row of the config; a missing one is named as it would be."""
    place, root = Path(row.model), lineage.root
    if place.is_relative_to(root) and not place.exists():
        name = str(place.relative_to(root))
    else:
        name = lineage.name_of(place) or row.model
    return Model(name, row.title, row.teacher, row.optional)


def _models(lineage: Lineage, rows: Sequence[ReportRow]) -> list[Model]:
    """The rows of the config; other teachers above them, first as they came, and other students below, each after those
    it was made from."""
    said = [_model(lineage, row) for row in rows]
    names = {model.name for model in said}
    rest = [name for name, artifact in lineage.artifacts.items() if (artifact.path / SHAPE).is_file()]
    rest = [name for name in lineage.sources_first(rest) if name not in names]
    teachers = [name for stage in TEACHERS for name in lineage.made_by(stage) if name in rest]
    students = [name for name in rest if name not in teachers]
    return [
        *(Model(name, name, is_teacher=True) for name in teachers),
        *said,
        *(Model(name, name) for name in students),
    ]


def _expected(run: Run, name: str) -> Model:
    """The row that has this label, or this folder's name; a word that is neither stands for itself."""
    by_label = {model.label: model for model in run.models}
    by_folder = {Path(model.name).name: model for model in run.models}
    return by_label.get(name) or by_folder.get(name) or Model(name, name)


def _note_stale_inputs(run: Run) -> None:
    for name, artifact in run.artifacts.items():
        for stale in run.lineage.stale_inputs(name):
            run.notes.append(f"{name} was made from an earlier version of {stale}; run stage {artifact.stage} again.")


def _assign_evaluations(run: Run) -> None:
    names = {model.name for model in run.models}
    for name in run.lineage.made_by("evaluate"):
        evaluated = str(run.artifacts[name].facts.get("model", ""))
        model = run.lineage.name_of(evaluated)
        if model not in names:
            run.other_evaluations[evaluated or name] = run.artifacts[name]
        elif model not in run.lineage.stale_inputs(name):
            if model in run.evaluations:
                run.notes.append(f"{model} was evaluated more than once; {name} is the one shown.")
            run.evaluations[model] = run.artifacts[name]


def _note_what_is_missing(run: Run) -> None:
    for model in run.models:
        if model.name not in run.artifacts:
            if not model.is_optional:
                run.missing.append(f"{model.name}: no artifact, so no row {model.label!r}.")
        elif model.name not in run.evaluations:
            run.missing.append(f"an evaluation of {model.name} (stage evaluate), so its held-out loss is not known.")
    for name, stage in (("importance", IMPORTANCE), ("export", EXPORT)):
        if not run.lineage.made_by(stage):
            run.missing.append(f"{name} (stage {stage}): no artifact.")
