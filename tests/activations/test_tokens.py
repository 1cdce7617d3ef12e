"""Which tokens count, on one rank and on several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitron_nemo.activations.tokens import AnnouncedBatch, TokenMask, mark_tokens_over
from minitron_nemo.parallel import Groups
from support.ranks import Ranks

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])  # a hole, no sample, a whole one


def mask_of_shard(mask: Tensor) -> TokenMask:
    cp = Groups.from_megatron().cp
    assert cp is not None
    return mark_tokens_over(mask.chunk(2, dim=1)[cp.rank()], groups=[cp])


def test_rows_are_the_tokens_that_count_sample_by_sample() -> None:
    activation = torch.arange(4 * 3).view(4, 3, 1)  # token x sample
    assert mark_tokens_over(MASK, groups=[]).rows_of(activation).flatten().tolist() == [0, 3, 9, 2, 5, 8, 11]
    everything = mark_tokens_over(torch.ones(3, 4), groups=[])
    assert torch.equal(everything.rows_of(activation), activation.flatten(0, 1))


def test_a_sample_counts_its_tokens_on_every_rank_that_holds_a_part_of_it(ranks: Ranks) -> None:
    for mask in ranks("cp2").run(mask_of_shard, MASK):
        assert mask.num_tokens.tolist() == [3, 0, 4]
        assert mask.is_sample.tolist() == [1, 0, 1]


def test_parts_of_the_sequence_have_the_whole_samples_number_of_tokens() -> None:
    second = mark_tokens_over(MASK, groups=[]).shard(1, 2)
    assert second.counts.int().tolist() == [[0, 1], [0, 0], [1, 1]]
    assert second.num_tokens.tolist() == [3, 0, 4]


def test_what_was_not_announced_is_said_in_the_callers_words() -> None:
    current = AnnouncedBatch(call="Call announce(mask)", give="Give announce")
    with pytest.raises(RuntimeError, match=r"fc2 saw forward pass 1, but 0 micro-.* Call announce\(mask\) once before"):
        current.require_is_next("fc2", 0)
    current.announce(mark_tokens_over(MASK, groups=[]))
    current.require_is_next("fc2", 0)
    message = r"fc2 has activations of shape \[5, 3, 2\] .* 3 samples of 4 tokens on this rank. Give announce the mask"
    with pytest.raises(ValueError, match=message):
        current.require_holds("fc2", torch.zeros(5, 3, 2), current.mask())
