"""Width importance from forward passes that somebody else drives.

    with ImportanceEstimator(model, shape, Groups.from_megatron()) as estimator:
        for batch in batches:                       # or from inside Megatron's pipeline schedule
            estimator.sample(batch["loss_mask"])    # before the forward, on every pipeline stage
            model(...)
        importance = estimator.finish()

Forward passes only, no gradients (arXiv:2407.14679, Importance Analysis). The result is the same on every layout and
for every micro-batch size, up to float rounding, and equal on every rank.

Communication: while streaming see `hooks`; at the end, once: tp gathers neurons and heads, dp adds samples, pp puts the
layers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.importance.hooks import LayerWatches, MicroBatch, Watch, watch_layers
from minitron_nemo.importance.scores import Importance, NineScores
from minitron_nemo.importance.statistics import aggregate_samples, mark_tokens_over
from minitron_nemo.parallel import Groups, all_gather_shards, all_reduce_sum, broadcast_from, group_size
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape
from minitron_nemo.weights import bare_gpt

HEAD_NORMS = ("before", "after")


@dataclass
class ImportanceConfig:
    """What a pass measures. All nine aggregations are recorded; which one ranks is the pruning's choice."""

    num_samples: int = 1024
    """Calibration samples over all data-parallel ranks, at least 1. Minitron uses 1024."""
    head_norm: str = "before"
    """L2 norm over a head's kv_channels before the aggregation, per token (the paper), or after it (the published
    reference implementation)."""

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"importance.num_samples={self.num_samples} must be at least 1; try 1024.")
        require(
            self.head_norm in HEAD_NORMS,
            f"importance.head_norm={self.head_norm} is not known; {did_you_mean(self.head_norm, HEAD_NORMS)}",
        )


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
        self._current = MicroBatch()
        self._layers: list[LayerWatches] = []
        self._handles: list[RemovableHandle] = []
        self._training: list[nn.Module] = []
        self._num_samples: Tensor | None = None

    def __enter__(self) -> ImportanceEstimator:
        """Hook the model. Raises: ValueError: its dims are not those of `shape`, or its layers cannot be scored."""
        self._require_same_dims()
        try:
            self._layers = watch_layers(
                self._model,
                self.shape,
                self.groups,
                self._current,
                self._handles,
                norm_of_heads_per_token=self.config.head_norm == "before",
            )
        except BaseException:
            self._remove_hooks()  # those of the layers before the one that cannot be scored
            raise
        self._training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_hooks()
        for module in self._training:
            module.training = True

    def sample(self, loss_mask: Tensor) -> None:
        """Announce the micro-batch whose forward pass comes next; tokens whose mask is 0 contribute nothing.

        Args:
            loss_mask: [b, s/cp], as Megatron's batches carry it.
        Communicates: cp, one all-reduce of [b].
        """
        mask = mark_tokens_over(loss_mask.to(self._device), groups=[self.groups.cp])
        self._current.mask = mask
        self._current.number += 1
        counted = mask.is_sample.sum()
        self._num_samples = counted if self._num_samples is None else self._num_samples + counted

    def finish(self, origin: Mapping[str, Any] | None = None) -> Importance:
        """Merge all ranks' moments into scores.

        Args:
            origin: what the caller knows about the samples (data, seed, sequence length); kept in the artifact.
        Communicates: tp, dp and pp, once per axis.
        Raises: ValueError: no sample was seen, or an activation was not finite (names the layer).
        """
        for watch in (watch for layer in self._layers for watch in layer.all()):
            require(
                watch.num_seen == self._current.number,
                f"{self._current.number} micro-batches were announced, but {watch.place} saw {watch.num_seen} forward "
                "passes. Run the model once after each estimator.sample(loss_mask).",
                RuntimeError,
            )
        counted = self._num_samples if self._num_samples is not None else self._zeros(())
        num_samples = all_reduce_sum(counted.to(self._device), group=self.groups.dp)
        # Reading the value waits for the device; the pass is over.
        require(
            num_samples.item() >= 1,
            "Importance needs at least 1 calibration sample with a token that counts, but 0 were seen. "
            "Check importance.num_samples and that the loss masks are not all 0.",
        )
        head = self._scores("head", [(layer.index, layer.head) for layer in self._layers], num_samples)
        if self.config.head_norm == "after":
            per_head = (self.shape.num_attention_heads, self.shape.kv_channels)
            head = {
                pair: torch.linalg.vector_norm(score.unflatten(-1, per_head), dim=-1) for pair, score in head.items()
            }
        groups_of_heads = (self.shape.num_query_groups, self.shape.heads_per_group)
        hidden = [(2 * layer.index + place, norm) for layer in self._layers for place, norm in enumerate(layer.norms)]
        width: dict[str, NineScores] = {
            "hidden": {pair: score.sum(0) for pair, score in self._scores("hidden", hidden, num_samples).items()},
            "ffn": self._scores("ffn", [(layer.index, layer.ffn) for layer in self._layers], num_samples),
            "head": head,
            "group": {pair: score.unflatten(-1, groups_of_heads).sum(-1) for pair, score in head.items()},
        }
        return Importance(
            shape=self.shape,
            width={
                axis: {pair: score.float().cpu() for pair, score in scores.items()} for axis, scores in width.items()
            },
            num_samples=round(num_samples.item()),
            origin={"metric": "activations", **asdict(self.config), **(origin or {})},
        )

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _require_same_dims(self) -> None:
        config = self._model.config
        for dim in (*PRUNABLE_DIMS, "kv_channels"):
            built, named = getattr(config, dim), getattr(self.shape, dim)
            require(
                built == named,
                f"The model has {dim}={built}, but the shape to score it by says {named}. Pass the model's own shape.",
            )

    # ---- merging ---------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _zeros(self, size: tuple[int, ...]) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self._device)

    def _scores(self, axis: str, watches: list[tuple[int, Watch]], num_samples: Tensor) -> NineScores:
        """Nine scores [rows, c] float64 of an axis, global; a row is a layer, for hidden a norm."""
        moments = self._merge_over_ranks(axis, watches)
        finite = moments.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            layer = row // 2 if axis == "hidden" else row
            raise ValueError(
                f"Activations of axis {axis} in decoder.layers.{layer} are not finite (NaN or infinity); scores from "
                "them rank nothing. Check the checkpoint and its dtype with the evaluate stage."
            )
        return aggregate_samples(moments, num_samples)

    def _merge_over_ranks(self, axis: str, watches: list[tuple[int, Watch]]) -> Tensor:
        """Moments [rows, 2, 3, c] of all layers and channels over all samples, equal on every rank.

        Communicates: tp (gather of neurons and heads; hidden channels are whole on each rank), dp and pp (sums).
        """
        tp, shape = self.groups.tp, self.shape
        rows, channels = {
            "ffn": (shape.num_layers, shape.ffn_hidden_size // group_size(tp)),
            "head": (
                shape.num_layers,
                shape.num_attention_heads
                // group_size(tp)
                * (1 if self.config.head_norm == "before" else shape.kv_channels),
            ),
            "hidden": (2 * shape.num_layers, shape.hidden_size),
        }[axis]
        local = self._zeros((rows, 2, 3, channels))
        for row, watch in watches:
            local[row] = watch.moments.total
        if axis == "hidden":  # tp ranks hold the same sums; take one rank's, so that rounding cannot part them
            over_tp = broadcast_from(local, source=0, group=tp)
        else:
            over_tp = torch.cat(all_gather_shards(local, group=tp), dim=-1)
        over_dp = all_reduce_sum(over_tp, group=self.groups.dp)
        return all_reduce_sum(over_dp, group=self.groups.pp)
