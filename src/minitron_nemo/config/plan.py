"""On which accelerators a recipe is planned, and how busy they are thought to be: conf's `plan` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.ranges import Ranged, ranged


class Accelerator(NamedTuple):
    """What one device has."""

    memory_gib: float
    """The least that torch names as "total capacity" in published out-of-memory messages (looked up on 2026-11-30); a
    data sheet's "80 GB" are a little more."""
    peak_tflops: float
    """Dense bf16 products, from NVIDIA's data sheets, as in platform/peak.py."""


ACCELERATORS = {
    "a100": Accelerator(79.1, 312.0),  # SXM, 80 GB
    "h100": Accelerator(79.1, 989.4),  # SXM, 80 GB
    "h200": Accelerator(139.7, 989.4),  # SXM, 141 GB
    "b200": Accelerator(178.3, 2250.0),  # SXM, 180 GB
}


@dataclass
class PlanConfig(Ranged):
    """What `minitron plan` reckons with. Its nodes and ranks are those of `slurm`."""

    KEY: ClassVar[str] = "plan"

    teacher: str | None = None
    """Published name of the teacher (llama-3.1-8b), whose shape counts where import_hf.model is not on this machine."""
    accelerator: str = "h100"
    """a100, h100, h200 or b200: memory and peak that the two below do not give."""
    memory_gib: float | None = ranged(None, above=0)
    """Memory of one device, in GiB; null: the accelerator's."""
    peak_tflops: float | None = ranged(None, above=0)
    """Of one device in bf16; null: the accelerator's."""
    headroom: float = ranged(0.1, at_least=0, below=1)
    """Share of the memory that is left to what is not reckoned: the context of CUDA, NCCL's buffers, fragmentation."""
    utilisation: float = ranged(0.4, above=0, at_most=1)
    """Share of the peak that the products of a pass reach while no pipeline stage waits, recomputed ones included.
    Llama 3 was trained at 0.38 to 0.43 on H100s (arXiv:2407.21783, table 4)."""
    output: str | None = None
    """JSON file of all that is reckoned; null: none is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.accelerator in ACCELERATORS,
            f"plan.accelerator={self.accelerator} is not known; {did_you_mean(self.accelerator, ACCELERATORS)} Another "
            "one is plan.memory_gib and plan.peak_tflops.",
        )
