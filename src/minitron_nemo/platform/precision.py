"""float32 that is float32: matrix products without TF32, whatever the process runs in otherwise.

TF32 keeps 10 bits of a factor's mantissa, so that two correct implementations of a model differ by about 1e-3 of a
logit. NVIDIA's containers switch it on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), and so do people. Transformer-engine's own
products do not look at torch's switches; only models of plain torch modules are reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def true_float32() -> Iterator[None]:
    """Products of float32 matrices in full precision, on accelerators and on the CPU; the settings found are put back.

    torch has two sets of switches and raises where the older one is read after the newer one was used; both are met.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        with _newer_switches():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _newer_switches() -> Iterator[None]:
    """Those of torch 2.9, one for each library."""
    backends: Any = torch.backends
    switches = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
