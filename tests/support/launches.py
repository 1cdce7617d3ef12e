"""Kernel launches and host syncs of what runs inside, counted by what torch dispatches; nothing has to be computed.

On the meta device the real shapes take no memory, and code that tells a CPU from an accelerator sees the latter.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = {
    "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided", "promote_types",
    "resize_", "set_", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
SYNCS = {"_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero"}
"""What the host waits for; a copy to it counts too, and indexing by a mask is a nonzero."""


class Launches(TorchDispatchMode):
    """Counts by name, while the context is open. Views and empty tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.kernels.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        device = kwargs.get("device")
        if name in SYNCS:
            self.syncs[name] += 1
        elif name == "_to_copy" and device is not None and torch.device(device).type == "cpu":
            self.syncs["cpu"] += 1
        elif not function.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        return function(*args, **kwargs)
