"""Who goes on after a rung, and what a candidate costs before any training."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minitron_nemo.checks import Mistake
from minitron_nemo.search.halving import rungs_of, steps_in_all, survivors
from minitron_nemo.search.pricing import name_of, on_front, points_of, prices
from minitron_nemo.search.space import Columns
from search.test_space import TINY

LOSSES = {"a": 3.0, "b": 2.0, "c": math.nan, "d": 2.0, "e": 2.5}


def test_the_best_share_goes_on_in_the_order_of_its_losses() -> None:
    assert survivors(LOSSES, keep=0.4, step=10, never_before=0) == ["b", "d"]
    assert survivors(LOSSES, keep=0.41, step=10, never_before=0) == ["b", "d", "e"]
    assert survivors(LOSSES, keep=0.01, step=10, never_before=10) == ["b"]
    assert survivors(LOSSES, keep=1.0, step=10, never_before=0) == ["b", "d", "e", "a", "c"]


def test_nobody_is_left_out_before_the_step_that_was_set() -> None:
    """arXiv:2407.14679, figure 9: ranks settle near step 300 of 400."""
    assert len(survivors(LOSSES, keep=0.1, step=299, never_before=300)) == 5
    assert steps_in_all(8, [100, 200, 400], keep=0.25, never_before=0) == 8 * 100 + 2 * 100 + 1 * 200
    assert steps_in_all(8, [100, 200, 400], keep=0.25, never_before=200) == 8 * 200 + 2 * 200


def test_the_usual_rungs_double() -> None:
    assert rungs_of(400, []) == [50, 100, 200, 400]
    assert rungs_of(3, []) == [1, 3]
    with pytest.raises(Mistake, match=r"search.halving.rungs=\[2, 2, 4\] must rise to training.steps=4"):
        rungs_of(4, [2, 2, 4])


def test_prices_add_up_single_cuts_and_lie_on_lines_between_them() -> None:
    table = {"hidden_size": {24: 3.0, 36: 2.5}, "ffn_hidden_size": {56: 2.8}}
    dims = {"hidden_size": np.array([24, 30, 48, 48]), "ffn_hidden_size": np.array([112, 84, 56, 112])}
    found = prices(Columns(TINY, np.arange(4), dims), TINY, table, 2.0)
    assert found == pytest.approx([3.0, 2.75 + 0.4, 2.8, 2.0])


def test_the_smallest_size_is_measured_and_others_between_it_and_the_source() -> None:
    assert points_of(TINY, "ffn_hidden_size", range(28, 113, 4), 3) == [28, 56, 84]
    assert points_of(TINY, "ffn_hidden_size", [112, 56, 56], 3) == [56]
    assert points_of(TINY, "num_attention_heads", [2, 4, 6], 3) == [2, 4]
    assert points_of(TINY, "hidden_size", [32, 36, 42, 48], 3) == [36, 42], "a llama's hidden size holds whole heads"


def test_who_is_beaten_by_nobody_is_on_the_front() -> None:
    assert on_front([4, 3, 3, 2, 2], [1.0, 1.5, 1.2, 1.2, 1.2]) == [True, False, False, True, True]


def test_a_candidate_is_called_as_its_dims_are() -> None:
    assert name_of({"num_layers": 4, "hidden_size": 160, "num_attention_heads": 4}) == "l4-h160-n4"
