"""Model artifacts: NeMo 2 distributed checkpoints that every layout and every NeMo installation can load.

weights/     Megatron distributed checkpoint, keys prefixed `module.` as NeMo writes them
context/     what a trainer of its own needs to load it without this package; NeMo's classes
tokenizer/   the HF tokenizer
shape.json   the ModelShape, which is what we read: plain JSON, no code is built from it
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.kinds import refuse_as_artifact
from minitron_nemo.parallel import by_rank_zero
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer_files import copy_tokenizer

CONTEXT, TOKENIZER, SHAPE = "context", "tokenizer", "shape.json"

ForeignShape = Callable[[Path], ModelShape]
"""Reads the shape of a checkpoint that no stage of ours made. Raises: ValueError: a model that is not supported."""


def write_shape(shape: ModelShape, tokenizer: Path, directory: Path) -> None:
    """Write shape and tokenizer beside the weights. One process.

    Args:
        tokenizer: directory with a HF tokenizer, whose files are copied; it may be a model's.
    """
    (directory / SHAPE).write_text(json.dumps(shape.to_dict(), indent=2) + "\n")
    if tokenizer.resolve() != (directory / TOKENIZER).resolve():
        copy_tokenizer(tokenizer, directory / TOKENIZER)


def read_shape(directory: Path, *, key: str, foreign: ForeignShape) -> ModelShape:
    """Shape of the model in `directory`, an artifact of ours or a NeMo 2 checkpoint.

    Args:
        key: the user's config key that named the directory.
    Raises: FileNotFoundError: no model there.
    """
    if (directory / SHAPE).is_file():
        return ModelShape.from_dict(json.loads((directory / SHAPE).read_text()))
    require(directory.exists(), f"{key}={directory} does not exist. Correct {key}.", NothingThere)
    require(
        (directory / CONTEXT / "model.yaml").is_file(),
        f"{key}={directory} holds neither {SHAPE} (an artifact of this package) nor {CONTEXT}/model.yaml "
        f"(a NeMo 2 checkpoint). Set {key} to one of them.",
        NothingThere,
    )
    return foreign(directory)


MODEL_STAGES = ("import-hf", "pretrain", "correct-teacher", "prune", "distill")


@dataclass(frozen=True)
class ModelInput:
    """A model some stage takes: where it is, what it is, and who made it (None: a NeMo checkpoint from elsewhere)."""

    path: Path
    shape: ModelShape
    tokenizer: Path
    vocab_size: int
    """Rows of the embedding that are tokens; the rest is padding."""
    artifact: Artifact | None

    @property
    def artifacts(self) -> list[Artifact]:
        return [self.artifact] if self.artifact else []


@by_rank_zero
def open_model(
    path: Path | str | None, *, key: str, trust_checkpoint: bool = False, foreign: ForeignShape
) -> ModelInput:
    """A model given as an input. Every rank calls, and rank 0 looks.

    A checkpoint that no stage of ours made is loaded by libraries that unpickle its metadata, so it needs the user's
    word that it comes from someone they trust.

    Args:
        key: the user's config key that named the path.
    Raises: FileNotFoundError: missing or unfinished. ValueError: another kind of artifact, or not trusted.
    """
    require(bool(path), f"{key} is not set. Set it to a model artifact, made by {', '.join(MODEL_STAGES)}.")
    directory = Path(path)  # type: ignore[arg-type]
    if (directory / CONTEXT).is_dir() and not (directory / SHAPE).is_file():
        require(
            trust_checkpoint,
            f"{key}={directory} is a NeMo checkpoint from elsewhere, and loading one runs Python's unpickler on its "
            "metadata. If you trust where it comes from, set trust_checkpoint=true; else import its HF safetensors "
            "with import-hf.",
        )
        artifact = None
    else:
        refuse_as_artifact(directory, key)
        artifact = open_artifact(directory, made_by=MODEL_STAGES, key=key)
    shape = read_shape(directory, key=key, foreign=foreign)
    places = (directory / TOKENIZER, directory / CONTEXT / "nemo_tokenizer")
    tokenizer = next((place for place in places if place.is_dir()), None)
    if tokenizer is None:
        raise NothingThere(f"{key}={directory} has no tokenizer/. Copy the HF tokenizer's files there.")
    vocab_size = artifact.facts["vocab_size"] if artifact else shape.padded_vocab_size
    return ModelInput(directory, shape, tokenizer, vocab_size, artifact)
