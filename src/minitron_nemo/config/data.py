"""Which prepared text a stage reads, and how: conf's `data` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron_nemo.checks import require
from minitron_nemo.config.identity import how

STDLIB = "stdlib"
"""The corpus of this interpreter's own standard library."""


@dataclass
class Prepared:
    """What a stage reads that takes windows of the text as they come."""

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

    seed: int = 1234
    """Order of the training samples."""
    pad_documents_to: int = 1
    """With reset_at_documents: fill each document up to a multiple of this many tokens, and leave out what no longer
    fits. Context parallelism needs a multiple of 2 x trainer.context_parallel_size."""
    num_workers: int = how(0)
    """Loader processes per rank, at least 0; 0 loads in the training process, best without an accelerator."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} must be at least 0.")
        require(self.seed >= 0, f"data.seed={self.seed} must be at least 0.")
        require(self.pad_documents_to >= 1, f"data.pad_documents_to={self.pad_documents_to} must be at least 1.")
        require(
            self.reset_at_documents or self.pad_documents_to == 1,
            f"data.pad_documents_to={self.pad_documents_to} is of data.reset_at_documents=true. Set that too.",
        )
