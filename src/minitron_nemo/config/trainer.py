"""How a model is spread over the ranks, in which precision and batches it runs: conf's `trainer` group.

A person writes one flat group, as in NeMo. A stage takes of it what it reads, and its manifest keeps no more:

    Layout   Precision   Batch (MicroBatch)   Recomputation   Logging

                     import-hf  estimate  prune  teacher-logits, evaluate  export-hf  training
    Layout           x          x         x      x                         x          x
    Precision        x          x         x      x                                    x
    micro_batch_size            x         x      x                                    x
    seq_length                  x                x                                    x
    the rest                                                                          x
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.identity import HOW, how
from minitron_nemo.config.ranges import Ranged, ranged

PRECISIONS = ("auto", "bf16", "fp32")
_LONGEST_TIMEOUT = 7 * 24 * 60  # minutes of a week
_RECOMPUTATION = {
    "recompute_granularity": ("full", "selective"),
    "recompute_method": ("uniform", "block"),
    "recompute_modules": ("core_attn", "mlp", "layernorm", "moe", "shared_experts"),
}


class _OfTrainer(Ranged):
    KEY: ClassVar[str] = "trainer"


@dataclass
class Layout(_OfTrainer):
    """How one model is spread over the ranks; the rest of the world is data-parallel."""

    tensor_model_parallel_size: int = ranged(1, at_least=1, how=True)
    pipeline_model_parallel_size: int = ranged(1, at_least=1, how=True)
    context_parallel_size: int = ranged(1, at_least=1, how=True)
    expert_model_parallel_size: int = ranged(1, at_least=1, how=True)
    """Ranks the experts of a mixture are shared out among, within the data-parallel ones; each expert is split over the
    tensor-parallel ranks as everything else is."""
    sequence_parallel: bool = how(False)
    distributed_timeout_minutes: float = ranged(10.0, above=0, at_most=_LONGEST_TIMEOUT, how=True)
    """How long a rank waits for others in a collective before the run ends with an error; NCCL's own is 10.
    What rank 0 does alone is waited for as long as it takes, whatever this says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "trainer.sequence_parallel=true splits what tensor parallelism leaves whole; it needs "
            "trainer.tensor_model_parallel_size of at least 2.",
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and one sample."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def distributed_timeout(self) -> timedelta:
        """Of every process group."""
        return timedelta(minutes=self.distributed_timeout_minutes)

    @property
    def sizes(self) -> dict[str, int]:
        """The parallel sizes, by the names Megatron-core's `initialize_model_parallel` knows them by."""
        return {name: getattr(self, name) for name in PARALLEL_SIZES}

    @property
    def of_model(self) -> dict[str, Any]:
        """Fields of a model's TransformerConfig, and of NeMo's strategy, that say how it is spread."""
        experts = {"expert_tensor_parallel_size": self.tensor_model_parallel_size}
        return {**self.sizes, **experts, "sequence_parallel": self.sequence_parallel}


PARALLEL_SIZES = tuple(name for name in Layout.__dataclass_fields__ if name.endswith("_parallel_size"))
"""Names of Layout's sizes; a new one is a field there and nothing else."""


@dataclass
class Precision(_OfTrainer):
    """In which numbers a model runs."""

    precision: str = "auto"
    """bf16 (float32 master weights), fp32, or auto: bf16 where the machine multiplies faster in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.precision in PRECISIONS,
            f"trainer.precision={self.precision} is not known; use one of {', '.join(PRECISIONS)}.",
        )


@dataclass
class MicroBatch(_OfTrainer):
    """What one forward pass reads of a rank's samples."""

    micro_batch_size: int = ranged(1, at_least=1, how=True)
    """Samples per rank and forward pass."""


@dataclass
class Batch(MicroBatch):
    """What one forward pass reads."""

    seq_length: int = ranged(4096, at_least=1)
    """Tokens per sample."""


@dataclass
class Recomputation(_OfTrainer):
    """Activations of the trained model that backward forms again instead of keeping them."""

    recompute_granularity: str | None = how(None)
    """full (whole layers), selective (recompute_modules of each layer), or null. A frozen teacher keeps none in any
    case."""
    recompute_method: str = how("uniform")
    """Of full: uniform (each recompute_num_layers layers keep their input only) or block (the first
    recompute_num_layers of each pipeline stage do)."""
    recompute_num_layers: int = ranged(1, at_least=1, how=True)
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"], metadata=HOW)
    """Of selective: core_attn, mlp, layernorm, moe, shared_experts, as in Megatron-core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in _RECOMPUTATION.items():
            value = getattr(self, name)
            for each in value if isinstance(value, list) else [] if value is None else [value]:
                require(each in known, f"trainer.{name}={each} is not known; {did_you_mean(each, known)}")

    @property
    def recomputation(self) -> dict[str, Any]:
        """Fields of the trained model's TransformerConfig."""
        if self.recompute_granularity is None:
            return {}
        full = self.recompute_granularity == "full"
        names = ["recompute_method", "recompute_num_layers"] if full else ["recompute_modules"]
        return {name: getattr(self, name) for name in ["recompute_granularity", *names]}


@dataclass
class Logging(_OfTrainer):
    """Where a training run's numbers go."""

    tensorboard: bool = how(True)
    wandb_project: str | None = how(None)
    """Weights & Biases project; null logs nothing there."""
    peak_tflops: float | None = ranged(None, above=0, how=True, mend="e.g. 989 for an H100 in bf16; null if not known")
    """Of one device in the run's precision, for model FLOPs utilisation; null: what is known of its name."""


@dataclass
class Loading(Layout, Precision):
    """What a stage reads that loads a model and runs no samples through it."""


@dataclass
class Calibrating(Loading, MicroBatch):
    """What a stage reads that runs samples of a length that is already said."""


@dataclass
class Passing(Loading, Batch):
    """What a stage reads that runs samples through a model."""


@dataclass
class TrainerConfig(Passing, Recomputation, Logging):
    """What a stage reads that trains; the whole of a recipe's `trainer`."""

    global_batch_size: int = ranged(768, at_least=1)
    """Samples per optimizer step over all ranks. 768 in arXiv:2408.11796."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length
