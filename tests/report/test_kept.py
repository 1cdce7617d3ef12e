"""What a plan keeps, beside the scores shown."""

from __future__ import annotations

import numpy as np

from minitron_nemo.report.scores import kept_mask, share_kept_from_top


def test_a_plan_by_other_scores_is_told_from_one_by_those_shown() -> None:
    scores = np.array([[5.0, 1.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert share_kept_from_top(scores, np.array([[0, 2], [2, 3]])) == 1.0
    assert share_kept_from_top(scores, np.array([[0, 1], [2, 3]])) == 0.75
    assert kept_mask(np.array([[0, 2], [2, 3]]), 4).tolist() == [[True, False, True, False], [False, False, True, True]]
