"""Tokens as rows over a vocabulary's real columns, a chunk of them at a time.

    rows    logits of n tokens, student and teacher    [n, real columns of this rank]
    chunk   as many of them as CHUNK_ELEMENTS allows, the same on every rank

Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from minitron_nemo.divergence.known_teacher import KnownTeacher
from minitron_nemo.divergence.vocabulary import Vocabulary
from minitron_nemo.parallel import group_size

CHUNK_ELEMENTS = 17 << 20
"""Logits of one chunk: 68 MiB in float32, of which forward KL has three at once; a launch is little beside it."""
CPU_CHUNK_ELEMENTS = 1 << 17  # what a chunk's temporaries leave in a core's cache, which they are read from ten times
CPU_CHUNK_ELEMENTS_OF_RANKS = 1 << 19  # with smaller ones the chunks' reductions take more time than their arithmetic

TeacherRows: TypeAlias = Tensor | KnownTeacher
"""Logits [n, v/tp], or what is known of them."""


@dataclass(frozen=True)
class Rows:
    """What is known of n tokens, and what is asked for."""

    student: Tensor
    """[n, real columns]"""
    teacher: TeacherRows
    """[n, real columns], or what is known of the n tokens"""
    labels: Tensor | None
    """[n], global"""
    weights: Tensor | None = None
    """[1 or 2, n], of divergence and cross-entropy in the loss; None: no gradient is asked for"""
    out: Tensor | None = None
    """[n, real columns], gets the gradient with respect to the student's logits; may be `student` itself"""

    def __getitem__(self, chunk: slice) -> Rows:
        return Rows(
            self.student[chunk],
            self.teacher[chunk],
            self.labels[chunk] if self.labels is not None else None,
            self.weights[:, chunk] if self.weights is not None else None,
            self.out[chunk] if self.out is not None else None,
        )


def real_rows(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[n, real columns], a view of contiguous logits [s, b, v/tp]."""
    return logits.detach().reshape(-1, logits.shape[-1])[:, : vocabulary.local]


def chunks(rows: Tensor, vocabulary: Vocabulary) -> Iterator[slice]:
    """The same on every rank, whatever it holds of the padding: each chunk has its reductions."""
    on_cpu = CPU_CHUNK_ELEMENTS if group_size(vocabulary.group) == 1 else CPU_CHUNK_ELEMENTS_OF_RANKS
    elements = min(CHUNK_ELEMENTS, on_cpu) if rows.device.type == "cpu" else CHUNK_ELEMENTS
    yield from even_slices(rows.shape[0], max(1, elements // vocabulary.columns))


def even_slices(length: int, longest: int) -> Iterator[slice]:
    """As few as there can be, none of them a small rest."""
    step = -(-length // max(1, -(-length // longest)))
    for start in range(0, length, step or 1):
        yield slice(start, start + step)
