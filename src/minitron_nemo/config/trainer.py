"""How a model is spread over the ranks, in which precision and batches it runs: conf's `trainer` group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minitron_nemo.checks import did_you_mean, require

PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
PRECISIONS = ("auto", "bf16", "fp32")
_RECOMPUTATION = {
    "recompute_granularity": ("full", "selective"),
    "recompute_method": ("uniform", "block"),
    "recompute_modules": ("core_attn", "mlp", "layernorm", "moe", "shared_experts"),
}


@dataclass
class LayoutConfig:
    """How one model is spread over the ranks; the rest of the world is data-parallel."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    """Ranks the experts of a mixture are shared out among, within the data-parallel ones; each expert is split over the
    tensor-parallel ranks as everything else is."""
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in PARALLEL_SIZES:
            value = getattr(self, name)
            require(value >= 1, f"trainer.{name}={value} must be at least 1.")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "trainer.sequence_parallel=true splits what tensor parallelism leaves whole; it needs "
            "trainer.tensor_model_parallel_size of at least 2.",
        )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class TrainerConfig(LayoutConfig):
    """What every stage of a recipe shares: layout, precision, batch, logging."""

    precision: str = "auto"
    """bf16 (float32 master weights), fp32, or auto: bf16 where the machine multiplies faster in it."""
    seq_length: int = 4096
    """Tokens per sample."""
    micro_batch_size: int = 1
    """Samples per rank and forward pass."""
    global_batch_size: int = 768
    """Samples per optimizer step over all ranks. 768 in arXiv:2408.11796."""
    num_nodes: int = 1
    recompute_granularity: str | None = None
    """Activations of the trained model that backward forms again instead of keeping them: full (whole layers),
    selective (recompute_modules of each layer), or null. A frozen teacher keeps none in any case."""
    recompute_method: str = "uniform"
    """Of full: uniform (each recompute_num_layers layers keep their input only) or block (the first
    recompute_num_layers of each pipeline stage do)."""
    recompute_num_layers: int = 1
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Of selective: core_attn, mlp, layernorm, moe, shared_experts, as in Megatron-core."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Weights & Biases project; null logs nothing there."""
    peak_tflops: float | None = None
    """Of one device in the run's precision, above 0, for model FLOPs utilisation; null: what is known of its name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.precision in PRECISIONS,
            f"trainer.precision={self.precision} is not known; use one of {', '.join(PRECISIONS)}.",
        )
        for name, known in _RECOMPUTATION.items():
            value = getattr(self, name)
            for each in value if isinstance(value, list) else [] if value is None else [value]:
                require(each in known, f"trainer.{name}={each} is not known; {did_you_mean(each, known)}")
        for name in ("seq_length", "micro_batch_size", "global_batch_size", "num_nodes", "recompute_num_layers"):
            require(getattr(self, name) >= 1, f"trainer.{name}={getattr(self, name)} must be at least 1.")
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"trainer.peak_tflops={self.peak_tflops} must be above 0, e.g. 989 for an H100 in bf16; null if not known.",
        )

    @property
    def recomputation(self) -> dict[str, Any]:
        """Fields of the trained model's TransformerConfig."""
        if self.recompute_granularity is None:
            return {}
        full = self.recompute_granularity == "full"
        names = ["recompute_method", "recompute_num_layers"] if full else ["recompute_modules"]
        return {name: getattr(self, name) for name in ["recompute_granularity", *names]}

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length
