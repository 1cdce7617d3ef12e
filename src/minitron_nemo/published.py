"""Shapes of the papers' models, by the names that the papers give them.

    Nemotron-4 15B            arXiv:2402.16819;  Minitron 8B and 4B: arXiv:2407.14679, table of architectures
    Llama-3.1-8B              config.json on the Hugging Face hub;  its two students: arXiv:2408.11796, table 3
    Mistral-NeMo-12B          config.json on the Hugging Face hub;  its student: arXiv:2408.11796, table 3
    Mixtral-8x7B              arXiv:2401.04088, table 1, and its config.json
    Qwen3-8B                  arXiv:2505.09388, table 1, and its config.json

Rotary bases, scaling and contexts are those of the config.json files; the depth-pruned student's, which was not at
hand, are its teacher's.
"""

from __future__ import annotations

import dataclasses

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.shape import ModelShape

_LLAMA_3_1_8B = ModelShape(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    padded_vocab_size=128256,
    seq_length=131072,
    rotary_base=500000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
_MISTRAL_NEMO_12B = ModelShape(
    family="mistral",
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    padded_vocab_size=131072,
    seq_length=131072,
    rotary_base=1e6,
)
_NEMOTRON_4_15B = ModelShape(
    family="nemotron",
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    padded_vocab_size=256000,
    normalization="LayerNorm1p",
    activation="squared_relu",
    gated_linear_unit=False,
    rotary_percent=0.5,
)

_QWEN3_8B = ModelShape(
    family="qwen3",
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    padded_vocab_size=151936,
    seq_length=40960,
    layernorm_epsilon=1e-6,
    qk_layernorm=True,
    rotary_base=1e6,
)

PUBLISHED: dict[str, ModelShape] = {
    "Llama-3.1-8B": _LLAMA_3_1_8B,
    "Llama-3.1-Minitron-4B-Width": _LLAMA_3_1_8B.pruned_to(hidden_size=3072, ffn_hidden_size=9216),
    "Llama-3.1-Minitron-4B-Depth": _LLAMA_3_1_8B.pruned_to(num_layers=16),
    "Mistral-NeMo-12B": _MISTRAL_NEMO_12B,
    "MN-Minitron-8B": dataclasses.replace(
        _MISTRAL_NEMO_12B.pruned_to(hidden_size=4096, ffn_hidden_size=11520), seq_length=8192
    ),
    "Nemotron-4 15B": _NEMOTRON_4_15B,
    "Minitron 8B": _NEMOTRON_4_15B.pruned_to(hidden_size=4096, ffn_hidden_size=16384),
    "Minitron 4B": _NEMOTRON_4_15B.pruned_to(hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=24),
    "Qwen3-8B": _QWEN3_8B,
    "Mixtral-8x7B": dataclasses.replace(
        _LLAMA_3_1_8B,
        family="mixtral",
        padded_vocab_size=32000,
        seq_length=32768,
        rotary_base=1e6,
        rope_scaling=None,
        num_moe_experts=8,
        moe_router_topk=2,
    ),
}


def published_shape(name: str, *, key: str) -> ModelShape:
    """The shape of a model by its published name, in whatever case, blanks as hyphens: llama-3.1-8b, nemotron-4-15b.

    Args:
        key: the user's config key that named it.
    Raises: ValueError: no such model is known.
    """
    known = {each.lower().replace(" ", "-"): shape for each, shape in PUBLISHED.items()}
    wanted = name.lower().replace(" ", "-")
    require(wanted in known, f"{key}={name} is not known by that name; {did_you_mean(wanted, known)}")
    return known[wanted]
