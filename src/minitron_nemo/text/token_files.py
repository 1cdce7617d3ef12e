"""Token files: documents become ids on disk, and are read again as one long row.

    <split>.bin   every document's tokens, end to end, each closed by the end-of-text token    uint16 or int32
                  (int32 where there are prompts or chats, which have tokens that are marked as not to be learned, see
                  documents.py)
    <split>.idx   where documents begin (Megatron-core's indexed dataset)

Training and validation are separate pairs of files, so no sample can reach across. Nothing communicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from minitron_nemo.checks import NothingThere, require
from minitron_nemo.text.corpus import Document

if TYPE_CHECKING:
    from minitron_nemo.text.encoding import Encoder

_BATCH_CHARACTERS = 2_000_000  # texts handed to the tokenizer at once: enough for its threads, small in memory


@dataclass
class TokenFiles:
    """One .bin/.idx pair being written: documents in, in order; at the end they are shuffled.

    Tokens wait in `<prefix>.ordered.*` on disk, not in memory.
    """

    prefix: Path
    vocab_size: int
    documents: int = 0
    tokens: int = 0
    marked: bool = False
    """Some tokens are not to be learned; see `documents.mark`."""
    _ordered: IndexedDatasetBuilder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._ordered = self._builder(self._waiting(".bin"))

    def add(self, ids: np.ndarray) -> None:
        self._ordered.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)

    def finish(self, *, seed: int) -> None:
        """Write `<prefix>.bin/.idx` with the documents in an order drawn from `seed`."""
        self._ordered.finalize(str(self._waiting(".idx")))
        if self.documents > 0:
            ordered = IndexedDataset(str(self._waiting("")))
            shuffled = self._builder(self.prefix.with_name(self.prefix.name + ".bin"))
            for index in np.random.default_rng(seed).permutation(self.documents):
                document = ordered[int(index)]
                shuffled.add_document(document, [len(document)])
            shuffled.finalize(str(self.prefix.with_name(self.prefix.name + ".idx")))
            del ordered
        for ending in (".bin", ".idx"):
            self._waiting(ending).unlink()

    def _waiting(self, ending: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.ordered{ending}")

    def _builder(self, path: Path) -> IndexedDatasetBuilder:
        dtype = np.int32 if self.marked else DType.optimal_dtype(self.vocab_size)
        return IndexedDatasetBuilder(str(path), dtype=dtype)


def encode_documents(documents: Iterable[Document], encoder: Encoder) -> Iterator[np.ndarray]:
    """Each document's ids, see `Encoder`, closed by the end-of-text token unless it ends with it already."""
    for batch in _by_size(documents):
        for ids in encoder(batch):
            closed = len(ids) > 0 and ids[-1] == encoder.end_of_text
            yield ids if closed else np.append(ids, encoder.end_of_text)


class TokenStream:
    """A .bin/.idx pair as one long row of tokens."""

    def __init__(self, prefix: str) -> None:
        require(
            IndexedDataset.exists(prefix),
            f"{prefix}.bin and {prefix}.idx are not both there. Run prepare-data, or correct the path.",
            NothingThere,
        )
        self.dataset = IndexedDataset(prefix)
        self.ends = np.cumsum(self.dataset.sequence_lengths, dtype=np.int64)

    def windows(self, seq_length: int) -> int:
        """Windows whose last token still has a label."""
        return max(0, (int(self.ends[-1]) - 1) // seq_length)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), int64, across documents, with their marks."""
        parts = []
        document = int(np.searchsorted(self.ends, start, side="right"))
        while length > 0:
            begin = int(self.ends[document - 1]) if document else 0
            take = min(length, int(self.ends[document]) - start)
            parts.append(self.dataset.get(document, offset=start - begin, length=take))
            start, length, document = start + take, length - take, document + 1
        return np.concatenate(parts, dtype=np.int64)


def _by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.whole)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
