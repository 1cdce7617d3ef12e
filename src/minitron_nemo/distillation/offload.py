"""A frozen model whose layers live in host memory and visit the device one after the other.

    host     the weights of every decoder layer, in pinned memory where there is an accelerator
    device   those of the layer at work and of the next one, which is copied meanwhile

The embedding and the output layer stay on the device: the loss reads them after the forward pass is over.

Communication: none between ranks; each layer's weights travel from host to device once a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def keep_on_host(layers: Sequence[nn.Module], *, dtype: torch.dtype, device: torch.device) -> None:
    """Move the parameters of `layers` to host memory; from now on each has them only while its `forward` runs.

    Args:
        layers: in the order in which a forward pass calls them, each once; never trained. Buffers stay where they are.
        dtype: that of the forward pass; converting the model later does not reach the host.
        device: where the layers run.
    """
    visits = [_Visit(layer, dtype, device) for layer in layers]
    for index, visit in enumerate(visits):
        visit.let(visits[(index + 1) % len(visits)])


class _Visit:
    """One layer's weights, on the host and at times on the device."""

    _streams: ClassVar[dict[torch.device, Any]] = {}
    """One stream a device for all copies, which then keep their order."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.layer, self.device = layer, device
        self.on_host: dict[nn.Parameter, Tensor] = {}
        self.on_device: list[Tensor] | None = None
        self.arrived: Any = None
        pinned = device.type == "cuda"
        for parameter in layer.parameters():
            host = torch.empty(parameter.shape, dtype=dtype, device="cpu", pin_memory=pinned)
            self.on_host[parameter] = host.copy_(parameter.detach())
            parameter.data = torch.empty(0, dtype=dtype, device=device)

    def let(self, following: _Visit) -> None:
        """Hook the layer; `following` is called next."""

        def arrive(*_: Any) -> None:
            self.start()
            following.start()
            self.finish()

        def leave(*_: Any) -> None:
            for parameter in self.on_host:
                parameter.data = parameter.data.new_empty(0)

        self.layer.register_forward_pre_hook(arrive)
        self.layer.register_forward_hook(leave)

    def start(self) -> None:
        """Begin the copies, unless they have begun."""
        if self.on_device is not None:
            return
        if self.device.type != "cuda":
            self.on_device = list(self.on_host.values())
            return
        if self.device not in self._streams:
            self._streams[self.device] = torch.cuda.Stream(self.device)
        stream = self._streams[self.device]
        with torch.cuda.stream(stream):
            self.on_device = [host.to(self.device, non_blocking=True) for host in self.on_host.values()]
            self.arrived = torch.cuda.Event()
            self.arrived.record(stream)

    def finish(self) -> None:
        """Give the layer its weights; work queued from here on waits for them."""
        assert self.on_device is not None
        if self.arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.arrived)
            for tensor in self.on_device:
                tensor.record_stream(current)  # made on the other stream: not to be reused before this one is through
        for parameter, tensor in zip(self.on_host, self.on_device, strict=True):
            parameter.data = tensor
        self.on_device = self.arrived = None
