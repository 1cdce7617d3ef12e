"""Calibration samples from a JSONL file: one record a sample, padded to one length, padding masked.

    {"text": ...}                      every token counts
    {"prompt": ..., "response": ...}   every token counts, or the response's alone

    tokens, labels, position_ids   [b, s]   int64      labels close with the end-of-text token
    loss_mask                      [b, s]   float32    1 where the label is the record's and counts

The draw depends on no layout: the samples are the same for every data-parallel size and micro-batch size. Nothing
communicates; every rank reads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.checks import NothingThere, require
from minitron_nemo.text.jsonl import read_jsonl

_KEY = "importance.calibration"


def calibration_batches(
    file: Path | str,
    encode: Callable[[str], list[int]],
    *,
    end_of_text: int,
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
        encode: text -> token ids, without special tokens.
        end_of_text: closes a record and pads.
    Raises: FileNotFoundError: no such file. ValueError: a line that is no such record, too few records, or a record
        with no token that counts.
    """
    records = list(_records(Path(file)))
    require(
        1 <= num_samples <= len(records),
        f"importance.num_samples={num_samples} must be between 1 and the {len(records)} records of {_KEY}={file}. "
        f"Set importance.num_samples to at most {len(records)}.",
    )
    drawn = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
    samples = [_sample(records[index], encode, end_of_text, seq_length, count_prompts) for index in drawn]
    filler = {key: torch.zeros_like(tensor) for key, tensor in samples[0].items()}
    together = micro_batch_size * dp_size
    samples += [filler] * (-num_samples % together)
    first = dp_rank * micro_batch_size
    return [
        {key: torch.stack([sample[key] for sample in rows]) for key in rows[0]}
        for start in range(first, len(samples), together)
        for rows in [samples[start : start + micro_batch_size]]
    ]


def _records(file: Path) -> Iterator[tuple[str, str, str]]:
    """(where it stands, prompt, response) of every record; a plain text has an empty prompt."""
    require(file.is_file(), f"{_KEY}={file} does not exist. Give a JSONL file of samples.", NothingThere)
    for where, record in read_jsonl(file, f"{_KEY}={file}", holds="text, or prompt and response"):
        keys = ("text",) if "text" in record else ("prompt", "response")
        for key in keys:
            require(
                isinstance(record.get(key), str),
                f'{where} has no string {key!r}. Write {{"text": ...}} or {{"prompt": ..., "response": ...}}.',
            )
        yield where, "" if keys == ("text",) else record["prompt"], record[keys[-1]]


def _sample(
    record: tuple[str, str, str],
    encode: Callable[[str], list[int]],
    end_of_text: int,
    seq_length: int,
    count_prompts: bool,
) -> dict[str, Tensor]:
    where, prompt, text = record
    before = encode(prompt) if prompt else []
    ids = (before + encode(text))[:seq_length]
    mask = torch.zeros(seq_length)
    mask[0 if count_prompts else max(0, len(before) - 1) : len(ids)] = 1.0
    require(
        len(ids) > 0 and bool(mask.any()),
        f"{where} leaves no token that counts within trainer.seq_length={seq_length}. Lengthen "
        "trainer.seq_length, shorten the prompt, or take the record out.",
    )
    padded = torch.full((seq_length + 1,), end_of_text)
    padded[: len(ids)] = torch.tensor(ids)
    return {
        "tokens": padded[:-1].clone(),
        "labels": padded[1:].clone(),
        "position_ids": torch.arange(seq_length),
        "loss_mask": mask,
    }
