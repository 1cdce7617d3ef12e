"""A teacher whose layers wait on the host answers as one that is on the device, and never has more than two of them."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_nemo import platform
from minitron_nemo.distillation import offload
from minitron_nemo.distillation.offload import keep_on_host
from minitron_nemo.shape import ModelShape
from support.megatron import TINY, TINY_EXPERTS, build_gpt, run_gpt, smaller, start_alone


@pytest.mark.parametrize("shape", [TINY, TINY_EXPERTS], ids=["four layers alike", "three with experts and without"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_kept_on_the_host_answer_to_the_bit_out_of_two_buffers(shape: ModelShape, dtype: torch.dtype) -> None:
    start_alone()
    device = platform.device()
    tokens = torch.arange(14).reshape(2, 7).to(device)
    expected = build_gpt(shape, dtype=dtype).to(device)
    model = build_gpt(shape, dtype=dtype).to(device).requires_grad_(False)
    layers = model.decoder.layers
    matrices = [[p for p in layer.parameters() if p.dim() == 2] for layer in layers]
    whole = [[p.shape for p in of_layer] for of_layer in matrices]
    vectors = {name: p.clone() for name, p in layers.named_parameters() if p.dim() == 1}
    keep_on_host(layers, device=device)
    seen: list[list[list[torch.Size]]] = []
    places: dict[int, int] = {}

    def look(*_: Any) -> None:
        seen.append([[p.shape for p in of_layer if p.numel()] for of_layer in matrices])
        places.update(
            (p.untyped_storage().data_ptr(), p.untyped_storage().nbytes()) for each in matrices for p in each if len(p)
        )

    for layer in layers:
        layer.mlp.register_forward_hook(look)
    with torch.no_grad():
        for batch in (tokens, tokens + 9, tokens + 3):  # the second finds the first layer on its way already
            assert torch.equal(_logits(model, batch), _logits(expected, batch))
    at_work = [[whole[i] if i == number else [] for i in range(len(layers))] for number in range(len(layers))]
    assert seen == 3 * at_work  # one layer at a time holds its matrices
    assert not any(p.numel() for of_layer in matrices for p in of_layer)
    largest = max(sum(size.numel() for size in of_layer) for of_layer in whole) * dtype.itemsize
    assert len(places) == 2 and all(largest <= nbytes < largest + 256 * len(whole[0]) * 8 for nbytes in places.values())
    for name, vector in vectors.items():  # who reads a norm's weights finds them at any time
        assert torch.equal(layers.get_parameter(name), vector)


class _Stream:
    """One that knows which operations of which streams are over before its next one begins."""

    def __init__(self, *_: Any) -> None:
        self.over: Counter[_Stream] = Counter()

    def work(self) -> int:
        self.over[self] += 1
        return self.over[self]

    def wait_event(self, event: _Event) -> None:
        self.over |= event.over


class _Event:
    def __init__(self) -> None:
        self.over: Counter[_Stream] = Counter()

    def record(self, stream: _Stream) -> None:
        self.over = Counter(stream.over)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_a_layer_waits_for_its_copy_and_a_copy_for_the_layer_whose_place_it_takes(
    monkeypatch: pytest.MonkeyPatch, num_layers: int
) -> None:
    """By which operations the streams' events put before which, however the device would order the rest."""
    start_alone()
    model = build_gpt(smaller(TINY, num_layers=num_layers)).requires_grad_(False)
    computing, copying = _Stream(), _Stream()

    @contextmanager
    def on_stream(stream: _Stream) -> Any:
        assert stream is copying
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: copying)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: computing)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    copied_at: dict[int, int] = {}  # buffer -> the copy that filled it
    read_at: dict[int, int] = {}  # buffer -> the last operation that read it
    copy_to, layers = offload._MatricesOnHost.copy_to, model.decoder.layers

    def copy(self: Any, buffer: Tensor) -> None:
        place = buffer.data_ptr()
        assert copying.over[computing] >= read_at.get(place, 0), "a copy over a layer that may still be at work"
        copied_at[place] = copying.work()
        copy_to(self, buffer)

    def compute(layer: Any, *_: Any) -> None:
        place = layer.mlp.linear_fc1.weight.untyped_storage().data_ptr()
        assert computing.over[copying] >= copied_at[place], "a layer at work before its copy is there"
        read_at[place] = computing.work()

    monkeypatch.setattr(offload._MatricesOnHost, "copy_to", copy)
    keep_on_host(layers, device=platform.device())
    for layer in layers:
        layer.register_forward_pre_hook(compute)
        layer.mlp.register_forward_hook(lambda *_, layer=layer: compute(layer))
    tokens = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        for _ in range(3):
            _logits(model, tokens)
    assert copying.over[copying] == (num_layers if num_layers <= 2 else 3 * num_layers + 1)


def _logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    logits = run_gpt(model, tokens)
    assert logits is not None
    return logits
