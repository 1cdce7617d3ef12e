"""Megatron-core and NeMo on a machine without an accelerator.

Both write `torch.cuda.current_device()`, `.cuda()`, `device="cuda"`, pinned memory, streams and CUDA random states into
ordinary code paths. Four things make the same code run on CPU:

1. a `TorchFunctionMode` that turns a requested CUDA device into the CPU, in `device=`, `Tensor.to` and `Tensor.cuda`,
   and drops pinned memory;
2. stand-ins for the `torch.cuda` functions that would start a driver: current device, streams, events, random states;
3. `Tensor.type()` speaks of CUDA tensors, since Megatron's gradient clipping asserts on the name;
4. a backward pass keeps the mode, which torch takes off where `Tensor.backward` or `torch.autograd.backward` begins:
   under sequence parallelism Megatron asks for CUDA memory in it, and activations are recomputed in it.

The stand-in for the CUDA random generator is a generator of its own, so that seeding "CUDA" with a rank-dependent seed
leaves the CPU generator, from which weights are initialised, alike on all ranks, as it is on a real machine. Dropout
draws from the CPU generator; models here train without dropout.

The mode costs a few microseconds per torch call from Python and reaches the thread that activated it only, so the
data loaders' workers and autograd's own threads are not touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _names_cuda(device: Any) -> bool:
    """Whether a device argument means an accelerator; a bare index does, as `torch.cuda.current_device()` gives one."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda or func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if "pin_memory" in kwargs:
            kwargs.pop("pin_memory")
        result = func(*args, **kwargs)
        if func is Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


def _under(mode: TorchFunctionMode, function: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return run


def _returns(value: Any) -> Callable:
    """A function of its own for every stand-in: torch's compiler insists that no two of its names are one object."""
    return lambda *args, **kwargs: value


def _module_cuda(module: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    return module


def _random_stand_ins() -> dict[str, Callable]:
    generator = torch.Generator()

    def get_state(*args: Any, **kwargs: Any) -> Tensor:
        return generator.get_state()

    def set_state(new_state: Tensor, *args: Any, **kwargs: Any) -> None:
        generator.set_state(new_state)

    def seed(value: int) -> None:
        generator.manual_seed(value)

    return {"get": get_state, "set": set_state, "seed": seed}


_undo: contextlib.ExitStack | None = None


def activate() -> None:
    global _undo
    if _undo is not None:
        return
    import megatron.core.tensor_parallel.random as megatron_random

    random, mode = _random_stand_ins(), _CudaMeansCpu()
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", _returns(0)),
        (torch.cuda, "set_device", _returns(None)),
        (torch.cuda, "is_initialized", _returns(True)),  # NeMo asserts it after loading a checkpoint
        (torch.cuda, "synchronize", _returns(None)),
        (torch.cuda, "empty_cache", _returns(None)),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "stream", _on_stream),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "default_stream", _Stream),
        (torch.cuda, "max_memory_allocated", _returns(0)),
        (torch.cuda, "max_memory_reserved", _returns(0)),
        (torch.cuda, "memory_allocated", _returns(0)),
        (torch.cuda, "get_rng_state", random["get"]),
        (torch.cuda, "set_rng_state", random["set"]),
        (torch.cuda, "manual_seed", random["seed"]),
        (torch.cuda, "manual_seed_all", random["seed"]),
        (megatron_random, "_get_cuda_rng_state", random["get"]),
        (megatron_random, "_set_cuda_rng_state", random["set"]),
        (torch.nn.Module, "cuda", _module_cuda),
        (torch.autograd, "_engine_run_backward", _under(mode, torch.autograd._engine_run_backward)),
    ]
    undo = contextlib.ExitStack()
    for owner, name, stand_in in stand_ins:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, stand_in)
    undo.enter_context(mode)
    _undo = undo


def deactivate() -> None:
    global _undo
    if _undo is not None:
        _undo.close()
        _undo = None
