"""Megatron-core and NeMo on a machine without an accelerator: what is changed, and that all of it is taken back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import pytest
import torch
from torch import nn

from minitron_nemo import platform

without_accelerator = pytest.mark.skipif(platform.has_accelerator(), reason="CUDA requests are real ones here")


@pytest.fixture(autouse=True)
def inactive() -> Iterator[None]:
    platform.deactivate()
    yield
    platform.deactivate()


def everything_it_may_touch() -> dict[str, Any]:
    found = {f"torch.cuda.{name}": value for name, value in vars(torch.cuda).items() if callable(value)}
    found |= {f"random.{name}": value for name, value in vars(megatron_random).items() if callable(value)}
    found |= {f"Module.{name}": value for name, value in vars(nn.Module).items() if callable(value)}
    found |= {f"Tensor.{name}": value for name, value in vars(torch.Tensor).items() if callable(value)}
    found |= {f"autograd.{name}": value for name, value in vars(torch.autograd).items() if callable(value)}
    return found | {"modes": torch.overrides._get_current_function_mode_stack()}


@without_accelerator
def test_deactivation_takes_back_everything() -> None:
    before = everything_it_may_touch()
    platform.activate()
    during = everything_it_may_touch()
    assert {name for name in before if before[name] != during[name]} >= {
        "torch.cuda.current_device",
        "torch.cuda.Stream",
        "Module.cuda",
        "modes",
    }
    platform.deactivate()
    assert everything_it_may_touch() == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


@without_accelerator
def test_activating_twice_is_activating_once() -> None:
    before = everything_it_may_touch()
    platform.activate()
    platform.activate()
    platform.deactivate()
    assert everything_it_may_touch() == before
    platform.deactivate()
    assert everything_it_may_touch() == before


REQUESTS = {
    "a name": lambda: torch.zeros(3, device="cuda"),
    "a name with a number": lambda: torch.ones(3, device="cuda:0"),
    "a device": lambda: torch.empty(3, device=torch.device("cuda")),
    "the current device": lambda: torch.randn(3, device=torch.cuda.current_device()),
    "Tensor.to": lambda: torch.zeros(3).to("cuda"),
    "Tensor.to by keyword": lambda: torch.zeros(3).to(device="cuda", dtype=torch.bfloat16),
    "Tensor.cuda": lambda: torch.zeros(3).cuda(),
    "pinned memory": lambda: torch.zeros(3, pin_memory=True).pin_memory(),
    "Module.cuda": lambda: nn.Linear(2, 3).cuda().weight,
    "Module.to": lambda: nn.Linear(2, 3).to("cuda").weight,
    "another's like": lambda: torch.zeros_like(torch.zeros(3), device="cuda"),
    "new_empty": lambda: torch.zeros(3).new_empty(3, device="cuda"),
}


@without_accelerator
@pytest.mark.parametrize("request_by", REQUESTS)
def test_a_request_for_cuda_lands_on_the_cpu(request_by: str) -> None:
    platform.activate()
    assert REQUESTS[request_by]().device == torch.device("cpu")


@without_accelerator
def test_dtypes_and_values_pass_through() -> None:
    platform.activate()
    there = torch.arange(3).to("cuda", torch.float64)
    assert there.dtype == torch.float64 and there.tolist() == [0, 1, 2]
    assert torch.arange(3).to(torch.float16).dtype == torch.float16


@without_accelerator
def test_a_tensor_is_called_a_cuda_tensor_as_gradient_clipping_asks_it_to_be() -> None:
    platform.activate()
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    platform.deactivate()
    assert torch.zeros(1).type() == "torch.FloatTensor"


@without_accelerator
def test_seeding_cuda_leaves_the_generator_of_the_cpu_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    platform.activate()
    torch.manual_seed(3)
    torch.cuda.manual_seed(99)
    torch.cuda.set_rng_state(torch.cuda.get_rng_state())
    assert torch.equal(torch.rand(4), expected)


@without_accelerator
def test_the_state_of_the_cuda_generator_is_kept_and_restored() -> None:
    platform.activate()
    torch.cuda.manual_seed(1)
    first = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(2)
    assert not torch.equal(torch.cuda.get_rng_state(), first)
    megatron_random._set_cuda_rng_state(first)
    assert torch.equal(megatron_random._get_cuda_rng_state(), first)


@without_accelerator
def test_streams_and_events_have_already_happened() -> None:
    platform.activate()
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        event.record()
        torch.cuda.current_stream().wait_event(event)
    torch.cuda.synchronize()
    assert event.query()


@without_accelerator
def test_other_threads_are_left_alone() -> None:
    platform.activate()
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(torch.zeros(1).type()))
    thread.start()
    thread.join()
    assert seen == ["torch.FloatTensor"]


def test_where_torch_counts_an_accelerator_activation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is all that is pretended; what activation would do to torch is looked at, not run."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = everything_it_may_touch()
    platform.activate()
    assert everything_it_may_touch() == before
    assert platform.backend() == "nccl" and platform.supports_distributed_optimizer()
    assert platform.default_precision() == "bf16"


class AsksForCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.ones(3, device="cuda")


@without_accelerator
@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
def test_a_backward_pass_within_a_backward_pass_may_ask_for_cuda(backward: Any) -> None:
    """As Megatron-core does when it recomputes a layer under sequence parallelism."""
    platform.activate()
    weight = torch.ones(3, requires_grad=True)

    def twice(value: torch.Tensor) -> torch.Tensor:
        return AsksForCuda.apply(2 * value)

    backward(megatron_random.CheckpointFunction.apply(twice, False, weight).sum())
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
