"""What a training stage reads: conf's `data` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron_nemo.checks import require

STDLIB = "stdlib"
"""The corpus of this interpreter's own standard library."""


@dataclass
class DataConfig:  # conf/data/*.yaml
    """What a training stage reads."""

    prepared: Any = None
    """A prepare-data artifact, or a list of {path, weight} to blend several made with one tokenizer."""
    seed: int = 1234
    """Order of the training samples."""
    reset_at_documents: bool = False
    """Attention and positions begin anew at every document of a sample, whose last token is not supervised, as what
    follows it is another text. Needs trainer.micro_batch_size=1."""
    pad_documents_to: int = 1
    """With reset_at_documents: fill each document up to a multiple of this many tokens, and leave out what no longer
    fits. Context parallelism needs a multiple of 2 x trainer.context_parallel_size."""
    num_workers: int = 0
    """Loader processes per rank, at least 0; 0 loads in the training process, best without an accelerator."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} must be at least 0.")
        require(self.seed >= 0, f"data.seed={self.seed} must be at least 0.")
        require(self.pad_documents_to >= 1, f"data.pad_documents_to={self.pad_documents_to} must be at least 1.")
        require(
            self.reset_at_documents or self.pad_documents_to == 1,
            f"data.pad_documents_to={self.pad_documents_to} is of data.reset_at_documents=true. Set that too.",
        )
