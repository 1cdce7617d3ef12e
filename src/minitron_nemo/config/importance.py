"""What the importance pass measures: conf's `importance` and `depth` groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.ranges import Ranged, ranged

HEAD_NORMS = ("before", "after")
NEURONS = ("post_activation", "pre_activation")
METRICS = ("activations", "contributions", "weight_magnitude", "random")
STREAM_KINDS = ("none", "normalised", "raw")
BLOCK_INFLUENCE, ACCURACY = "block_influence", "accuracy"
LOGIT_METRICS = ("loss", "kl", "squared_error")
DEPTH_METRICS = (BLOCK_INFLUENCE, *LOGIT_METRICS, ACCURACY)
"""What a removal costs; layers are ranked by them, or dropped greedily by one of them."""


@dataclass
class ImportanceConfig(Ranged):
    """What a pass measures. All nine aggregations are recorded; which one ranks is the pruning's choice."""

    KEY: ClassVar[str] = "importance"

    num_samples: int = ranged(1024, at_least=1, mend="try 1024")
    """Calibration samples over all data-parallel ranks. Minitron uses 1024."""
    head_norm: str = "before"
    """L2 norm over a head's kv_channels before the aggregation, per token (the paper), or after it (the published
    reference implementation)."""
    neurons: str = "post_activation"
    """Neurons by the input of linear_fc2 (post_activation, the published reference implementation) or by the output of
    linear_fc1, the gate half of a gated one (pre_activation, the formula the paper prints)."""
    metric: str = "activations"
    """activations (the paper); contributions: what each structure writes to the residual stream, which ranks heads and
    channels better where tried (docs/pruning.md); or a baseline that reads no samples: weight_magnitude or random."""
    stream: str = "none"
    """Second moments of the residual stream, which prune.surgery.basis=rotation needs: normalised (every token weighs
    the same), raw, or none. h^2 numbers more, and 2 h^2 FLOPs a token and norm."""
    calibration: str | None = None
    """JSONL file of calibration samples, {"text"}, {"prompt", "response"} or {"messages"} a line; None: the training
    blend."""
    count_prompts: bool = True
    """Whether a calibration file's prompts count as its responses do; either way the model reads them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options = (("head_norm", HEAD_NORMS), ("neurons", NEURONS), ("metric", METRICS), ("stream", STREAM_KINDS))
        for option, known in options:
            value = getattr(self, option)
            require(value in known, f"importance.{option}={value} is not known; {did_you_mean(value, known)}")
        require(
            self.metric != "contributions" or (self.head_norm, self.neurons) == ("before", "post_activation"),
            "importance.metric=contributions reads what is written to the residual stream: it needs "
            "importance.head_norm=before and importance.neurons=post_activation.",
        )


@dataclass
class GreedyConfig(Ranged):
    """An order of dropping layers one after another, each time the one that the remaining model needs least."""

    KEY: ClassVar[str] = "depth.greedy"

    metric: str | None = None
    """The metric to drop by: block_influence, loss, kl, squared_error or accuracy; null: no order is made. It need not
    be among depth.metrics. Every drop reads the samples again and costs up to half of L forward passes."""
    drop: int = ranged(1, at_least=1)
    """Layers to drop; pruning may drop as many or fewer."""
    keep_first: int = ranged(0, at_least=0)
    """Layers at the beginning that are never dropped."""
    keep_last: int = ranged(0, at_least=0)
    """Layers at the end that are never dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.metric is None or self.metric in DEPTH_METRICS,
            f"depth.greedy.metric={self.metric} is not known; {did_you_mean(str(self.metric), DEPTH_METRICS)}",
        )


@dataclass
class DepthConfig(Ranged):
    """Which depth scores a run estimates, on how much data."""

    KEY: ClassVar[str] = "depth"

    metrics: list[str] = field(default_factory=list)
    """Any of block_influence, loss, kl, squared_error, accuracy; empty: none."""
    block_sizes: list[int] = ranged(of=lambda: [1], at_least=1, mend="[1] is single layers")
    """Sizes n of the contiguous blocks that are left out in turn, each below the number of layers. Every size costs up
    to half of L forward passes. Block influence gives all sizes whatever stands here."""
    greedy: GreedyConfig = field(default_factory=GreedyConfig)
    """Scores by an order of dropping, for pruning with depth.metric=greedy."""
    num_samples: int = ranged(256, at_least=1, mend="try 256")
    """Calibration samples over all data-parallel ranks; 256 as in arXiv:2504.11409."""
    task: str | None = None
    """JSONL file of multiple-choice questions for the accuracy: {"context", "options", "answer"} or Winogrande's own
    fields, one question a line; or YAML of a multiple-choice task of lm_eval."""
    normalize: bool = False
    """Divide an option's log-likelihood by its number of characters (acc_norm of lm-evaluation-harness; else acc)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for metric in self.metrics:
            require(
                metric in DEPTH_METRICS,
                f"depth.metrics holds {metric}, which is not known; {did_you_mean(metric, DEPTH_METRICS)}",
            )
        require(
            0 < len(self.block_sizes) == len(set(self.block_sizes)),
            f"depth.block_sizes={list(self.block_sizes)} must be different sizes, at least one; [1] is single layers.",
        )
        require(
            (ACCURACY in self._estimated) == (self.task is not None),
            "accuracy is asked for (depth.metrics, depth.greedy.metric), but depth.task is not set; give it a JSONL "
            "file of questions with options, or a task's YAML."
            if self.task is None
            else f"depth.task={self.task} is read for the accuracy only; add accuracy to depth.metrics.",
        )

    @property
    def is_asked_for(self) -> bool:
        """Whether a depth score is estimated at all."""
        return len(self._estimated) > 0

    @property
    def reads_samples(self) -> bool:
        """Whether a metric is asked for that needs calibration samples."""
        return any(metric != ACCURACY for metric in self._estimated)

    @property
    def _estimated(self) -> list[str]:
        return [*self.metrics, *([] if self.greedy.metric is None else [self.greedy.metric])]
