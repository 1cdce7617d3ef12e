"""Depth importance: what a model loses when a layer, or a contiguous block of layers, is left out.

    with DepthEstimator(model, shape, Groups.from_megatron(), config, forward) as estimator:
        for batch in batches:               # micro-batches of this rank
            estimator.add(batch)            # on every pipeline stage; drives Megatron's schedule itself
        scores = estimator.finish()         # metric -> block size n -> [L-n+1], entry i for layers i .. i+n-1

Larger means more important. The metrics (`full` is the intact model, `removed` the one without the block):

    block_influence  1 - mean cos of the block's input and output          arXiv:2407.14679 s2.2; see block_influence.py
    loss             loss(removed) - loss(full), nats per token; the       arXiv:2407.14679 s2.2, by perplexity
                     ratio of the perplexities is its exponential
    kl               KL(full || removed), nats per token                   arXiv:2504.11409, 256 samples
    squared_error    sum (M_full - M_removed)^2 / sum M_full^2, M logits   arXiv:2511.16664; without the divisor, which
                                                                           changes no rank, arXiv:2508.14444
    accuracy         accuracy(full) - accuracy(removed) on a task          arXiv:2408.11796; see runtime/depth_sweep.py

By any of them layers can also be dropped greedily, with importance estimated again after every drop (arXiv:2508.14444,
arXiv:2511.16664); the metric `greedy` is the order they went in, see runtime/depth_sweep.py.

Block influence needs one forward pass for all n. The others share the passes of one sweep (see removal.py). Means are
over all tokens that count, of all samples: each token weighs the same, whatever sample and micro-batch it is in.

Communication while streaming: the passes' own, pp for block influence, tp in the loss and the KL, and one maximum over
all ranks per micro-batch that stops them together where an activation is not finite. At the end, once: tp, cp, dp, pp.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from minitron_nemo.checks import Mistake, require
from minitron_nemo.config.importance import BLOCK_INFLUENCE, LOGIT_METRICS, DepthConfig
from minitron_nemo.divergence.cross_entropy import token_losses
from minitron_nemo.divergence.streamed import forward_kl
from minitron_nemo.divergence.vocabulary import Vocabulary
from minitron_nemo.importance.block_influence import BlockInfluence
from minitron_nemo.importance.removal import ForwardStep, LayerSwitches, Sweep
from minitron_nemo.parallel import Groups, all_reduce_max, all_reduce_sum, broadcast_from, group_rank, group_size
from minitron_nemo.shape import ModelShape

DepthScores = dict[str, dict[int, Tensor]]
"""Metric -> block size n -> [L-n+1] float32."""


def require_depth_fits(config: DepthConfig, shape: ModelShape) -> None:
    """Raises: ValueError: a block size, or a number of layers to drop, that such a model does not have."""
    if config.metrics:
        Sweep(shape.num_layers, config.block_sizes)
    greedy, have = config.greedy, shape.num_layers
    free = have - greedy.keep_first - greedy.keep_last
    most = max(0, min(free, have - 1))
    require(
        greedy.metric is None or greedy.drop <= most,
        f"depth.greedy.drop={greedy.drop} layers cannot be dropped of {have}, with depth.greedy.keep_first="
        f"{greedy.keep_first} and keep_last={greedy.keep_last}: at most {most} can, as one must stay. Lower them.",
    )


class DepthEstimator:
    """Every metric of `config` but the accuracy; see the module's text. The model's weights are only read."""

    def __init__(
        self,
        model: nn.Module,
        shape: ModelShape,
        groups: Groups,
        config: DepthConfig,
        forward: ForwardStep,
        *,
        vocab_size: int | None = None,
        dropped: Collection[int] = (),
    ) -> None:
        """
        Args:
            model: the GPTModel of this rank (one pipeline stage of it), bare or wrapped.
            forward: runs one micro-batch through it; see `removal.ForwardStep`.
            vocab_size: real entries of the padded vocabulary; None: all are real.
            dropped: layers that are gone already, for iterative removal: scores are of what remains, loss, kl and
                squared_error still against the intact model.
        Raises: ValueError: a block size or a dropped layer the model does not have.
        """
        self.shape, self.groups, self.config = shape, groups, config
        self._logit_metrics = [metric for metric in LOGIT_METRICS if metric in config.metrics]
        self._sweep = Sweep(shape.num_layers, config.block_sizes, dropped)
        self._passes = self._sweep.passes if self._logit_metrics else self._sweep.base
        self._layers = LayerSwitches(model)
        self._forward = forward
        core = self._layers.model
        self._sequence_parallel: bool = core.config.sequence_parallel
        self._device = next(core.parameters()).device
        self._influence = BlockInfluence(
            shape.num_layers, groups, sequence_parallel=self._sequence_parallel, device=self._device
        )
        self._costs = LogitCosts(len(self._passes), self._logit_metrics, groups, vocab_size, self._device)
        self._num_batches = 0

    def __enter__(self) -> DepthEstimator:
        self._layers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._layers.__exit__(kind, error, trace)

    def add(self, batch: dict[str, Tensor]) -> None:
        """Run every pass over one micro-batch.

        Args:
            batch: this rank's part of it, tokens, labels, position_ids and loss_mask [b, s/cp]; tokens whose mask is 0
                contribute nothing.
        Communicates: see the module's text.
        Raises: ValueError: a layer's output is not finite (names the layer and the sample), on every rank.
        """
        counts = batch["loss_mask"] != 0
        self._layers.run(
            self._passes, batch, self._forward, lambda number, logits: self._costs.see(number, logits, batch, counts)
        )
        self._num_batches += 1
        counts = counts.t()  # [s/cp, b], as the states lie
        if self._sequence_parallel:
            counts = counts.chunk(group_size(self.groups.tp))[group_rank(self.groups.tp)]
        self._stop_where_not_finite(counts)
        if BLOCK_INFLUENCE in self.config.metrics:
            self._influence.add(self._layers.states, counts)
        self._layers.states.clear()

    def finish(self) -> DepthScores:
        """The scores, equal on every rank.

        Communicates: tp, cp, dp and pp.
        Raises: ValueError: no token counted, or a model without some layers gave logits that are not finite.
        """
        scores: dict[str, dict[int, Tensor]] = {}
        if BLOCK_INFLUENCE in self.config.metrics:
            scores[BLOCK_INFLUENCE] = self._influence.finish()
        for metric, values in self._costs.finish().items():
            scores[metric] = self._sweep.by_block(values)
        for metric, by_size in scores.items():
            for size, values in by_size.items():
                require(
                    # Reading the values waits for the device; the passes are over.
                    bool(values.isfinite().all()),
                    f"depth metric {metric} for blocks of {size} is not finite: no token counted, or the model without "
                    "a block overflows. Check that the loss masks are not all 0, and try trainer.precision=fp32.",
                )
        return {
            metric: {size: values.float().cpu() for size, values in by_size.items()}
            for metric, by_size in scores.items()
        }

    def sums(self) -> dict[str, Tensor]:
        """All that this rank has added up, for a pass that goes on another time (`resuming.Sums`)."""
        kept = {name: tensor.clone() for name, tensor in self._running().items()}
        return kept | {"num_batches": torch.tensor(self._num_batches)}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from sums that an estimator of the same model and config had."""
        for name, tensor in self._running().items():
            tensor.copy_(sums[name])
        self._num_batches = int(sums["num_batches"])

    def _running(self) -> dict[str, Tensor]:
        """By name, every tensor that is added to."""
        of = {"influence": self._influence.running(), "costs": self._costs.running()}
        return {f"{name}.{key}": tensor for name, parts in of.items() for key, tensor in parts.items()}

    def _stop_where_not_finite(self, counts: Tensor) -> None:
        """Raise on every rank where a recorded state is not finite at a token that counts.

        Communicates: one maximum of one number over tp, cp, dp and pp. Waits for the device, once per micro-batch, so
        that a broken checkpoint does not cost a whole sweep.
        """
        rows, num_layers = counts.shape[1], self.shape.num_layers
        per_batch = rows * group_size(self.groups.dp)
        place = group_rank(self.groups.dp) * rows + torch.arange(rows, device=self._device)  # among all ranks' samples
        worst = torch.full((), -1, device=self._device)
        for row, state in self._layers.states.items():
            per_token = state.sum(-1, dtype=torch.float32)  # not finite where a channel is not
            broken = (counts & ~per_token.isfinite()).any(0)  # [b]
            code = (num_layers - row) * per_batch + (per_batch - 1 - place)  # largest for the first layer and sample
            worst = torch.maximum(worst, torch.where(broken, code, -1).max())
        for group in (self.groups.tp, self.groups.cp, self.groups.dp, self.groups.pp):
            worst = all_reduce_max(worst, group=group)
        found = int(worst.item())
        if found < 0:
            return
        layer = num_layers - found // per_batch - 1
        sample = self._num_batches * per_batch - 1 - found % per_batch
        source = "the embedding" if layer < 0 else f"decoder.layers.{layer}"
        raise Mistake(
            f"The output of {source} is not finite (NaN or infinity) in calibration sample {sample}; scores from it "
            "rank nothing. Check the checkpoint and its dtype with the evaluate stage."
        )


class LogitCosts:
    """Sums over counting tokens of what each pass's logits cost beside the first pass's; on the last stage."""

    def __init__(
        self, num_passes: int, metrics: list[str], groups: Groups, vocab_size: int | None, device: torch.device
    ) -> None:
        self.metrics, self.groups, self.vocab_size = metrics, groups, vocab_size
        self._sums = torch.zeros(len(LOGIT_METRICS), num_passes, dtype=torch.float64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._num_tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._full: Tensor | None = None

    def see(self, number: int, logits: Tensor, batch: dict[str, Tensor], counts: Tensor) -> None:
        """Add pass `number`'s logits [b, s/cp, v/tp], which are overwritten. Communicates: tp, in loss and KL."""
        if number == 0:
            self._num_tokens += counts.sum()
            if {"kl", "squared_error"} & set(self.metrics):
                self._full = logits.clone()  # the cross-entropy overwrites what it is given
            if "squared_error" in self.metrics:
                self._squares += _squared_distance(logits, None, counts, self._num_real(logits))
        elif self._full is not None:
            if "kl" in self.metrics:
                kl = forward_kl(logits, self._full, tp_group=self.groups.tp, vocab_size=self.vocab_size)
                self._add("kl", number, kl, counts)
            if "squared_error" in self.metrics:
                distance = _squared_distance(logits, self._full, counts, self._num_real(logits))
                self._sums[LOGIT_METRICS.index("squared_error"), number] += distance
        if "loss" in self.metrics:
            losses = token_losses(logits, batch["labels"], vocab_size=self.vocab_size, tp_group=self.groups.tp)
            self._add("loss", number, losses, counts)

    def running(self) -> dict[str, Tensor]:
        """By name, every tensor that is added to."""
        return {"sums": self._sums, "squares": self._squares, "num_tokens": self._num_tokens}

    def finish(self) -> dict[str, Tensor]:
        """Metric -> [passes] float64, 0 for the first pass; equal on every rank.

        Communicates: tp (the squares of a split vocabulary), cp, dp and pp (from the last stage).
        """
        sums, squares, groups = self._sums.clone(), self._squares, self.groups
        row = LOGIT_METRICS.index("squared_error")
        split = all_reduce_sum(torch.cat([sums[row], squares.view(1)]), group=groups.tp)
        sums[row] = split[:-1]
        packed = torch.cat([sums.flatten(), split[-1:], self._num_tokens.view(1)])
        for group in (groups.cp, groups.dp):
            packed = all_reduce_sum(packed, group=group)
        packed = broadcast_from(packed, source=group_size(groups.pp) - 1, group=groups.pp)
        sums, squares, num_tokens = packed[:-2].view_as(sums), packed[-2], packed[-1]
        values = {
            "loss": (sums[0] - sums[0, 0]) / num_tokens,
            "kl": sums[1] / num_tokens,
            "squared_error": sums[2] / squares,
        }
        return {metric: values[metric] for metric in self.metrics}

    def _add(self, metric: str, number: int, per_token: Tensor, counts: Tensor) -> None:
        self._sums[LOGIT_METRICS.index(metric), number] += torch.where(counts, per_token.double(), 0.0).sum()

    def _num_real(self, logits: Tensor) -> int:
        """Columns of this rank's logits that are not padding."""
        return Vocabulary.split(logits.shape[-1], self.vocab_size, self.groups.tp).local


SQUARES_ELEMENTS = 1 << 22  # of a block of logits: 16 MiB in float32


def _squared_distance(logits: Tensor, other: Tensor | None, counts: Tensor, num_real: int) -> Tensor:
    """Sum of squares of (logits - other) over counting tokens and real columns, float64; of the logits for None."""
    rows = logits.flatten(0, 1)[:, :num_real]
    others = other.flatten(0, 1)[:, :num_real] if other is not None else None
    per_token = torch.empty(rows.shape[0], dtype=torch.float64, device=rows.device)
    step = max(1, SQUARES_ELEMENTS // max(1, num_real))
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        difference = rows[chunk].float()
        if others is not None:
            difference = difference - others[chunk].float()
        per_token[chunk] = difference.square().sum(-1)
    return torch.where(counts.flatten(), per_token, 0.0).sum()
