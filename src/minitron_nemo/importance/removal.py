"""Running a model without some of its layers, starting from inputs its layers had before.

A sweep takes one micro-batch through the model many times: once whole, then once for every contiguous block of layers
left out. A layer left out returns its input (what remains of it is the residual stream), which is the model without
that layer. The layers before a block see nothing new, so they are not run again: the block's first layer returns the
input it had in the recorded pass, and those before it return at once.

    layers run, all single-layer removals      L + (L-1) + ... + 0 = L(L+1)/2 with the whole pass, half of L+1 passes
    memory                                     the recorded inputs of this stage's layers, L/pp x [s/cp, b, h]
                                               ([s/(cp*tp), b, h] under sequence parallelism)

The passes are the micro-batches of one call of Megatron's pipeline schedule, so that stages overlap; every stage counts
its own passes. A stage whose layers all lie before the block sends a message nobody reads, which keeps the schedule's
shape. Weights are only read; layers get their own `forward` back when the context closes.

Communication: what the model and Megatron's schedule do by themselves (tp, cp; pp between stages).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from minitron_nemo.activations.hooks import evaluating
from minitron_nemo.checks import require
from minitron_nemo.schedule import forward_only
from minitron_nemo.weights import bare_gpt

ForwardStep = Callable[[Any, dict[str, Tensor]], Tensor]
"""(model, micro-batch of this rank) -> logits [b, s/cp, v/tp] on the last stage, the passing activation elsewhere."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: which layers take part in it."""

    skipped: frozenset[int] = frozenset()
    """Layers that return their input."""
    resume_at: int | None = None
    """Layers before this one return at once; this one, which is skipped, returns the input it had when recorded."""
    record: bool = False
    """Keep every layer's input, and the last layer's output."""


class Sweep:
    """The passes over one micro-batch: the intact model first, then every block of layers left out.

    Where layers are `dropped` already, the second pass is the model without them, from which all others start; the
    first stays what they are compared with.
    """

    def __init__(self, num_layers: int, block_sizes: Sequence[int], dropped: Collection[int] = ()) -> None:
        """Raises: ValueError: a block that leaves no layer, or a dropped layer the model does not have."""
        for size in block_sizes:
            require(
                1 <= size < num_layers,
                f"depth.block_sizes holds {size}, but a block of a model of {num_layers} layers has 1 to "
                f"{num_layers - 1}; at least one layer must stay.",
            )
        wrong = sorted(layer for layer in dropped if not 0 <= layer < num_layers)
        require(not wrong, f"dropped layers {wrong} do not exist; this model's layers are 0 to {num_layers - 1}.")
        gone = frozenset(dropped)
        self.num_layers = num_layers
        self.passes = [Pass()] if gone else []
        self.passes.append(Pass(skipped=gone, record=True))
        self._base = len(self.passes) - 1
        self._pass_of: dict[int, list[int]] = {}
        for size in block_sizes:
            self._pass_of[size] = []
            for start in range(num_layers - size + 1):
                block = frozenset(range(start, start + size))
                if block <= gone:  # nothing more to leave out
                    self._pass_of[size].append(self._base)
                    continue
                self._pass_of[size].append(len(self.passes))
                self.passes.append(Pass(skipped=gone | block, resume_at=start))

    @property
    def base(self) -> list[Pass]:
        """The one pass that records, for who needs no logits of a model without a block."""
        return [self.passes[self._base]]

    def by_block(self, values: Tensor) -> dict[int, Tensor]:
        """Block size n -> [L-n+1], entry i for the block of layers i..i+n-1; from one value a pass, [passes]."""
        return {size: values[numbers] for size, numbers in self._pass_of.items()}


class LayerSwitches:
    """Lets a Sweep's passes run on `model` while the context is open; dropout is off inside."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the GPTModel of this rank (one pipeline stage of it), bare or wrapped.
        """
        self.model: Any = bare_gpt(model)
        self.states: dict[int, Tensor] = {}
        """Layer -> its input in the recorded pass, for this stage's layers; num_layers -> the last layer's output."""
        self._current = Pass()
        self._own: list[tuple[Any, Any]] = []
        self._closing = ExitStack()

    def __enter__(self) -> LayerSwitches:
        for layer in self.model.decoder.layers:
            self._own.append((layer, layer.__dict__.get("forward")))
            layer.forward = self._switched(layer.layer_number - 1, layer.forward)
        self._closing.enter_context(evaluating(self.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, own in self._own:
            del layer.forward  # ours, on the instance
            if own is not None:
                layer.forward = own
        self._closing.close()
        self._own.clear()
        self.states.clear()

    def _switched(self, index: int, forward: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
        def switched(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            now = self._current
            if now.record:
                self.states[index] = hidden_states
            if index == now.resume_at:
                hidden_states = self.states[index]
            if index in now.skipped or (now.resume_at is not None and index < now.resume_at):
                output = hidden_states, kwargs.get("context")
            else:
                output = forward(hidden_states, *args, **kwargs)
            if now.record and index == self.model.config.num_layers - 1:
                self.states[index + 1] = output[0]
            return output

        return switched

    def run(
        self,
        passes: Sequence[Pass],
        batch: Mapping[str, Tensor],
        forward: ForwardStep,
        see: Callable[[int, Tensor], None],
    ) -> None:
        """Take one micro-batch through every pass.

        Args:
            batch: this rank's part of the micro-batch, tokens and position_ids [b, s/cp]; its labels stay out.
            see: called with the number of the pass and its logits [b, s/cp, v/tp], on the last stage; may overwrite
                them.
        Communicates: tp and cp inside the model, pp between stages.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}  # with labels: losses, no logits

        def forward_as(model: Any, now: tuple[int, Pass]) -> Tensor:
            self._current = now[1]
            return forward(model, inputs)

        rows, local_length = batch["tokens"].shape
        seq_length = local_length * self.model.config.context_parallel_size
        numbered, seen = enumerate(passes), lambda now, logits: see(now[0], logits)
        forward_only(self.model, numbered, forward_as, seen, count=len(passes), rows=rows, seq_length=seq_length)
