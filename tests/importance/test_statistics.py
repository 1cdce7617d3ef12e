"""Statistics alone, where a model would hide the case."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.activations.tokens import mark_tokens_over
from minitron_nemo.aggregation import aggregate_sequence
from minitron_nemo.importance.statistics import add_over, partial_sums
from minitron_nemo.parallel import Groups
from support.ranks import Ranks


def aggregates(activation: Tensor, mask: Tensor) -> Tensor:
    """mean, L2 and variance [3, b, c] of [s/cp, b, c] with a mask [b, s/cp]."""
    cp = Groups.from_megatron().cp
    tokens = mark_tokens_over(mask, groups=[cp])
    return aggregate_sequence(add_over(partial_sums(activation, tokens), groups=[cp]), tokens.num_tokens)


def aggregates_of_shard(activation: Tensor, mask: Tensor) -> Tensor:
    """As `aggregates`, each context-parallel rank with its own part of the tokens."""
    cp = Groups.from_megatron().cp
    assert cp is not None
    return aggregates(activation.chunk(cp.size())[cp.rank()], mask.chunk(cp.size(), dim=1)[cp.rank()])


def aggregates_by_hand(activation: Tensor, mask: Tensor) -> Tensor:
    samples = [activation[row != 0, sample].double() for sample, row in enumerate(mask)]  # [tokens, c] each
    return torch.stack(
        [
            torch.stack([a.abs().mean(0) for a in samples]),
            torch.stack([a.square().sum(0).sqrt() for a in samples]),
            torch.stack([a.var(0, correction=0) for a in samples]),
        ]
    )


def example(tokens: int = 10, batch: int = 3, channels: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    activation = torch.randn(tokens, batch, channels, generator=generator)
    mask = torch.ones(batch, tokens)
    mask[0, 4:] = 0  # the second of two shards holds none of this sample's tokens
    mask[1, 7:] = 0
    return activation, mask


def test_aggregates_equal_float64() -> None:
    activation, mask = example()
    assert_close(aggregates(activation, mask), aggregates_by_hand(activation, mask), rtol=1e-6, atol=1e-7)


def test_a_sample_split_over_context_parallel_ranks_has_the_aggregates_of_the_whole(ranks: Ranks) -> None:
    activation, mask = example()
    expected = aggregates_by_hand(activation, mask)
    for rank, actual in enumerate(ranks("cp2").run(aggregates_of_shard, activation, mask)):
        assert_close(actual, expected, rtol=1e-6, atol=1e-7, msg=lambda text, rank=rank: f"rank {rank}\n{text}")


def test_variance_survives_a_large_constant_part() -> None:
    """Norm outputs have channels like this; float32 sums of squares would lose the variance altogether."""
    activation, mask = example(tokens=64)
    mask[:] = 1
    mask[1, 40:] = 0
    activation = activation * 0.01 + 300
    expected = aggregates_by_hand(activation, mask)
    assert_close(aggregates(activation, mask)[2], expected[2], rtol=1e-4, atol=0)


def test_bf16_activations_are_summed_in_float32() -> None:
    activation, mask = example(tokens=500)
    activation = activation.bfloat16()
    assert_close(aggregates(activation, mask), aggregates_by_hand(activation, mask), rtol=1e-5, atol=1e-6)


def test_what_does_not_count_brings_in_nothing_not_even_a_nan() -> None:
    activation, mask = example()
    expected = aggregates(activation, mask)
    activation[5, 0] = float("nan")
    activation[8, 1] = float("inf")
    assert torch.equal(aggregates(activation, mask), expected)
    mask[2] = 0  # nor does a sample without tokens
    activation[:, 2] = float("nan")
    assert torch.equal(aggregates(activation, mask)[:, 2], torch.zeros(3, 5, dtype=torch.float64))
