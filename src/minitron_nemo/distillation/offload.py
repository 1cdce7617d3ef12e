"""A frozen model whose layers live in host memory and visit the device one after the other.

    host     the matrices of every decoder layer, in pinned memory where there is an accelerator
    device   two buffers of the largest layer's size: the layer at work, and the next one, which is copied meanwhile

A buffer is filled again when the layer that had it is through, so no more than two layers are on the device however far
the host runs ahead. Vectors (the norms' weights, biases) stay on the device: they are small, and others read them.
So do the embedding and the output layer: the loss reads them after the forward pass is over.

Communication: none between ranks; each layer's matrices travel from host to device once a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 256
"""Bytes; where a matrix may begin in a buffer, for any dtype and kernel."""


def keep_on_host(layers: Sequence[nn.Module], *, device: torch.device) -> None:
    """Move the matrices of `layers` to host memory; from now on each has them only while its `forward` runs.

    Args:
        layers: in the order in which a forward pass calls them, each once; never trained, on the host already or on the
            device. They stay in the dtype they have: converting the model later does not reach the host. Vectors and
            buffers move to the device.
        device: where the layers run.
    """
    matrices = [_MatricesOnHost(layer, device) for layer in layers]
    if not matrices:
        return
    visits = _Visits(max(each.nbytes for each in matrices), device)
    for number, each in enumerate(matrices):
        visits.let(each, following=matrices[(number + 1) % len(matrices)])


class _MatricesOnHost:
    """One layer's matrices, on the host for good and at times in a buffer of the device."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.layer, self.nbytes = layer, 0
        self.places: list[tuple[nn.Parameter, Tensor, int]] = []
        """Each matrix, what it holds on the host, and where its bytes begin in a buffer."""
        for parameter in layer.parameters():
            if parameter.dim() < 2:
                continue
            values = parameter.detach()
            on_host = values.cpu()  # as it is, where it is there already
            if device.type == "cuda" and not on_host.is_pinned():
                # one at a time: what the matrix was made in is let go before the next one is copied
                on_host = on_host.pin_memory()
            parameter.data = torch.empty(0, dtype=values.dtype, device=device)
            self.places.append((parameter, on_host, self.nbytes))
            del values
            self.nbytes += -(-on_host.nbytes // _ALIGNMENT) * _ALIGNMENT
        layer.to(device)

    def copy_to(self, buffer: Tensor) -> None:
        for _, on_host, start in self.places:
            _view(buffer, start, on_host).copy_(on_host, non_blocking=True)

    def point_to(self, buffer: Tensor) -> None:
        for parameter, on_host, start in self.places:
            parameter.data = _view(buffer, start, on_host)

    def point_nowhere(self) -> None:
        for parameter, _, _ in self.places:
            parameter.data = parameter.data.new_empty(0)


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


class _Buffer:
    """Room for one layer on the device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.holds: _MatricesOnHost | None = None
        self.arrived, self.left = torch.cuda.Event(), torch.cuda.Event()
        """Of the copy stream, that the copies are done; of the computing one, that nothing queued there reads them."""
        self.left.record(torch.cuda.current_stream(device))


class _Visits:
    """The two buffers, whom they hold, and the stream that fills them."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device, self.nbytes = device, nbytes
        self.buffers: list[_Buffer] = []
        """The one that was filled last comes last; made for the first visit."""
        self.stream: Any = None

    def let(self, layer: _MatricesOnHost, *, following: _MatricesOnHost) -> None:
        """Hook the layer; `following` is called next."""

        def arrive(*_: Any) -> None:
            buffer = self._holding(layer)
            torch.cuda.current_stream(self.device).wait_event(buffer.arrived)
            layer.point_to(buffer.bytes)
            self._holding(following)

        def leave(*_: Any) -> None:
            layer.point_nowhere()
            self._holding(layer).left.record(torch.cuda.current_stream(self.device))

        layer.layer.register_forward_pre_hook(arrive)
        layer.layer.register_forward_hook(leave)

    def _holding(self, layer: _MatricesOnHost) -> _Buffer:
        """The buffer with this layer; where there is none, the one filled longest ago, to which it is on its way."""
        if not self.buffers:
            self.stream = torch.cuda.Stream(self.device)
            self.buffers = [_Buffer(self.nbytes, self.device) for _ in range(2)]
        for buffer in self.buffers:
            if buffer.holds is layer:
                return buffer
        buffer = self.buffers.pop(0)
        self.buffers.append(buffer)
        buffer.holds = layer
        self.stream.wait_event(buffer.left)
        with torch.cuda.stream(self.stream):
            layer.copy_to(buffer.bytes)
            buffer.arrived.record(self.stream)
        return buffer
