"""Calibration samples from a JSONL file: one record a sample, padded to one length, padding masked.

    {"text": ...}                      every token counts
    {"prompt": ..., "response": ...}   every token counts, or the response's alone
    {"messages": [...], "tools": ...}  every token counts, or the assistant's alone

    tokens, labels, position_ids   [b, s]   int64      labels close with the end-of-text token
    loss_mask                      [b, s]   float32    1 where the label is the record's and counts

The draw depends on no layout: the samples are the same for every data-parallel size and micro-batch size. Nothing
communicates; every rank reads the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minitron_nemo.checks import NothingThere, require
from minitron_nemo.text.chats import TOOLS, read_chat
from minitron_nemo.text.corpus import Document
from minitron_nemo.text.documents import unmark
from minitron_nemo.text.jsonl import read_jsonl

if TYPE_CHECKING:
    from minitron_nemo.text.encoding import Encoder

_KEY = "importance.calibration"


def calibration_batches(
    file: Path | str,
    encoder: Encoder,
    *,
    seq_length: int,
    micro_batch_size: int,
    num_samples: int,
    count_prompts: bool = True,
    seed: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> list[dict[str, Tensor]]:
    """This data-parallel rank's share of `num_samples` records drawn at random, in micro-batches.

    The last micro-batches are filled up by samples without a token that counts.

    Args:
        encoder: how a record becomes ids, as in prepare-data; its end-of-text token closes a record and pads.
    Raises: FileNotFoundError: no such file. ValueError: a line that is no such record, too few records, or a record
        with no token that counts.
    """
    records = list(_records(Path(file), encoder))
    require(
        1 <= num_samples <= len(records),
        f"importance.num_samples={num_samples} must be between 1 and the {len(records)} records of {_KEY}={file}. "
        f"Set importance.num_samples to at most {len(records)}.",
    )
    drawn = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
    samples = [_sample(encoder, *records[index], seq_length=seq_length, count_prompts=count_prompts) for index in drawn]
    filler = {key: torch.zeros_like(tensor) for key, tensor in samples[0].items()}
    together = micro_batch_size * dp_size
    samples += [filler] * (-num_samples % together)
    first = dp_rank * micro_batch_size
    return [
        {key: torch.stack([sample[key] for sample in rows]) for key in rows[0]}
        for start in range(first, len(samples), together)
        for rows in [samples[start : start + micro_batch_size]]
    ]


def _records(file: Path, encoder: Encoder) -> Iterator[tuple[str, Document]]:
    """(where it stands, document) of every record."""
    require(file.is_file(), f"{_KEY}={file} does not exist. Give a JSONL file of samples.", NothingThere)
    for where, record in read_jsonl(file, f"{_KEY}={file}", holds="text, prompt and response, or messages"):
        if "messages" in record and "text" not in record:
            chat = read_chat(record["messages"], record.get(TOOLS), where)
            yield where, Document(None, encoder.render(chat), chat=chat)
            continue
        keys = ("text",) if "text" in record else ("prompt", "response")
        for key in keys:
            require(
                isinstance(record.get(key), str),
                f'{where} has no string {key!r}. Write {{"text": ...}}, {{"prompt": ..., "response": ...}} or '
                '{"messages": [...]}.',
            )
        yield where, Document(None, record[keys[-1]], None if keys == ("text",) else record["prompt"])


def _sample(
    encoder: Encoder, where: str, document: Document, *, seq_length: int, count_prompts: bool
) -> dict[str, Tensor]:
    (stored,) = encoder([document])
    ids, learned = unmark(torch.from_numpy(stored[:seq_length]))
    mask = torch.zeros(seq_length)
    # a token counts where its label does; the last one's is the end of text, which counts as the token before it
    mask[: len(ids)] = 1.0 if count_prompts else torch.cat([learned[1:], learned[-1:]])
    require(
        len(ids) > 0 and bool(mask.any()),
        f"{where} leaves no token that counts within trainer.seq_length={seq_length}. Lengthen "
        "trainer.seq_length, shorten the prompt, or take the record out.",
    )
    padded = torch.full((seq_length + 1,), encoder.end_of_text)
    padded[: len(ids)] = ids
    return {
        "tokens": padded[:-1].clone(),
        "labels": padded[1:].clone(),
        "position_ids": torch.arange(seq_length),
        "loss_mask": mask,
    }
