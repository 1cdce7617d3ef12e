"""Where we run: on accelerators as Megatron-core expects, or on CPU through one small, reversible adaptation.

`activate()` is called once at the start of every door (CLI, launch scripts, test workers). With an accelerator it does
nothing. Without one it makes Megatron-core and NeMo run on CPU over gloo; nothing else in the project asks which.
"""

from __future__ import annotations

import torch

from minitron_nemo.platform import cpu
from minitron_nemo.platform.precision import true_float32

__all__ = [
    "activate",
    "backend",
    "deactivate",
    "default_precision",
    "device",
    "device_name",
    "dtype_of",
    "has_accelerator",
    "has_transformer_engine",
    "supports_distributed_optimizer",
    "transformer_config_overrides",
    "true_float32",
]


def has_accelerator() -> bool:
    return torch.cuda.device_count() > 0


def activate() -> None:
    """Switch the CPU adaptation on where there is no accelerator. Idempotent."""
    if not has_accelerator():
        cpu.activate()


def deactivate() -> None:
    """Take back everything `activate` did. Idempotent."""
    cpu.deactivate()


def backend() -> str:
    """torch.distributed backend of this machine."""
    return "nccl" if has_accelerator() else "gloo"


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else torch.device("cpu")


def device_name() -> str:
    """What `device` is called by those who made it; `cpu` otherwise."""
    return torch.cuda.get_device_name() if has_accelerator() else "cpu"


def has_transformer_engine() -> bool:
    """Transformer-engine layer specs and fused kernels are used where they can run."""
    if not has_accelerator():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401  (importable means usable)
    except ImportError:
        return False
    return True


def default_precision() -> str:
    """`bf16` where matrices multiply faster in it (accelerators, CPUs with AMX tiles), else `fp32`."""
    return "bf16" if has_accelerator() or torch.cpu._is_amx_tile_supported() else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """Of `trainer.precision`: bf16, fp32, or auto, which is `default_precision`."""
    named = default_precision() if precision == "auto" else precision
    return torch.bfloat16 if named == "bf16" else torch.float32


def transformer_config_overrides(*, plain: bool = False) -> dict[str, bool]:
    """Fields of Megatron's TransformerConfig this machine needs: fused kernels are off where they are not installed.

    Args:
        plain: they are off here too.
    """
    if has_transformer_engine() and not plain:
        return {}
    unfused = {
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    return unfused | {"use_cpu_initialization": not has_accelerator()}


def supports_distributed_optimizer() -> bool:
    """Megatron's distributed optimizer trains over gloo, but saving it trips on a 0-dim state; not on CPU, then."""
    return has_accelerator()
