"""Documents within a sample: which tokens are learned, and attention that does not reach across.

A token that is not to be learned, such as a prompt's, is stored as a negative number (`mark`).

Documents that do not see each other begin with new attention and positions:

    position_ids      [b, s]   from 0 in every document, and from 0 where a sample begins
    document_starts   [b, s]   bool, True where they are 0; only in batches whose documents do not see each other
    boundaries        0, the first token of each further document, s       int32

The boundaries travel as Megatron-core's `PackedSeqParams`, which transformer-engine's attention, our own
(`attention.py`) and Megatron's rotary embedding read. A micro-batch is then one sample, as that layout knows no batch.

Context parallelism splits every document for itself over the ranks, each into 2 cp chunks of which a rank takes one
from the front and its mirror image from the back. So a document's length has to be a multiple of 2 cp: `pad_documents`.

Communication: none.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

DOCUMENT_STARTS = "document_starts"


def mark(ids: np.ndarray) -> np.ndarray:
    """Ids of tokens that are read and not learned, as they are stored: -1 - id."""
    return -1 - ids


def unmark(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The ids, and 1 where the token is to be learned, 0 where not (float32)."""
    return torch.where(stored < 0, -1 - stored, stored), (stored >= 0).float()


def pad_documents(sample: dict[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """Fill each document of a sample up to a multiple of `multiple` tokens, none of which is supervised.

    What no longer fits is left out at the end, so that the sample keeps its length.

    Args:
        sample: tokens, labels, loss_mask, position_ids, each [s]; s is a multiple of `multiple`.
    Returns: the same keys, [s]; filling has token and label 0 and positions that go on.
    """
    length = len(sample["tokens"])
    assert length % multiple == 0, (length, multiple)
    starts = [*(sample["position_ids"] == 0).nonzero().flatten().tolist(), length]
    source, filling, positions = [], [], []
    for start, end in pairwise(starts):
        padded = -(-(end - start) // multiple) * multiple
        position = torch.arange(padded)
        source.append(start + position.clamp(max=end - start - 1))
        filling.append(position >= end - start)
        positions.append(position)
    index, is_filling = (torch.cat(parts)[:length] for parts in (source, filling))
    padded_sample = {key: value[index].masked_fill(is_filling, 0) for key, value in sample.items()}
    return padded_sample | {"position_ids": torch.cat(positions)[:length]}


def documents_of(document_starts: Tensor) -> PackedSeqParams:
    """The boundaries of the documents of a micro-batch of one sample, [1, s] on the host."""
    assert len(document_starts) == 1, document_starts.shape
    length = document_starts.shape[1]
    boundaries = torch.cat([document_starts[0].nonzero().flatten(), torch.tensor([length])]).int()
    longest = int(boundaries.diff().max())
    return PackedSeqParams("thd", boundaries, boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)


def documents_on_rank(batch: dict[str, Tensor], documents: PackedSeqParams, *, rank: int, size: int) -> dict[str, Any]:
    """What the `rank`-th of `size` context-parallel ranks holds of a micro-batch [1, s, ...] on its device.

    Returns: the same keys, [1, s/size, ...], and packed_seq_params, the boundaries of the whole.
    """
    device = batch["tokens"].device
    if size > 1:
        index = indices_on_rank(documents.cu_seqlens_q, rank, size).to(device)
        batch = {key: value.index_select(1, index) for key, value in batch.items()}
    boundaries = documents.cu_seqlens_q.to(device)
    return batch | {
        "packed_seq_params": dataclasses.replace(documents, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    }


def indices_on_rank(boundaries: Tensor, rank: int, size: int) -> Tensor:
    """Places of the tokens that the `rank`-th of `size` context-parallel ranks holds: [s/size] int64.

    Args:
        boundaries: see the module; every document's length is a multiple of 2 size.
    """
    parts = []
    for start, end in pairwise(boundaries.tolist()):
        chunks = torch.arange(start, end).chunk(2 * size)
        parts += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(parts)
