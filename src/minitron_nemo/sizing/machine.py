"""Where a step will run, as far as its size goes: devices, their memory and speed, and which kernels are there."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_nemo.config.plan import ACCELERATORS, PlanConfig
from minitron_nemo.config.slurm import SlurmConfig

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    ranks: int
    """Of a step that runs a model."""
    ranks_per_node: int
    memory_bytes: float
    """Of one device."""
    headroom: float
    peak_flops: float
    """Of one device, a second."""
    utilisation: float
    fused: bool = True
    """Whether transformer-engine is there: fused norms, rotary embedding and activation keep less for the backward
    pass, and weight gradients go straight to the buffer of all gradients."""
    distributed_optimizer: bool = True
    """As `platform.supports_distributed_optimizer`: its state is shared out over data-parallel ranks."""

    @classmethod
    def of(cls, plan: PlanConfig, slurm: SlurmConfig) -> Machine:
        device = ACCELERATORS[plan.accelerator]
        return cls(
            ranks=slurm.nodes * slurm.processes_per_node,
            ranks_per_node=slurm.processes_per_node,
            memory_bytes=(plan.memory_gib or device.memory_gib) * GIB,
            headroom=plan.headroom,
            peak_flops=(plan.peak_tflops or device.peak_tflops) * 1e12,
            utilisation=plan.utilisation,
        )

    @property
    def room_bytes(self) -> float:
        """What a rank's tensors may take."""
        return self.memory_bytes * (1 - self.headroom)
