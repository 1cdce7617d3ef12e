"""Samples cut from token files where they lie: consecutive windows, the same on every layout.

    tokens, labels, position_ids   [s], [b, s]   int64
    loss_mask                      [s], [b, s]   float32

Window w of a file reads tokens w * seq_length up to and with (w + 1) * seq_length, the last as a label only; a shorter
rest at the end is left out. Evaluation, calibration and a teacher's stored answers read such windows; training without
stored answers reads Megatron-core's shuffled samples (`nemo/data_module.py`). Nothing communicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.text.documents import unmark
from minitron_nemo.text.token_files import TokenStream


class Windows:
    """`counts` windows of several token files, numbered through.

    Args:
        out_of: of so many of each file, spread evenly over these: neighbouring windows are of the same documents; None:
            the first ones.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        counts: Sequence[int],
        seq_length: int,
        out_of: Sequence[int] | None = None,
    ) -> None:
        self.streams, self.seq_length = streams, seq_length
        self.counts, self.out_of = counts, counts if out_of is None else out_of
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, window: int) -> dict[str, Tensor]:
        """tokens, labels, position_ids and loss_mask [s]."""
        source = int(np.searchsorted(self.ends, window, side="right"))
        place = window - (int(self.ends[source - 1]) if source else 0)
        start = place * self.out_of[source] // self.counts[source]
        stored = self.streams[source].read(start * self.seq_length, self.seq_length + 1)
        text, supervised = unmark(torch.from_numpy(stored))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": supervised[1:],
            "position_ids": torch.arange(self.seq_length),
        }


def batches(
    prefix: str | Path | Sequence[str],
    seq_length: int,
    micro_batch_size: int,
    num_samples: int | None = None,
    *,
    seed: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> MicroBatches:
    """Fixed samples of a split, this data-parallel rank's share of them, in micro-batches.

    A sample is one of the split's consecutive windows of seq_length tokens (they share no label; a shorter rest at the
    end is left out). Without a seed: the first num_samples of them, in order, for evaluation. With one: num_samples
    different ones drawn at random, for calibration. The set of samples depends on no layout; every rank gets equally
    many full micro-batches, the last ones filled up by samples whose loss_mask is 0 (evaluation only).

    Args:
        prefix: path of a .bin/.idx pair without its ending, or several, read one after the other.
        num_samples: over all data-parallel ranks; None: all windows there are.
    Returns: dicts of tokens, labels, position_ids [b, s] int64 and loss_mask [b, s] float32, on the CPU, each read when
        its turn comes.
    Raises: ValueError: more samples than windows, or calibration samples that do not split evenly.
    """
    prefixes = [str(prefix)] if isinstance(prefix, (str, Path)) else [str(each) for each in prefix]
    streams = [TokenStream(each) for each in prefixes]
    windows = Windows(streams, [stream.windows(seq_length) for stream in streams], seq_length)
    available = len(windows)
    wanted = available if num_samples is None else num_samples
    require(
        1 <= wanted <= available,
        f"num_samples={wanted} must be between 1 and {available}, the windows of seq_length={seq_length} in "
        f"{', '.join(prefixes)}. Lower num_samples or seq_length, or prepare more text.",
    )
    per_step = micro_batch_size * dp_size
    require(
        seed is None or wanted % per_step == 0,
        f"num_samples={wanted} cannot be split over micro_batch_size={micro_batch_size} x {dp_size} data-parallel "
        f"ranks. Set num_samples to a multiple of {per_step}.",
    )
    if seed is None:
        chosen = np.arange(wanted)
    else:
        chosen = np.random.default_rng(seed).permutation(available)[:wanted]
    return MicroBatches(windows, chosen, micro_batch_size, dp_rank, dp_size)


@dataclass(frozen=True)
class MicroBatches:
    """What `batches` returns: goes through them from the beginning each time, and knows how many there are."""

    windows: Windows
    chosen: np.ndarray
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def __len__(self) -> int:
        return -(-len(self.chosen) // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        chosen, rows = self.chosen, self.micro_batch_size
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * rows
            places = range(first, first + rows)
            samples = [self.windows.read(int(chosen[min(place, len(chosen) - 1)])) for place in places]
            batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
            is_counted = torch.tensor([float(place < len(chosen)) for place in places])
            yield batch | {"loss_mask": is_counted[:, None] * batch["loss_mask"]}
