"""Evaluation and calibration read the same samples on every layout."""

from __future__ import annotations

import pytest
import torch

from minitron_nemo.text.blend import split_prefixes
from minitron_nemo.text.windows import batches
from support.prepared import answers, documents

SEQ_LENGTH = 32


def test_evaluation_walks_over_the_split_once_on_any_number_of_ranks(prepared):
    prefix = split_prefixes(prepared, "validation")[0]
    stream = torch.tensor([token for ids in documents(prepared, "validation") for token in ids])
    windows = (len(stream) - 1) // SEQ_LENGTH
    for dp_size, micro_batch_size in [(1, 1), (1, 4), (2, 3), (3, 2)]:
        seen: dict[int, torch.Tensor] = {}
        per_rank = [
            list(batches(prefix, SEQ_LENGTH, micro_batch_size, dp_rank=rank, dp_size=dp_size))
            for rank in range(dp_size)
        ]
        assert len({len(each) for each in per_rank}) == 1
        counted = 0
        for rank, own in enumerate(per_rank):
            for step, batch in enumerate(own):
                assert batch["tokens"].shape == (micro_batch_size, SEQ_LENGTH)
                for row in range(micro_batch_size):
                    if bool(batch["loss_mask"][row].all()):
                        window = (step * dp_size + rank) * micro_batch_size + row
                        seen[window] = torch.cat([batch["tokens"][row], batch["labels"][row, -1:]])
                    counted += int(batch["loss_mask"][row].sum())
        assert sorted(seen) == list(range(windows))
        for window, tokens in seen.items():
            assert torch.equal(tokens, stream[window * SEQ_LENGTH : (window + 1) * SEQ_LENGTH + 1])
        assert counted == windows * SEQ_LENGTH


def test_calibration_samples_are_drawn_by_their_seed_and_differ_from_one_another(prepared):
    prefixes = split_prefixes(prepared, "train")

    def draw(seed: int, micro_batch_size: int = 4, dp_size: int = 1) -> list[list[int]]:
        ranks = [
            [row for batch in batches(prefixes, SEQ_LENGTH, micro_batch_size, 24, seed=seed, dp_rank=r, dp_size=dp_size)
             for row in batch["tokens"].tolist()]
            for r in range(dp_size)
        ]  # fmt: skip
        return sorted(row for rank in ranks for row in rank)

    assert draw(1) == draw(1) == draw(1, micro_batch_size=2) == draw(1, micro_batch_size=2, dp_size=3)
    assert draw(1) != draw(2)
    assert len({tuple(row) for row in draw(1)}) == 24


def test_batches_have_the_types_a_model_takes(prepared):
    batch = next(iter(batches(split_prefixes(prepared, "train"), SEQ_LENGTH, 3)))
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64,
    }  # fmt: skip
    assert batch["position_ids"][2].tolist() == list(range(SEQ_LENGTH))


def test_asking_for_more_samples_than_there_are_names_the_number(prepared):
    prefixes = split_prefixes(prepared, "validation")
    with pytest.raises(ValueError, match=r"num_samples=999999 must be between 1 and \d+, the windows of seq_length=32"):
        batches(prefixes, SEQ_LENGTH, 1, 999_999)
    with pytest.raises(
        ValueError, match="num_samples=10 cannot be split over micro_batch_size=4 x 2 data-parallel ranks"
    ):
        batches(prefixes, SEQ_LENGTH, 4, 10, seed=0, dp_size=2)
    with pytest.raises(FileNotFoundError, match=r"nowhere.bin and .*nowhere.idx are not both there"):
        batches("nowhere", SEQ_LENGTH, 1)


def test_windows_score_answers_and_no_prompt(instructions):
    for batch in batches(split_prefixes(instructions, "validation"), SEQ_LENGTH, 1):
        assert "A:" not in answers(instructions, batch)
