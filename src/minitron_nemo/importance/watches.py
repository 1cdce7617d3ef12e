"""Places of a model where activations are scored: what a forward pass leaves there, and what stays of it.

    activation   what passes a place                               [s/cp, b, c]   model dtype
    sums         sum |a|, sum a, sum a^2 over this rank's tokens   [3, b, c]      float64
    moments      of all places of an axis, over the samples        [places, 2, 3, c]

A hook sums over this rank's tokens and no more. What follows is small, and done for all places of an axis at once when
the micro-batch is over (`AxisWatches.close`).

Communication per micro-batch and axis, all places together: one all-reduce of [places, 3, b, c] float64 over each group
that splits a sample's tokens, since L2 and variance need the whole sample. Hooks communicate nothing and read no value
to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minitron_nemo.activations.tokens import AnnouncedBatch
from minitron_nemo.checks import require
from minitron_nemo.importance.statistics import add_over, add_samples, partial_sums
from minitron_nemo.parallel import ProcessGroup, group_size


class Watch:
    """One hooked place: sums an activation over the tokens of the current micro-batch."""

    def __init__(
        self,
        name: str,
        row: int,
        place: int,
        current: AnnouncedBatch,
        *,
        shard: tuple[int, int] = (0, 1),
        measure: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            name: of the hooked module, for messages.
            row: of the axis' moments, over all pipeline stages.
            place: in the order in which a forward pass comes by; see `width.PLACES`.
            shard: which part of the announced mask's tokens lies here, of how many.
            measure: [s, b, ...] -> [s, b, c], where the activation is not yet what is scored.
        """
        self.name, self.row, self.place = name, row, place
        self.num_seen = 0
        self.sums: Tensor | None = None
        """`partial_sums` [3, b, c] of the micro-batch that is not closed yet."""
        self._current = current
        self._shard = shard
        self._measure = measure

    def see(self, activation: Tensor) -> None:
        """Sum one micro-batch."""
        # The CPU platform's function mode costs as much per call as a small op, and nothing here names a device.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._current.require_is_next(self.name, self.num_seen)
            mask = self._current.mask(*self._shard)
            self._current.require_holds(self.name, activation, mask)
            measured = activation if self._measure is None else self._measure(activation)
            self.sums = partial_sums(measured, mask)
        self.num_seen += 1


class AxisWatches:
    """The places of one axis on this pipeline stage and their moments over the samples so far."""

    def __init__(
        self,
        channels: int,
        device: torch.device,
        current: AnnouncedBatch,
        groups: Sequence[ProcessGroup | None],
        *,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """
        Args:
            channels: c, what this rank scores at each place.
            groups: those that split a sample's tokens at these places.
            shard: see `Watch`.
        """
        self.watches: list[Watch] = []
        self.channels = channels
        self._device = device
        self._current, self._groups, self._shard = current, groups, shard
        self._moments: Tensor | None = None

    def add(self, name: str, row: int, place: int, measure: Callable[[Tensor], Tensor] | None = None) -> Watch:
        """A place more; the hook that shows it its activation is the caller's."""
        self.watches.append(Watch(name, row, place, self._current, shard=self._shard, measure=measure))
        return self.watches[-1]

    @property
    def moments(self) -> Tensor:
        """Sum and sum of squares over samples of each place, [places, 2, 3, c] float64."""
        if self._moments is None:
            size = (len(self.watches), 2, 3, self.channels)
            self._moments = torch.zeros(size, dtype=torch.float64, device=self._device)
        return self._moments

    def close(self) -> Tensor:
        """Add the micro-batch that every place has seen.

        Communicates: over the groups that split the sequence, one all-reduce each.
        Returns: [places, b] bool, where an activation was not finite.
        Raises: RuntimeError: a place saw no forward pass since the micro-batch was announced.
        """
        sums = []
        for watch in self.watches:
            require(
                watch.sums is not None,
                f"{self._current.number} micro-batches were announced, but {watch.name} saw {watch.num_seen} forward "
                "passes. Run the model once after each estimator.sample(loss_mask).",
                RuntimeError,
            )
            assert watch.sums is not None
            sums.append(watch.sums)
            watch.sums = None
        num_tokens = self._current.mask().num_tokens
        if not sums:
            return torch.zeros(0, num_tokens.numel(), dtype=torch.bool, device=self._device)
        with torch._C.DisableTorchFunction():  # as in `Watch.see`
            if any(group_size(group) > 1 for group in self._groups):
                sums = list(add_over(torch.stack(sums), groups=self._groups).unbind())
            return ~add_samples(sums, num_tokens, self.moments)
