"""Products of activations summed over tokens, at the speed that their dtype allows.

    left, right    rows of tokens         [t, a], [t, b]    any float dtype
    product        left^T right           [a, b]            float32

An accelerator multiplies float32 several times faster after rounding it to TF32, whose 10 bits of mantissa hold bf16
and fp16 exactly: of such values the products are the same, of others they are rounded where the caller allows it.

Communication: none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_over_tokens(left: Tensor, right: Tensor, *, may_round: bool = False) -> Tensor:
    """
    Args:
        may_round: on an accelerator, float32 values to TF32, which is finer than the bf16 they came from.
    """
    exact = all(each.dtype in (torch.bfloat16, torch.float16) for each in (left, right))
    if left.device.type == "cpu" or not (may_round or exact):
        return left.float().t() @ right.float()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return left.float().t() @ right.float()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
