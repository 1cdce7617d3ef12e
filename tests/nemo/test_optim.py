"""Learning-rate schedules, by value."""

from __future__ import annotations

import math

import pytest

from minitron_nemo.config.training import OptimConfig, lr_multiplier


def schedule(steps: int, **values: object) -> list[float]:
    config = OptimConfig(**({"lr": 1.0, "min_lr": 0.1} | values))  # type: ignore[arg-type]
    return [lr_multiplier(step, config=config, steps=steps) for step in range(steps)]


def test_warm_up_rises_by_equal_steps_to_the_peak() -> None:
    assert schedule(9, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_the_floor_along_half_a_cosine() -> None:
    """Peak 1, floor 0.1, two steps of warm-up, eight of decay: halfway down the mean of both, at the end the floor."""
    found = schedule(10, warmup_steps=2)
    for decayed in range(8):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * decayed / 8)) / 2
        assert found[2 + decayed] == pytest.approx(expected, abs=1e-15)
    assert found[6] == pytest.approx(0.55, abs=1e-15)
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2)
    assert lr_multiplier(10, config=config, steps=10) == pytest.approx(0.1, abs=1e-15)
    assert lr_multiplier(99, config=config, steps=10) == pytest.approx(0.1, abs=1e-15)  # never below the floor


def test_wsd_warms_up_stays_and_falls_in_a_straight_line() -> None:
    found = schedule(10, schedule="wsd", warmup_steps=2, decay_steps=3)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 0.7, 0.4], abs=1e-15)
    assert schedule(4, schedule="wsd", warmup_steps=0) == [1.0] * 4  # no decay asked for


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    assert schedule(5, schedule="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1]


def test_multipliers_are_fractions_of_the_peak() -> None:
    assert schedule(3, lr=2e-3, min_lr=5e-4, warmup_steps=0)[0] == 1.0
    config = OptimConfig(lr=2e-3, min_lr=5e-4, warmup_steps=0)
    assert lr_multiplier(3, config=config, steps=3) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"^training.optim.lr=0.0 must be above 0"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "training.optim.min_lr=0.001 must be at most training.optim.lr=0.0001"),
        ({"schedule": "cosin"}, "optim.schedule=cosin is not known; did you mean cosine"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 must be at least 0"),
        ({"schedule": "wsd", "decay_steps": -5}, "optim.decay_steps=-5 must be at least 0"),
    ],
)
def test_a_schedule_that_cannot_be_says_which_value_and_why(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]
