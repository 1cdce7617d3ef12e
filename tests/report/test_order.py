"""The expected order of held-out losses is stated as it is."""

from __future__ import annotations

import pytest

from minitron_nemo.report.order import order_of


@pytest.mark.parametrize(
    ("losses", "holds", "said"),
    [
        ((3.05, 3.18, 3.9, 6.2), True, "holds: distilled 3.050 < pruned + CE 3.180 < from scratch 3.900 < pruned only"),
        (
            (3.25, 3.18, 3.9, 6.2),
            False,
            "distilled (3.250) was expected below pruned + CE (3.180) and is 0.070 above it",
        ),
        ((3.05, 4.0, 3.9, 6.2), False, "pruned + CE (4.000) was expected below from scratch (3.900)"),
        ((3.05, 3.05, 3.9, 6.2), False, "distilled (3.050) was expected below pruned + CE (3.050) and is equal to it"),
        ((3.05, 3.055, 3.9, 6.2), True, "distilled and pruned + CE are within 0.01: too close to call from one run"),
    ],
)
def test_the_order_is_stated_as_it_is(losses: tuple[float, ...], holds: bool, said: str) -> None:
    labels = ("distilled", "pruned + CE", "from scratch", "pruned only")
    order = order_of(dict(zip(labels, losses, strict=True)))

    assert order["holds"] is holds and order["complete"]
    assert said in order["statement"]


def test_an_order_of_which_one_loss_is_known_cannot_be_checked() -> None:
    order = order_of({"distilled": 3.0, "pruned only": None})

    assert order["holds"] is None and not order["complete"]
    assert order["statement"] == (
        "The expected order (distilled < pruned only) cannot be checked. Not compared, as no held-out loss is known: "
        "pruned only."
    )


def test_where_no_order_is_expected_nothing_is_said() -> None:
    assert order_of({}) == {"holds": None, "complete": False, "statement": ""}
