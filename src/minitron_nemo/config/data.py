"""Which prepared text a stage reads, and how: conf's `data` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from minitron_nemo.checks import require
from minitron_nemo.config.ranges import SEEDS, Ranged, ranged

STDLIB = "stdlib"
"""The corpus of this interpreter's own standard library."""


@dataclass
class Prepared(Ranged):
    """What a stage reads that takes windows of the text as they come."""

    KEY: ClassVar[str] = "data"

    prepared: Any = None
    """A prepare-data artifact, or a list of {path, weight} to blend several made with one tokenizer."""


@dataclass
class Documents(Prepared):
    """What a stage reads that may tell the documents of a window apart."""

    reset_at_documents: bool = False
    """Attention and positions begin anew at every document of a sample, whose last token is not supervised, as what
    follows it is another text. Needs trainer.micro_batch_size=1."""


@dataclass
class DataConfig(Documents):
    """What a training stage reads; the whole of a recipe's `data`."""

    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    """Order of the training samples."""
    pad_documents_to: int = ranged(1, at_least=1)
    """With reset_at_documents: fill each document up to a multiple of this many tokens, and leave out what no longer
    fits. Context parallelism needs a multiple of 2 x trainer.context_parallel_size."""
    num_workers: int = ranged(0, at_least=0, how=True)
    """Loader processes per rank; 0 loads in the training process, best without an accelerator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.reset_at_documents or self.pad_documents_to == 1,
            f"data.pad_documents_to={self.pad_documents_to} is of data.reset_at_documents=true. Set that too.",
        )
