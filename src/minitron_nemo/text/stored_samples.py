"""Training samples whose teacher's answers are stored: the windows of a `teacher_logits` store, in any order.

The order is drawn from the data's seed: sources take turns by their weights, each going through its stored windows in a
new order every time. Sample i of a run is the same on every layout and at every batch size.

    tokens, labels, position_ids           [s]      int64
    loss_mask                              [s]      float32
    teacher_*                              [s, ...] as stored (teacher_records.py)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from megatron.core.datasets import helpers
from torch import Tensor
from torch.utils.data import Dataset

from minitron_nemo.artifact import Artifact
from minitron_nemo.checks import require
from minitron_nemo.text.blend import weighted_sources
from minitron_nemo.text.corpus import TRAIN
from minitron_nemo.text.teacher_store import Shards, StoredSource, TeacherStore
from minitron_nemo.text.token_files import TokenStream
from minitron_nemo.text.windows import Windows


def stored_sources(
    blend: list[tuple[Artifact, float]], seq_length: int, num_samples: int | None
) -> tuple[list[StoredSource], Windows]:
    """What a store of this blend holds, and its text; sources without a whole window are left out.

    Args:
        num_samples: shared out by the sources' weights and rounded up, none getting more than it has, and spread over
            each from its beginning to its end; None: all.
    """
    shares = weighted_sources(blend)
    total = sum(weight for *_, weight in shares)
    sources, streams, first = [], [], 0
    for artifact, source, weight in shares:
        if source[f"{TRAIN}_tokens"] <= seq_length:
            continue
        stream = TokenStream(os.path.abspath(artifact.path / source[TRAIN]))
        available = samples = stream.windows(seq_length)
        if num_samples is not None:
            samples = min(samples, int(np.ceil(num_samples * weight / total)))
        sources.append(StoredSource(artifact.digest, source[TRAIN], first, samples, spread_over=available))
        streams.append(stream)
        first += samples
    return sources, _windows(streams, sources, seq_length)


def _windows(streams: Sequence[TokenStream], sources: Sequence[StoredSource], seq_length: int) -> Windows:
    counts = [source.samples for source in sources]
    return Windows(streams, counts, seq_length, out_of=[source.spread_over or source.samples for source in sources])


class StoredSamples(Dataset):
    """`num_samples` samples of a store, sources mixed by weight."""

    def __init__(
        self,
        shards: Shards,
        sources: Sequence[StoredSource],
        windows: Windows,
        weights: Sequence[float],
        num_samples: int,
        *,
        seed: int,
        with_teacher: bool = True,
    ) -> None:
        """
        Args:
            sources, windows: those to train on and their text, with a relative weight each.
            with_teacher: read the teacher's answers too; only the last pipeline stage needs them.
        """
        self.shards, self.sources, self.windows = shards, sources, windows
        self.seed, self.with_teacher = seed, with_teacher
        self.source_of = np.empty(num_samples, np.int16)
        self.turn_of = np.empty(num_samples, np.int64)
        shares = np.asarray(weights, np.float64) / sum(weights)
        helpers.build_blending_indices(self.source_of, self.turn_of, shares, len(shares), num_samples, False)
        self._order = lru_cache(maxsize=2 * len(sources))(self._permutation)

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self.source_of[index])
        source = self.sources[number]
        epoch, turn = divmod(int(self.turn_of[index]), source.samples)
        window = int(self._order(number, epoch)[turn])
        text = self.windows.read(window + int(self.windows.ends[number]) - source.samples)
        return text | (self.shards.read(source.first + window) if self.with_teacher else {})

    def _permutation(self, number: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number, epoch]).permutation(self.sources[number].samples)


def samples_of(
    store: TeacherStore, blend: list[tuple[Artifact, float]], *, seed: int, with_teacher: bool
) -> Callable[[int], StoredSamples]:
    """As many samples as one asks for, of the sources in `blend`, which may leave out some that are stored.

    Raises: ValueError: the store has nothing of one of the artifacts.
    """
    path = store.artifact.path
    stored = {(source.data, source.file): source for source in store.sources}
    here = {source.data for source in store.sources}
    sources, streams, weights = [], [], []
    for artifact, source, weight in weighted_sources(blend):
        require(
            artifact.digest in here,
            f"data.prepared={artifact.path} is not the data that distill.teacher_logits={path} was made from. "
            "Set data.prepared to that, or run teacher-logits on this.",
        )
        if (artifact.digest, source[TRAIN]) in stored:
            sources.append(stored[artifact.digest, source[TRAIN]])
            streams.append(TokenStream(os.path.abspath(artifact.path / source[TRAIN])))
            weights.append(weight)
    windows = _windows(streams, sources, store.format.seq_length)
    return partial(StoredSamples, store.shards, sources, windows, weights, seed=seed, with_teacher=with_teacher)
