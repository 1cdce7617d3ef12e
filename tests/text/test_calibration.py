"""Calibration samples from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_nemo.text.calibration import calibration_batches
from minitron_nemo.text.corpus import Document
from minitron_nemo.text.documents import mark


class Letters:
    """An encoder whose tokens are letters."""

    end_of_text = 0

    def __call__(self, documents: list[Document]) -> list[np.ndarray]:
        def ids(text: str) -> np.ndarray:
            return np.asarray([ord(letter) for letter in text], np.int64)

        return [np.concatenate([mark(ids(each.prompt or "")), ids(each.text)]) for each in documents]


def write(path: Path, *records: Any) -> Path:
    file = path / "calibration.jsonl"
    file.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return file


def read(file: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    values: dict[str, Any] = {"seq_length": 6, "micro_batch_size": 2, "num_samples": 3, "seed": 1}
    return calibration_batches(file, Letters(), **values | options)


def texts(number: int) -> list[dict[str, str]]:
    return [{"text": chr(65 + index) * (index + 1)} for index in range(number)]


def test_padding_does_not_count_and_long_texts_are_cut(tmp_path: Path) -> None:
    (batch,) = read(write(tmp_path, {"text": "ab"}, {"text": "abcdefgh"}), num_samples=2)
    rows = {tuple(tokens): mask for tokens, mask in zip(batch["tokens"].tolist(), batch["loss_mask"], strict=True)}
    assert rows[97, 98, 0, 0, 0, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert rows[97, 98, 99, 100, 101, 102].tolist() == [1] * 6
    assert batch["labels"][:, :-1].equal(batch["tokens"][:, 1:])


def test_prompts_count_only_where_asked(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "abc", "response": "de"})
    assert read(file, num_samples=1)[0]["loss_mask"][0].tolist() == [1, 1, 1, 1, 1, 0]
    # the prompt's last token predicts the response's first
    assert read(file, num_samples=1, count_prompts=False)[0]["loss_mask"][0].tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_every_layout_draws_the_same_samples(tmp_path: Path, dp_size: int, micro_batch_size: int) -> None:
    file = write(tmp_path, *texts(9))
    drawn = set()
    lengths = set()
    for rank in range(dp_size):
        share = read(file, num_samples=5, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)
        lengths.add(len(share))
        for batch in share:
            counted = batch["loss_mask"].sum(1) > 0
            drawn |= {tuple(row) for row in batch["tokens"][counted].tolist()}
    whole = read(file, num_samples=5, micro_batch_size=5)[0]["tokens"].tolist()
    assert drawn == {tuple(row) for row in whole} and len(drawn) == 5
    assert len(lengths) == 1  # ranks run equally many passes


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        ([{"text": "ab"}], {"num_samples": 2}, "num_samples=2 must be between 1 and the 1 records"),
        ([{"text": "ab"}, "{broken"], {}, "line 2 is not JSON"),
        ([{"texts": "ab"}], {}, "line 1 has no string 'prompt'"),
        ([["ab"]], {}, "line 1 is not a JSON object"),
        ([{"text": ""}], {"num_samples": 1}, "line 1 leaves no token that counts within trainer.seq_length=6"),
        (
            [{"prompt": "abcdefgh", "response": "x"}],
            {"num_samples": 1, "count_prompts": False},
            "line 1 leaves no token that counts",
        ),
    ],
)
def test_what_cannot_be_used_is_said_with_its_line(
    tmp_path: Path, records: list[Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        read(write(tmp_path, *records), **options)
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"importance\.calibration=.*nowhere\.jsonl does not exist"):
        read(tmp_path / "nowhere.jsonl")
