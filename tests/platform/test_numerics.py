"""A manifest says in which numbers its products were formed."""

from __future__ import annotations

import torch

from minitron_nemo.platform.numerics import numerics


def test_a_process_that_was_told_to_round_its_products_says_so() -> None:
    before = torch.get_float32_matmul_precision()
    assert numerics()["float32_products"] == "float32"
    try:
        torch.set_float32_matmul_precision("high")
        assert numerics()["float32_products"] == "tf32 or bf16x3"
    finally:
        torch.set_float32_matmul_precision(before)
