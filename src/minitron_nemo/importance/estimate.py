"""Width importance from forward passes that somebody else drives.

    with ImportanceEstimator(model, shape, Groups.from_megatron()) as estimator:
        for batch in batches:                       # or from inside Megatron's pipeline schedule
            estimator.sample(batch["loss_mask"])    # before the forward, on every pipeline stage
            model(...)
        importance = estimator.finish()

Forward passes only, no gradients (arXiv:2407.14679, Importance Analysis). The result is the same on every layout and
for every micro-batch size, up to float rounding, and equal on every rank.

Communication: while streaming see `watches`; at the end, once: tp gathers neurons and heads, dp adds samples, pp puts
the layers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minitron_nemo.activations.hooks import evaluating, hooks_until_the_end
from minitron_nemo.activations.tokens import AnnouncedBatch, mark_tokens_over
from minitron_nemo.checks import Mistake, require
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance.experts import ExpertWatch, expert_moments, watch_experts
from minitron_nemo.importance.stream import StreamMoments
from minitron_nemo.importance.watches import AxisWatches
from minitron_nemo.importance.width import PLACES, watch_layers
from minitron_nemo.parallel import (
    Groups,
    all_gather_shards,
    all_reduce_max,
    all_reduce_sum,
    broadcast_from,
    group_rank,
    group_size,
)
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import bare_gpt

_NOWHERE = 1 << 31  # above every place and every sample, its square within an int64


class ImportanceEstimator:
    """Hooks a model while the context is open; see the module's text. Dropout is off inside, weights are only read."""

    def __init__(
        self, model: nn.Module, shape: ModelShape, groups: Groups, config: ImportanceConfig | None = None
    ) -> None:
        """
        Args:
            model: the GPTModel of this rank (one pipeline stage of it), bare or wrapped.
            shape: the whole model's shape.
        """
        self.shape = shape
        self.groups = groups
        self.config = config or ImportanceConfig()
        self._model: Any = bare_gpt(model)
        self._current = AnnouncedBatch(call="Call estimator.sample(loss_mask)", give="Give estimator.sample")
        self._axes: dict[str, AxisWatches] = {}
        self._experts: list[ExpertWatch] = []
        self._stream: StreamMoments | None = None
        self._closing = ExitStack()
        self._num_samples = torch.zeros((), dtype=torch.float64, device=self._device)
        # rows of the micro-batches announced on this rank, fillers included: all, before the last, closed
        self._num_rows = self._rows_before = self._closed_rows = 0

    def __enter__(self) -> ImportanceEstimator:
        """Hook the model. Raises: ValueError: its dims are not those of `shape`, or its layers cannot be scored."""
        self._require_same_dims()
        with ExitStack() as stack:  # an error removes the hooks of the layers before the one that cannot be scored
            handles = stack.enter_context(hooks_until_the_end())
            where = (self._model, self.shape, self.groups, self._current, handles)
            self._axes = watch_layers(*where, self.config)
            self._experts = watch_experts(*where, self.config)
            if self.config.stream != "none":
                self._stream = StreamMoments(*where, kind=self.config.stream)
            stack.enter_context(evaluating(self._model))
            self._closing = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def sample(self, loss_mask: Tensor) -> None:
        """Announce the micro-batch whose forward pass comes next; tokens whose mask is 0 contribute nothing.

        Args:
            loss_mask: [b, s/cp], as Megatron's batches carry it.
        Communicates: cp, one all-reduce of [b]; and see `watches` for the micro-batch before.
        Raises: ValueError: an activation of the micro-batch before was not finite; names layer, axis and sample. Every
            rank that saw it raises. RuntimeError: the model was not run since the last call.
        """
        found = self._close()
        if found is not None:
            self._stop(*found)
        # Reading the mask waits for the device; the forward pass before is over.
        mask = mark_tokens_over(loss_mask, groups=[self.groups.cp], device=self._device)
        self._current.announce(mask)
        self._rows_before, self._num_rows = self._num_rows, self._num_rows + len(loss_mask)
        self._num_samples += mask.is_sample.sum()

    def sums(self) -> dict[str, Tensor]:
        """All that this rank has added up, for a pass that goes on another time (`resuming.Sums`).

        Communicates: as `sample`, for the micro-batch before; all groups, a number that says whether all was finite.
        Raises: ValueError, on every rank: it was not.
        """
        self._agree_all_finite(self._close())
        return {name: tensor.clone() for name, tensor in self._running().items()} | {
            "rows": torch.tensor([self._num_rows, self._rows_before])
        }

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from sums that an estimator of the same model and config had."""
        for name, tensor in self._running().items():
            tensor.copy_(sums[name])
        self._num_rows, self._rows_before = sums["rows"].tolist()
        self._closed_rows = self._num_rows

    def _running(self) -> dict[str, Tensor]:
        """By name, every tensor that is added to."""
        running = {"num_samples": self._num_samples} | {axis: each.moments for axis, each in self._axes.items()}
        for experts in self._experts:
            running |= {f"experts.{experts.index}.{name}": each for name, each in experts.running().items()}
        return running | ({} if self._stream is None else self._stream.running())

    def finish(self, origin: Mapping[str, Any] | None = None) -> Importance:
        """Merge all ranks' moments.

        Args:
            origin: what the caller knows about the samples (data, seed, sequence length); kept in the artifact.
        Communicates: tp, dp and pp, once per axis; all of them and cp, a number that says whether all was finite.
        Raises: ValueError: no sample was seen, or an activation was not finite (names layer, axis and sample).
            RuntimeError: the model was not run since the last `sample`.
        """
        self._agree_all_finite(self._close())
        num_samples = all_reduce_sum(self._num_samples, group=self.groups.dp)
        # Reading the value waits for the device; the pass is over.
        require(
            num_samples.item() >= 1,
            "Importance needs at least 1 calibration sample with a token that counts, but 0 were seen. "
            "Check importance.num_samples and that the loss masks are not all 0.",
        )
        moments = {axis: self._merge_over_ranks(axis) / num_samples for axis in self._axes}
        if self.shape.num_moe_experts is not None:
            moments |= expert_moments(self._experts, self.shape, self.groups, self._device)
        if self._stream is not None:
            moments |= self._stream.merge()
        for axis, tensor in moments.items():
            require(
                bool(tensor.isfinite().all()),
                f"Activations of axis {axis} are not finite (NaN or infinity); scores from them rank nothing. "
                "Check the checkpoint and its dtype with the evaluate stage.",
            )
        return Importance(
            shape=self.shape,
            moments={axis: tensor.cpu() for axis, tensor in moments.items()},
            num_samples=round(num_samples.item()),
            origin={**asdict(self.config), **(origin or {})},
        )

    def _require_same_dims(self) -> None:
        config = self._model.config
        for dim in (*self.shape.prunable_dims, "kv_channels"):
            built, named = getattr(config, dim), getattr(self.shape, dim)
            require(
                built == named,
                f"The model has {dim}={built}, but the shape to score it by says {named}. Pass the model's own shape.",
            )

    # ---- activations that are not finite ---------------------------------------------------------------------------

    def _close(self) -> tuple[int, int] | None:
        """End the announced micro-batch.

        Returns: where an activation was not finite, the first place (see `Watch`) and its first calibration sample.
        Communicates: see `watches`. Waits for the device, once.
        """
        if self._num_rows == self._closed_rows:
            return None
        self._closed_rows = self._num_rows
        broken = [(axis.watches, axis.close()) for axis in self._axes.values()]
        if not bool(torch.cat([at.flatten() for _, at in broken]).any()):
            return None
        place, row = min((watches[watch].place, row) for watches, at in broken for watch, row in at.nonzero().tolist())
        dp, rows = self.groups.dp, self._num_rows - self._rows_before
        return place, self._rows_before * group_size(dp) + group_rank(dp) * rows + row

    def _agree_all_finite(self, found: tuple[int, int] | None) -> None:
        """Raise on every rank, with one message, where an activation of the last micro-batch was not finite.

        Communicates: tp, cp, dp and pp, a maximum of one number.
        """
        place, sample = found or (_NOWHERE, 0)
        first = torch.tensor(-(place * _NOWHERE + sample), device=self._device)
        for group in (self.groups.tp, self.groups.cp, self.groups.dp, self.groups.pp):
            first = all_reduce_max(first, group=group)
        place, sample = divmod(-int(first.item()), _NOWHERE)
        if place != _NOWHERE:
            self._stop(place, sample)

    def _stop(self, place: int, sample: int) -> NoReturn:
        layer, place = divmod(place, len(PLACES))
        for experts in self._experts:  # experts keep no sample, so they are asked only where something else has failed
            if experts.index < layer:
                experts.require_finite()
        raise Mistake(
            f"Activations of axis {PLACES[place]} in decoder.layers.{layer} are not finite (NaN or infinity) in "
            f"calibration sample {sample} (from 0, in the order of calibration); scores from them rank nothing. "
            "Check that sample, and the checkpoint and its dtype with the evaluate stage."
        )

    # ---- merging ---------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _merge_over_ranks(self, axis: str) -> Tensor:
        """Sums [rows, 2, 3, c] of all layers and channels over all samples, equal on every rank.

        Communicates: tp (gather of neurons and heads; hidden channels are whole on each rank), dp and pp (sums).
        """
        watched, tp = self._axes[axis], self.groups.tp
        rows = (2 if axis == "hidden" else 1) * self.shape.num_layers
        local = torch.zeros(rows, 2, 3, watched.channels, dtype=torch.float64, device=self._device)
        local[[watch.row for watch in watched.watches]] = watched.moments
        if axis == "hidden":  # tp ranks hold the same sums; take one rank's, so that rounding cannot part them
            over_tp = broadcast_from(local, source=0, group=tp)
        else:
            over_tp = torch.cat(all_gather_shards(local, group=tp), dim=-1)
        over_dp = all_reduce_sum(over_tp, group=self.groups.dp)
        return all_reduce_sum(over_dp, group=self.groups.pp)
