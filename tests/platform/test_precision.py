"""float32 that is float32, and what was switched on before is on again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minitron_nemo.platform import true_float32


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            switch.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_that_was_chosen_is_back_afterwards_also_after_an_error(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)

    def fail() -> None:
        with true_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 is (precision != "highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9 brought these")
def test_so_are_the_newer_switches_beside_which_torch_refuses_to_read_the_older_ones() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with true_float32():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
