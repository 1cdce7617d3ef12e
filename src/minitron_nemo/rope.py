"""Rotary frequencies of a shape, llama3 scaling included.

Megatron-core fixes low_freq_factor, high_freq_factor and the original context inside RotaryEmbedding; Llama 3.2 and
others need their own, so the frequencies are computed from the shape and written into the built model.

    inverse_frequency    [rotary channels / 2]   float32, radians per token
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minitron_nemo.checks import require
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import bare_gpt

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """rotary_base ** (-2i / rotary channels), i = 0, 1, ...; wavelengths stretched as `shape.rope_scaling` says.

    llama3: wavelengths beyond original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor stay, and between them the frequency is interpolated linearly in original / wavelength.

    Returns: [rotary channels / 2] float32.
    Raises: ValueError: a rope_scaling of another type, or one that lacks a key.
    """
    channels = int(shape.kv_channels * shape.rotary_percent)
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device="cpu") / channels
    frequency = 1.0 / shape.rotary_base**exponent
    require_known_scaling(shape.rope_scaling)
    if shape.rope_scaling is None:
        return frequency
    factor, low, high, original = (float(shape.rope_scaling[key]) for key in _LLAMA3_KEYS)
    turns = original * frequency / (2 * math.pi)  # rotations within the original context
    kept_share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * (kept_share + (1 - kept_share) / factor)


def require_known_scaling(rope_scaling: dict | None) -> None:
    """ValueError unless it is None or complete llama3 scaling, as it stands in a HF config.json."""
    if rope_scaling is None:
        return
    kind = rope_scaling.get("rope_type", rope_scaling.get("type"))
    require(
        kind == "llama3",
        f"rope_scaling of type {kind!r} is not supported; supported: llama3, or none at all. "
        "Use a checkpoint without it, or set rope_scaling to null where sequences fit the original context.",
    )
    missing = [key for key in _LLAMA3_KEYS if key not in rope_scaling]
    require(not missing, f"rope_scaling lacks {', '.join(missing)}; llama3 scaling needs {', '.join(_LLAMA3_KEYS)}.")


def apply_rope_scaling(model: nn.Module, shape: ModelShape) -> None:
    """Give a built model the frequencies of its shape. May be called again: they are computed, not scaled further.

    Args:
        model: bare or wrapped GPTModel of this rank.
    """
    rotary = bare_gpt(model).rotary_pos_emb
    rotary.inv_freq = inverse_frequencies(shape).to(rotary.inv_freq.device)
    rotary.forward.cache_clear()  # Megatron-core caches the embedding of each length
