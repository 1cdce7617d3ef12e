"""Hooks that show what passes a module and leave it untouched, and the state a model is looked at in.

Communication: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

See = Callable[[Tensor], Any]
"""Takes what passes; what it returns is dropped."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout is off inside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooks_until_the_end() -> Iterator[list[RemovableHandle]]:
    """A list for handles of hooks, which are removed at the end, also where an error ends it."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def on_input(see: See) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A forward pre-hook that shows a module's first input."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(args[0])

    return hook


def on_output(see: See) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that shows a module's output, the first part of several."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        see(output if isinstance(output, Tensor) else output[0])

    return hook
