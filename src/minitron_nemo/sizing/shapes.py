"""Shapes of a recipe's models before there are any: what each step will make, from what is known of the teacher.

A model is one that an earlier step of the recipe makes, an artifact that is on this disk, or the teacher: a Hugging
Face folder's config.json, a GGUF file's metadata, or a published name where neither is here. No weights are needed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from minitron_nemo import engine
from minitron_nemo.artifact import is_artifact
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.config.plan import PlanConfig
from minitron_nemo.config.stages import EMBEDDED, ImportHfConfig, PruneConfig
from minitron_nemo.hf.config import shape_from_config
from minitron_nemo.hf.folder import Folder
from minitron_nemo.hf.gguf import is_gguf
from minitron_nemo.hf.gguf_metadata import gguf_config, open_gguf
from minitron_nemo.plan import PruningPlan
from minitron_nemo.published import PUBLISHED, published_shape
from minitron_nemo.runtime.model_artifact import SHAPE, read_shape
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.settling import asked


class Shapes:
    """By the place where a step writes its model."""

    def __init__(self) -> None:
        self._made: dict[Path, ModelShape] = {}
        self.exported: set[str] = set()
        """Where Hugging Face folders will be."""

    def make(self, output: str, shape: ModelShape) -> None:
        self._made[Path(output)] = shape

    def at(self, place: str | None, key: str) -> ModelShape:
        """Raises: FileNotFoundError: no step before makes it, and it is not here."""
        path = Path(place or "")
        if path in self._made:
            return self._made[path]
        if (path / SHAPE).is_file() or is_artifact(path):
            return read_shape(path, key=key, foreign=lambda directory: engine.open_model(directory, key=key).shape)
        raise NothingThere(
            f"{key}={place} is made by no step before it in compress.steps, and is not here. Name the step that makes "
            "it there, or a model that is."
        )


def teacher_shape(config: ImportHfConfig, plan: PlanConfig) -> ModelShape:
    """Of the model that import-hf will read.

    Raises: FileNotFoundError, ValueError: it is not here and has no published name, or its config cannot be read.
    """
    source, multiple = Path(config.model), config.make_vocab_size_divisible_by
    if config.model == EMBEDDED:
        source = Path(__file__).parents[1] / "teacher"
    if is_gguf(source):
        return shape_from_config(gguf_config(open_gguf(source)), make_vocab_size_divisible_by=multiple)
    if source.is_dir():
        return Folder(source, ignore=config.ignore_tensors).shape(make_vocab_size_divisible_by=multiple)
    require(
        plan.teacher is not None,
        f"import_hf.model={config.model} is not here, so nothing says the teacher's shape. Set import_hf.model to its "
        "Hugging Face folder (config.json is enough to plan) or GGUF file, or plan.teacher to a published name: "
        f"{', '.join(name.lower().replace(' ', '-') for name in PUBLISHED)}.",
        NothingThere,
    )
    shape = published_shape(str(plan.teacher), key="plan.teacher")
    padded = -(-shape.padded_vocab_size // multiple) * multiple
    return dataclasses.replace(shape, padded_vocab_size=padded)


def student_shape(config: PruneConfig, source: ModelShape) -> ModelShape:
    """Of the model that prune will make.

    Raises: ValueError: a target that does not fit, or that only scores can settle.
    """
    if config.plan is not None and PruningPlan.is_in(Path(config.plan)):
        return PruningPlan.load(Path(config.plan)).target

    def chosen_by_scores(number: int) -> list[int]:
        require(
            config.layers is not None,
            f"prune.target.num_layers={number} of a model that mixes dense layers and such with experts: which stay, "
            "and so the student's size, is settled by scores. Set prune.layers to plan it.",
        )
        return list(config.layers or ())

    base, _, resolve = asked(config, source, chosen_by_scores)
    target = resolve(base)
    tied = source.share_embeddings_and_output_weights and target.hidden_size < source.hidden_size
    if tied and config.surgery.settled(source, target).turns:  # parts the tied embeddings, as `settle` says
        return resolve(dataclasses.replace(base, share_embeddings_and_output_weights=False))
    return target
