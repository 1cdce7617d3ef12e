"""How a model is cut: the papers' way, or calibrated so that less has to be learned again."""

from __future__ import annotations

from dataclasses import dataclass, field

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.pruning.compensation import CompensationConfig
from minitron_nemo.pruning.depth_correction import DepthCorrectionConfig
from minitron_nemo.shape import ModelShape

METHODS: dict[str, dict[str, str | bool]] = {
    "minitron": {"basis": "channels", "norm_scale": "none", "compensate": False, "correct_depth": False},
    "calibrated": {"basis": "rotation", "norm_scale": "energy", "compensate": True, "correct_depth": True},
}


@dataclass
class SurgeryConfig:
    """What is done to the weights beside leaving some out; an option that is not set follows `method`."""

    method: str = "minitron"
    """minitron: nothing, as in arXiv:2407.14679; calibrated: rotation, norm_scale=energy, compensate, correct_depth."""
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

    def __post_init__(self) -> None:
        known: dict[str, tuple[str, ...]] = {
            "method": tuple(METHODS),
            "basis": ("channels", "rotation"),
            "norm_scale": ("none", "size", "energy"),
        }
        for option, values in known.items():
            value = getattr(self, option)
            require(
                value is None or value in values,
                f"prune.surgery.{option}={value} is not known; {did_you_mean(str(value), values)}",
            )

    def chosen(self, option: str) -> str | bool:
        """An option, or what the method says where it is not set."""
        value: str | bool | None = getattr(self, option)
        return METHODS[self.method][option] if value is None else value

    @property
    def turns(self) -> bool:
        """Whether the residual stream is turned where it is cut."""
        return self.chosen("basis") == "rotation"

    def needs_stream(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether the importance has to hold second moments of the stream for this cut."""
        measured = self.turns or self.chosen("norm_scale") == "energy"
        return measured and target.hidden_size < source.hidden_size

    def compensates(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether this cut leaves something to compensate for."""
        fixed = ("hidden_size", "num_layers", "num_moe_experts")
        cut = [dim for dim in source.prunable_dims if getattr(source, dim) != getattr(target, dim) and dim not in fixed]
        return bool(self.chosen("compensate")) and bool(cut)

    def corrects_depth(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether this cut drops layers that others stand in for."""
        wanted = self.chosen("correct_depth")
        if self.correct_depth is None and source.num_moe_experts is not None:
            wanted = False  # experts' neurons see only the tokens routed to them
        return bool(wanted) and target.num_layers < source.num_layers

    def runs_model(self, source: ModelShape, target: ModelShape) -> bool:
        """Whether this cut takes passes over calibration samples."""
        return self.compensates(source, target) or self.corrects_depth(source, target)

    def describe(self) -> str:
        """For a plan's origin."""
        options = ", ".join(f"{option}={self.chosen(option)}" for option in METHODS[self.method])
        return f"{self.method} ({options})"
