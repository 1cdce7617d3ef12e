"""The ridge-regularised second moment C + lambda, as the least squares of compensation meet it: in which precision, and
factored.

    C        sum of a a^T over the tokens that count, a a linear's input     [f, f] float64
    lambda   ridge * mean of C's diagonal

Local; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from minitron_nemo.platform.precision import true_float32

FLOAT32_FROM = 1e-3
"""The least ridge that float32 is trusted with: rounding C to it moves C by 1e-5 of such a lambda, over a thousand
inputs of like size."""
STRIP = 1024
"""Columns of a symmetric product that are made at once; what is above them is not."""

T = TypeVar("T")


class NotDefinite(ValueError):
    """C + lambda has no Cholesky factor."""


def in_least_precision(solve: Callable[[torch.dtype], T], weight: Tensor, ridge: float) -> T:
    """solve(float32) for weights of up to 32 bits and a ridge from `FLOAT32_FROM` on; else, or where float32 finds C +
    lambda not positive definite, solve(float64). Products are of no fewer bits in either."""
    with true_float32():
        if weight.dtype != torch.float64 and ridge >= FLOAT32_FROM:
            try:
                return solve(torch.float32)
            except NotDefinite:
                pass
        return solve(torch.float64)


def shift_of(moment: Tensor, ridge: float) -> Tensor:
    """lambda, a scalar."""
    return ridge * moment.diagonal().mean()


def cholesky(matrix: Tensor, ridge: float, inputs: int) -> Tensor:
    """Lower factor of C + lambda of so many `inputs`, or of a part of it; the lower triangle is read.

    Raises: NotDefinite. Waits for the device.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise NotDefinite(
            f"the second moment of its {inputs} inputs is not positive definite with ridge={ridge:g}: the "
            "calibration tokens leave some directions unseen. Raise ridge (0.01, say) or num_samples."
        )
    return factor


def energy(weight: Tensor, moment: Tensor, dtype: torch.dtype) -> Tensor:
    """sum |W a|^2 over the tokens of `moment` = tr(W C W^T), a float64 scalar, from products in `dtype`."""
    weight, total = weight.to(dtype), moment.new_zeros(())
    for start in range(0, len(moment), STRIP):
        end = min(start + STRIP, len(moment))
        some, columns = weight[:, start:end], moment[start:, start:end].to(dtype)
        own, others = some @ columns[: end - start], weight[:, end:] @ columns[end - start :]
        total += ((own + 2 * others) * some).sum(dtype=torch.float64)
    return total
