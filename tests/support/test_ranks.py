"""The ranks fixture itself: what the other tests rely on."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from support.ranks import Layout, RankFailure, Ranks, current_layout


def describe(tensor: torch.Tensor) -> dict[str, object]:
    from megatron.core import parallel_state

    total = tensor.clone()
    dist.all_reduce(total)
    return {
        "rank": dist.get_rank(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "sequence_parallel": current_layout().sequence_parallel,
        "total": total.requires_grad_(),
    }


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"hidden_size=25 is odd on {rank}")
    dist.barrier()


def fail_late_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1)  # the other is done
        raise ValueError(f"hidden_size=25 is odd on {rank}, late")


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def leave_or_stay() -> None:
    """Rank 1 returns at once; rank 0 finds it connected a while later."""
    if dist.get_rank() == 0:
        time.sleep(1)
        for _ in range(2):  # what is written first to a closed connection is still taken
            dist.isend(torch.ones(1), 1)
            time.sleep(0.2)


def draw() -> float:
    return torch.rand(()).item()


@pytest.mark.parametrize("name", ["single", "tp2", "pp2", "dp2", "cp2", "tp2-sp"])
def test_a_function_finds_the_layout_it_was_asked_for(ranks: Ranks, name: str) -> None:
    layout = Layout.parse(name)
    results = ranks(name).run(describe, torch.ones(3, dtype=torch.bfloat16))
    assert [result["rank"] for result in results] == list(range(layout.world_size))
    for result in results:
        assert {key: result[key] for key in ("tp", "pp", "cp", "dp", "sequence_parallel")} == {
            key: getattr(layout, key) for key in ("tp", "pp", "cp", "dp", "sequence_parallel")
        }
        assert result["total"].tolist() == [layout.world_size] * 3


def test_an_exception_comes_back_with_its_type_and_the_rank_named() -> None:
    ranks = Ranks()
    try:
        with pytest.raises(ValueError, match="hidden_size=25 is odd on 1") as caught:
            ranks("tp2").run(fail_on, 1)
        assert "rank 1 of tp2 failed in fail_on" in str(caught.value.__cause__)
        with pytest.raises(ValueError, match="on 0, late"):
            ranks("tp2").run(fail_late_on, 0)
        assert len(ranks("tp2").run(draw)) == 2  # the next call finds ranks that work
    finally:
        ranks.close()


def test_a_rank_that_hangs_is_named_and_shown_where_it_hangs() -> None:
    ranks = Ranks()
    try:
        ranks("tp2").run(draw)
        with pytest.raises(RankFailure, match=r"rank \[1\] of tp2 did nothing for 5 s in hang_on(.|\n)*in hang_on"):
            ranks("tp2", quiet_seconds=5).run(hang_on, 1)
    finally:
        ranks.close()


def test_each_run_starts_from_the_same_seed(ranks: Ranks) -> None:
    assert ranks("dp2").run(draw) == ranks("dp2").run(draw)


def test_a_rank_that_is_done_stays_until_all_are(ranks: Ranks) -> None:
    """It may be done while another still connects to it."""
    ranks("dp2").run(leave_or_stay)


def test_an_unknown_layout_says_how_one_is_written() -> None:
    with pytest.raises(ValueError, match="layout 'tp2-xp2': 'xp2' is none of"):
        Layout.parse("tp2-xp2")
