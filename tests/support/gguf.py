"""GGUF files of tiny transformers models, as llama.cpp's convert_hf_to_gguf.py would write them, and broken ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from transformers import PreTrainedModel

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
BOS, EOS, TOOL, PAD = "<|im_start|>", "<|im_end|>", "<tool>", "[PAD0]"
MERGES = ["Ġ Ġ", "Ċ Ċ", "1 2", "o B", "l l"]
WHOLE = "hello"
"""A token that no merges lead to."""


def byte_characters() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, in the bytes' order (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


TOKENS = [BOS, EOS, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES), WHOLE, TOOL, PAD]
_TYPES = {BOS: 3, EOS: 3, TOOL: 4, PAD: 5}
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [_TYPES.get(token, 1) for token in TOKENS],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    *,
    quantization: Kind = Kind.F32,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    architecture: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Args:
    architecture: named in the file in place of the model's.
    metadata, tensors: written beside the model's or in their place; None: left out.
    """
    config = model.config
    name = architecture or ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, name, endianess=endianess)
    values = {**_hyperparameters(config, name), **TOKENIZER, **(metadata or {})}
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    for tensor, data in {**_tensors(model), **(tensors or {})}.items():
        if data is not None:
            kind = Kind.F32 if data.ndim == 1 else quantization
            writer.add_tensor(tensor, quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama3_factors(scaling: Mapping[str, float], *, theta: float, head_dim: int) -> np.ndarray:
    """rope_freqs.weight, as the converter computes it: what each frequency is divided by."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        turns = scaling["original_max_position_embeddings"] / wavelength
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, Sequence) and not isinstance(value, str) else kinds[type(value)])(key, value)


def _hyperparameters(config: Any, name: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * getattr(config, "partial_rotary_factor", 1.0))
    epsilon = "layer_norm_epsilon" if name == "nemotron" else "layer_norm_rms_epsilon"
    values = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        f"attention.{epsilon}": getattr(config, "norm_eps", None) or config.rms_norm_eps,
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": rotated,
    }
    if config.model_type == "mixtral":
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if config.model_type == "qwen3_moe":
        values |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        values |= {"expert_feed_forward_length": config.moe_intermediate_size}
    return {f"{name}.{key}": value for key, value in values.items()}


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
"""Of llama.cpp: gguf-py/gguf/tensor_mapping.py, written out by hand."""
_EXPERT_NAMES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def _tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    config, found = model.config, {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        stem, _, kind = name.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        if ".experts." in stem:
            part = _EXPERT_NAMES[stem.rpartition(".")[2]]
            experts.setdefault(f"{layer}ffn_{part}_exps.{kind}", []).append(data)
            continue
        if config.model_type == "nemotron" and name.endswith("norm.weight"):
            data = data + 1
        if config.model_type in ("llama", "mistral", "mixtral") and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            found[f"{layer}{_NAMES[stem]}.{kind}"] = data
    found |= {name: np.stack(parts) for name, parts in experts.items()}
    scaling = getattr(config, "rope_scaling", None)
    if scaling:
        found["rope_freqs.weight"] = llama3_factors(scaling, theta=config.rope_theta, head_dim=config.head_dim)
    return found
