"""Which shapes a search looks at, what they may cost, and what finding the best one may: conf's `search` groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from minitron_nemo.checks import require
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.config.identity import how
from minitron_nemo.config.pruning import DepthChoice, SurgeryConfig
from minitron_nemo.config.ranges import SEEDS, Ranged, ranged
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import TrainingConfig

BANDS = ("parameters", "non_embedding_parameters", "active_parameters", "flops_per_token", "memory")
"""Costs that follow from the dims alone."""

TIMED = ("time_to_first_token", "time_per_output_token", "throughput")
"""Costs that are measured on the machine at hand, see search/latency.py."""


@dataclass
class ConstraintsConfig(Ranged):
    """What every candidate keeps to; those that are not set ask for nothing, all others hold together.

    A cost is a band: `at most` as 4.5B (or a share of the model's own, 0.6), or [from, to] of two such values, of which
    either may be null.
    """

    KEY: ClassVar[str] = "constraints"

    parameters: Any = None
    """All parameters, embeddings included."""
    non_embedding_parameters: Any = None
    """Parameters of layers and final norm, as the papers count them."""
    active_parameters: Any = None
    """Parameters one token meets: all but the experts it is not routed to."""
    flops_per_token: Any = None
    """Matrix-multiply FLOPs of one token's forward pass at seq_length."""
    memory: Any = None
    """Bytes of all weights and of the key-value cache of batch_size sequences of seq_length: 16GiB."""
    time_to_first_token: Any = None
    """Of batch_size prompts of seq_length tokens at once, measured here: 80ms, or a share of the model's own."""
    time_per_output_token: Any = None
    """Of batch_size sequences with seq_length tokens in their cache, measured here: 12ms."""
    throughput: Any = None
    """Tokens per second of all batch_size sequences as they are generated, measured here; one value is the least."""
    batch_size: int = ranged(1, at_least=1)
    seq_length: int = ranged(4096, at_least=1)
    bytes_per_value: int = ranged(2, at_least=1, at_most=8)
    """Of a weight and of a cached key or value; 2 is bf16."""
    tensor_parallel: int = ranged(1, at_least=1)
    """Heads, query groups and neurons split over so many ranks."""
    multiple_of: dict[str, int] = ranged(of=dict, at_least=1)
    """Dims that must be multiples, as tensor cores (16 and more) or llama.cpp's K-quants (256) like them."""
    opens: bool = True
    """Whether transformers must open the shape under the model's family."""
    predicates: list[str] = field(default_factory=list)
    """Functions of yours, as `package.module.function`: called with a ModelShape, true where it may stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*BANDS, *TIMED):
            value = getattr(self, name)
            pair = isinstance(value, list | tuple)
            require(
                value is None or (pair and len(value) == 2) or isinstance(value, str | int | float),
                f"constraints.{name}={value} must be one value, such as 4.5B or 0.6 of the model's, or [from, to].",
            )


@dataclass
class PricingConfig(Ranged):
    """What a candidate is expected to lose, before anything is trained."""

    KEY: ClassVar[str] = "pricing"

    points: int = ranged(3, at_least=1)
    """Sizes of each dim that are cut and measured alone; between them the loss is interpolated."""
    num_samples: int = ranged(16, at_least=1)
    """Held-out samples of each measurement, over all data-parallel ranks; of every candidate the same."""
    measured: int = ranged(24, at_least=1)
    """Candidates of the lowest price that are cut as they are, and measured."""


@dataclass
class HalvingConfig(Ranged):
    """Few tokens for many candidates, more for few (arXiv:2502.07780)."""

    KEY: ClassVar[str] = "halving"

    survivors: int = ranged(8, at_least=1)
    """Measured candidates that are distilled, those of the lowest loss after the cut."""
    rungs: list[int] = ranged(of=list, at_least=1)
    """Steps after which candidates are compared; the last is training.steps. Empty: an eighth, a quarter, a half and
    all of the steps."""
    keep: float = ranged(0.34, above=0, at_most=1)
    """Share of a rung's candidates that goes on."""
    never_before: int = ranged(0, at_least=0)
    """Step before which nobody is left out; in arXiv:2407.14679, figure 9, ranks settle near step 300 of 400."""
    max_tokens: str | None = None
    """What all candidates together may be distilled on, such as 50M; null: what rungs and survivors come to."""


@dataclass
class SearchConfig(Ranged):
    model: str = ""
    """Model artifact to cut; the corrected teacher, which teaches the candidates too."""
    importance: str = ""
    """estimate-importance artifact of a model of the same shape."""
    parameters: Any = None
    """Size of the student, 4.5B or a share of the model's such as 0.6; the same as constraints.parameters with
    tolerance on either side."""
    tolerance: float = ranged(0.05, at_least=0, below=1)
    space: dict[str, Any] = field(default_factory=dict)
    """Dim -> its sizes: a list, or {from, to, step} or {from, to, multiple_of}; ffn_expansion stands for
    ffn_hidden_size as so many times hidden_size. Empty: hidden and ffn sizes from half the model's on, and heads."""
    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)
    pricing: PricingConfig = field(default_factory=PricingConfig)
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    depth: DepthChoice = field(default_factory=DepthChoice)
    """Which layers go, where space has num_layers."""
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    """How every candidate is cut, as prune.surgery."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str = how("runs/search")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.parameters is None or self.constraints.parameters is None,
            "search.parameters and search.constraints.parameters both limit the parameters. Leave one of them out.",
        )

    @property
    def has_target(self) -> bool:
        """Whether it says how small the student shall be."""
        limits = any(getattr(self.constraints, name) is not None for name in (*BANDS, *TIMED))
        return bool(self.space) or self.parameters is not None or limits
