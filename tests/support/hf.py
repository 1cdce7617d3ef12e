"""Tiny random transformers models: saved, run, and read back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4]])
ATOL = 1e-4  # float32, logits of order 1: two implementations add in different orders

DIMS: dict[str, Any] = {
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,  # 6 x 8 = 48 is not the hidden size
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
"""Of a config, with odd and unequal sizes."""

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,  # none of the values that Megatron-core fixes
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}


def hf_model(config: PretrainedConfig, path: Path, **save: Any) -> PreTrainedModel:
    """A random transformers model, saved to `path`; biases and norms drawn too, as fresh ones are zeros and ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path, **save)
    return model


def load_with_transformers(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def hf_logits(model: PreTrainedModel) -> Tensor:
    """[b, s, v] of TOKENS."""
    with torch.no_grad():
        return model(TOKENS).logits


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
