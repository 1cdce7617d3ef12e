"""How a model is cut, the papers' way or calibrated, and what the student may cost: conf's `prune` group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.ranges import Ranged, ranged
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape

COSTS = ("parameters", "non_embedding_parameters", "flops_per_token", "memory")
SELECTIONS = ("scores", "compensated_error")
DEPTH_CORRECTIONS = ("least_squares", "scale")
METHODS: dict[str, dict[str, str | bool]] = {
    "minitron": {
        "basis": "channels",
        "norm_scale": "none",
        "compensate": False,
        "correct_depth": False,
        "refit": "none",
    },
    "calibrated": {
        "basis": "rotation",
        "norm_scale": "energy",
        "compensate": True,
        "correct_depth": True,
        "refit": "sequential",
    },
}
"""What an option is that is not set. The calibrated basis is channels under tied embeddings, and what stands beside
refit=sequential is fitted by it."""
REFITS = ("none", "sequential")


@dataclass
class BudgetConfig(Ranged):
    """One of the four costs, and how to meet it."""

    KEY: ClassVar[str] = "budget"

    parameters: str | None = None
    """All parameters, embeddings included: 4.5B, 800M or a number."""
    non_embedding_parameters: str | None = None
    """Parameters of layers and final norm, as the papers count them: 3.7B."""
    flops_per_token: str | None = None
    """Matrix-multiply FLOPs of one token's forward pass at seq_length: 9.1G."""
    memory: str | None = None
    """Bytes of all weights and of the key-value cache of batch_size sequences of seq_length: 16GiB."""
    dims: dict[str, float] = ranged(
        of=lambda: {"hidden_size": 1.0, "ffn_hidden_size": 1.0}, above=0, mend="leave a dim out that shall stay"
    )
    """Dims that shrink to meet it, and how fast: dim = source * r ** weight. Heads shrink inside their groups."""
    tolerance: float = ranged(0.01, at_least=0, below=1)
    """A count may exceed its budget by this fraction, as a "4.5B" model has 4.51B; memory may not."""
    batch_size: int = ranged(1, at_least=1)
    seq_length: int = ranged(4096, at_least=1)
    bytes_per_value: int = ranged(2, at_least=1, at_most=8)
    """Of a weight and of a cached key or value; 2 is bf16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in COSTS if getattr(self, name) is not None]
        require(
            len(given) <= 1,
            f"budget gives {' and '.join(given)}; one model cannot be fitted to two. Leave one of them.",
        )
        for dim in self.dims:
            require(
                dim in PRUNABLE_DIMS, f"budget.dims.{dim} is not a prunable dim; {did_you_mean(dim, PRUNABLE_DIMS)}"
            )
            require(
                dim != "num_query_groups",
                "budget.dims.num_query_groups: a budget keeps the query groups, since heads must fit them. Set "
                "target.num_query_groups, and let num_attention_heads shrink.",
            )

    @property
    def cost(self) -> str | None:
        """Which of the costs is limited; None: there is no budget."""
        return next((name for name in COSTS if getattr(self, name) is not None), None)


@dataclass
class DepthChoice(Ranged):
    """How the dropped layers are chosen, where the kept ones are not named."""

    KEY: ClassVar[str] = "depth"

    metric: str | None = None
    """Depth scores to go by: block_influence, loss, kl, squared_error, accuracy or greedy, as far as they were
    estimated."""
    contiguous: bool = False
    """Drop the one block of neighbouring layers with the lowest score, instead of the layers with the lowest scores."""
    keep_first: int = ranged(0, at_least=0)
    """Layers at the beginning that are never dropped."""
    keep_last: int = ranged(0, at_least=0)
    """Layers at the end that are never dropped."""


@dataclass
class _Selecting(Ranged):
    """What chooses the neurons and heads that stay, where it refits what reads them."""

    selection: str | None = None
    """Which neurons and heads stay: those of the plan (scores), or in the same numbers those whose loss the refitted
    weight makes up for worst, found by dropping one at a time (compensated_error). Null: compensated_error, and scores
    where prune.plan names the plan to follow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.selection is None or self.selection in SELECTIONS,
            f"{self.KEY}.selection={self.selection} is not known; {did_you_mean(str(self.selection), SELECTIONS)}",
        )

    @property
    def chooses(self) -> bool:
        """Whether neurons and heads are chosen by what refitting could least make up for."""
        return self.selection != "scores"


@dataclass
class CompensationConfig(_Selecting):
    """How the weights that read cut neurons and heads are refitted."""

    KEY: ClassVar[str] = "surgery.compensation"

    layers_at_once: int = ranged(1, at_least=0)
    """Layers refitted from one calibration pass. 1: each layer sees those before it already cut, at one pass a layer;
    0: all from a single pass over the uncut model, which holds every layer's second moments at once."""
    ridge: float = ranged(1e-2, at_least=0)
    """What keeps a weight near its old value, as a fraction of its inputs' mean square. Large: plain
    selection. 0 needs more calibration tokens than inputs. 1e-2 is GPTQ's (arXiv:2210.17323)."""
    num_samples: int = ranged(256, at_least=1, mend="try 256")
    """Calibration samples of a pass, over all data-parallel ranks."""


@dataclass
class SequentialConfig(_Selecting):
    """How all that reads and writes the residual stream is refitted, student beside teacher."""

    KEY: ClassVar[str] = "surgery.sequential"

    reader_ridge: float | None = ranged(0.1, at_least=0)
    """What keeps the matrices behind a norm near plain selection, as a fraction of the mean square of what they read.
    Large: plain selection. 0 needs more calibration tokens than channels. Null: at each norm the one with which the
    held-out tokens miss least."""
    writer_ridge: float | None = ranged(0.1, at_least=0)
    """The same of linear_proj and linear_fc2, of their inputs."""
    held_out: float = ranged(0.0, at_least=0, at_most=0.5, mend="try 0.125")
    """Share of the calibration micro-batches that is not fitted: what ridges of null are chosen by, and what tells how
    well the student will do on other text."""
    num_samples: int = ranged(256, at_least=1, mend="try 256")
    """Calibration samples, over all data-parallel ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reader_ridge", "writer_ridge"):
            require(
                getattr(self, name) is not None or self.held_out > 0,
                f"{self.KEY}.{name}=null is chosen by held-out tokens, but {self.KEY}.held_out=0. Set it to 0.125, or "
                f"{self.KEY}.{name}=0.1.",
            )


@dataclass
class DepthCorrectionConfig(Ranged):
    """How the layer before dropped ones stands in for them."""

    KEY: ClassVar[str] = "surgery.depth_correction"

    method: str = "least_squares"
    """least_squares: a change of linear_fc2 of full rank; scale: one factor on it."""
    ridge: float = ranged(0.1, at_least=0)
    """What keeps least_squares small, as a fraction of the neurons' mean square."""
    num_samples: int = ranged(256, at_least=1, mend="try 256")
    """Calibration samples, over all data-parallel ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.method in DEPTH_CORRECTIONS,
            f"{self.KEY}.method={self.method} is not known; {did_you_mean(self.method, DEPTH_CORRECTIONS)}",
        )


@dataclass
class SurgeryConfig:
    """What is done to the weights beside leaving some out; an option that is not set follows `method`."""

    method: str = "minitron"
    """minitron: nothing, as in arXiv:2407.14679; calibrated: refit=sequential on the stream's principal axes, or on
    channels where embeddings are tied. With compensate, correct_depth or norm_scale=energy asked for it is refit=none,
    and all three of them."""
    basis: str | None = None
    """Hidden channels kept by their scores (channels), or the principal axes of the residual stream (rotation), which
    parts tied embeddings."""
    norm_scale: str | None = None
    """What the gammas of norms over k of h channels are multiplied by: none, size (sqrt(h/k), as if all of the stream
    were kept), or energy (that times the root of the kept share of the stream's energy, measured)."""
    compensate: bool | None = None
    """Refit the matrices that read neurons and heads to say what they said with all of them."""
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    correct_depth: bool | None = None
    """Let the layer before dropped ones stand in for them; not a layer of experts."""
    depth_correction: DepthCorrectionConfig = field(default_factory=DepthCorrectionConfig)
    refit: str | None = None
    """none, or sequential: all that reads or writes the residual stream is refitted layer by layer, to bring the
    student's stream to the teacher's; in place of compensate, correct_depth and norm_scale."""
    sequential: SequentialConfig = field(default_factory=SequentialConfig)

    def __post_init__(self) -> None:
        known: dict[str, tuple[str, ...]] = {
            "method": tuple(METHODS),
            "basis": ("channels", "rotation"),
            "norm_scale": ("none", "size", "energy"),
            "refit": REFITS,
        }
        for option, values in known.items():
            value = getattr(self, option)
            require(
                value is None or value in values,
                f"surgery.{option}={value} is not known; {did_you_mean(str(value), values)}",
            )
        beside = self._asked_beside_refit if self.refit == "sequential" else []
        require(
            not beside,
            f"surgery.{' and surgery.'.join(beside)} beside surgery.refit=sequential, which fits weights and norms "
            "itself. Leave them out, or set surgery.refit=none.",
        )

    @property
    def _asked_beside_refit(self) -> list[str]:
        """The options that were asked for, of those that a sequential refit takes the place of."""
        asked = {"compensate": self.compensate, "correct_depth": self.correct_depth}
        asked["norm_scale"] = self.norm_scale == "energy"
        return [option for option, wanted in asked.items() if wanted]

    def settled(self, source: ModelShape, target: ModelShape, *, basis: str | None = None) -> SurgeryConfig:
        """With `basis` and `refit` as they are for this cut.

        Args:
            basis: taken where nothing was said; None: channels under tied embeddings, which stay tied, and otherwise
                what the method says.
        """
        tied = source.share_embeddings_and_output_weights
        basis = self.basis or basis or ("channels" if tied else str(self.chosen("basis")))
        refit, turned_or_whole = self.chosen("refit"), basis == "rotation" or target.hidden_size == source.hidden_size
        if self.refit is None and source.normalization != "RMSNorm" and not turned_or_whole:
            refit = "none"  # a LayerNorm takes off the mean over all channels
        return replace(self, basis=basis, refit=str(refit))

    def chosen(self, option: str) -> str | bool:
        """An option, or what the method says where it is not set."""
        value: str | bool | None = getattr(self, option)
        if option == "refit" and value is None and self._asked_beside_refit:
            return "none"
        return METHODS[self.method][option] if value is None else value

    @property
    def turns(self) -> bool:
        """Whether the residual stream is turned where it is cut."""
        return self.chosen("basis") == "rotation"

    @property
    def is_sequential(self) -> bool:
        """Whether student and teacher run beside each other while weights are fitted."""
        return self.chosen("refit") == "sequential"

    @property
    def scales_norms_by(self) -> str:
        """`norm_scale`, or what a sequential refit goes by."""
        return "size" if self.is_sequential else str(self.chosen("norm_scale"))

    def needs_stream(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether the importance has to hold second moments of the stream for this cut."""
        measured = self.turns or self.scales_norms_by == "energy"
        return measured and target.hidden_size < source.hidden_size

    def compensates(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether this cut leaves something to compensate for."""
        fixed = ("hidden_size", "num_layers", "num_moe_experts")
        cut = [dim for dim in source.prunable_dims if getattr(source, dim) != getattr(target, dim) and dim not in fixed]
        return bool(self.chosen("compensate")) and bool(cut) and not self.is_sequential

    def corrects_depth(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether this cut drops layers that others stand in for."""
        wanted = self.chosen("correct_depth")
        if self.correct_depth is None and source.num_moe_experts is not None:
            wanted = False  # experts' neurons see only the tokens routed to them
        return bool(wanted) and target.num_layers < source.num_layers and not self.is_sequential

    def refits(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether this cut leaves something to refit layer by layer."""
        return self.is_sequential and any(getattr(source, dim) != getattr(target, dim) for dim in source.prunable_dims)

    def runs_model(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether this cut takes passes over calibration samples."""
        return any(fits(source, target) for fits in (self.compensates, self.corrects_depth, self.refits))

    def describe(self) -> str:
        """For a plan's origin."""
        moot = ("norm_scale", "compensate", "correct_depth") if self.is_sequential else ()
        options = ", ".join(f"{option}={self.chosen(option)}" for option in METHODS[self.method] if option not in moot)
        return f"{self.method} ({options})"
