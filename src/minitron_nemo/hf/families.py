"""Hugging Face families: one row each, what the tensors are called and which keys of `config.json` are its own.

A family is a name map from the axis table's parameters to HF's, and the few config keys of its own. A parameter that HF
keeps as several tensors (query, key, value; gate, up) lists them in the order its axis fuses them. Defaults are those
of the config classes of transformers 4.57.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_nemo.axes import parameter_axes
from minitron_nemo.checks import require
from minitron_nemo.places import expert_of, layer_of
from minitron_nemo.shape import ModelShape

Config = Mapping[str, Any]
"""config.json; where a family reads it, as `config.with_defaults` gives it."""


@dataclass(frozen=True)
class Family:
    """One HF `model_type`."""

    model_type: str
    architecture: str
    names: Mapping[str, tuple[str, ...]]
    """Axis-table parameter without `.weight` or `.bias`, `{i}` for the layer and `{e}` for the expert -> HF tensors it
    is fused from."""
    defaults: Config
    """What transformers assumes where config.json has no such key."""
    epsilon_key: str = "rms_norm_eps"
    read: Callable[[Config], dict[str, Any]] = lambda config: {}
    """ModelShape fields this family reads in its own way."""
    write: Callable[[ModelShape], dict[str, Any]] = lambda shape: {}
    """Config keys only this family has."""
    has_bias: Callable[[Config, str], bool] = lambda config, name: True
    """Whether the checkpoint holds this bias of the model; one it does not hold is zero."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Keys that transformers 5.x calls otherwise than 4.57: its name -> 4.57's."""
    partial_rotary: bool = False
    """Whether only a part of a head's channels may be turned."""

    def hf_names(self, name: str) -> tuple[str, ...]:
        """The HF tensors a full parameter is fused from.

        Raises: ValueError: the family has no such parameter.
        """
        stem, _, kind = parameter_axes(name).pattern.rpartition(".")
        require(
            stem in self.names,
            f"{name} has no place in a HF {self.model_type} checkpoint. Set family to one that has it: "
            f"{', '.join(sorted(f.model_type for f in FAMILIES.values() if stem in f.names)) or 'none does yet'}.",
        )
        indices = {"i": layer_of(name), "e": expert_of(name)}
        return tuple(f"{hf_stem.format(**indices)}.{kind}" for hf_stem in self.names[stem])


_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."

_LLAMA_NAMES = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    _LAYER + "input_layernorm": (_HF_LAYER + "input_layernorm",),
    _LAYER + "self_attention.linear_qkv": tuple(_HF_LAYER + f"self_attn.{part}_proj" for part in "qkv"),
    _LAYER + "self_attention.linear_proj": (_HF_LAYER + "self_attn.o_proj",),
    _LAYER + "pre_mlp_layernorm": (_HF_LAYER + "post_attention_layernorm",),
    _LAYER + "mlp.linear_fc1": (_HF_LAYER + "mlp.gate_proj", _HF_LAYER + "mlp.up_proj"),
    _LAYER + "mlp.linear_fc2": (_HF_LAYER + "mlp.down_proj",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
}

_NEMOTRON_NAMES = _LLAMA_NAMES | {_LAYER + "mlp.linear_fc1": (_HF_LAYER + "mlp.up_proj",)}
_QWEN3_NAMES = _LLAMA_NAMES | {
    _LAYER + "self_attention.q_layernorm": (_HF_LAYER + "self_attn.q_norm",),
    _LAYER + "self_attention.k_layernorm": (_HF_LAYER + "self_attn.k_norm",),
}
_ONE_EXPERT = _LAYER + "mlp.experts.local_experts.{e}."
_MIXTRAL_NAMES = {name: hf for name, hf in _LLAMA_NAMES.items() if ".mlp." not in name} | {
    _LAYER + "mlp.router": (_HF_LAYER + "block_sparse_moe.gate",),
    _ONE_EXPERT + "linear_fc1": tuple(_HF_LAYER + "block_sparse_moe.experts.{e}." + part for part in ("w1", "w3")),
    _ONE_EXPERT + "linear_fc2": (_HF_LAYER + "block_sparse_moe.experts.{e}.w2",),
}
_QWEN3_MOE_NAMES = _QWEN3_NAMES | {
    _LAYER + "mlp.router": (_HF_LAYER + "mlp.gate",),
    _ONE_EXPERT + "linear_fc1": tuple(_HF_LAYER + f"mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up")),
    _ONE_EXPERT + "linear_fc2": (_HF_LAYER + "mlp.experts.{e}.down_proj",),
}

_COMMON_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_DEFAULTS = _COMMON_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def _llama_fields(config: Config) -> dict[str, Any]:
    # Megatron's linears have all biases or none (query, key and value apart): what HF lacks of them becomes zeros.
    return {"add_bias_linear": bool(config["attention_bias"] or config["mlp_bias"])}


def _llama_keys(shape: ModelShape) -> dict[str, Any]:
    return {"attention_bias": shape.add_bias_linear, "mlp_bias": shape.add_bias_linear}


def _llama_has_bias(config: Config, name: str) -> bool:
    return bool(config["attention_bias" if ".self_attention." in name else "mlp_bias"])


def _mistral_keys(shape: ModelShape) -> dict[str, Any]:
    return {"sliding_window": None}  # transformers assumes 4096 where the key is absent


def _nemotron_fields(config: Config) -> dict[str, Any]:
    require(
        not config["rope_scaling"],
        "rope_scaling of a Nemotron is ignored by transformers 4.57 and applied by 5.x: one folder, two models. Set "
        "rope_scaling to null in config.json if the model was trained without; with it, it is not supported.",
    )
    return _llama_fields(config) | {
        "normalization": "LayerNorm1p",
        "gated_linear_unit": False,
    }


def _qwen2_fields(config: Config) -> dict[str, Any]:
    return {"add_qkv_bias": True}


def _qwen_keys(shape: ModelShape) -> dict[str, Any]:
    return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": shape.num_layers}


def _qwen3_fields(config: Config) -> dict[str, Any]:
    require(
        not config["attention_bias"],
        "attention_bias=true is not supported for Qwen3: no published checkpoint has it. Use one without.",
    )
    return {"qk_layernorm": True}


def _qwen3_keys(shape: ModelShape) -> dict[str, Any]:
    return _qwen_keys(shape) | {"attention_bias": False}


def _mixtral_fields(config: Config) -> dict[str, Any]:
    return {
        "num_moe_experts": config["num_local_experts"],
        "moe_ffn_hidden_size": config["intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
    }


def _mixtral_keys(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_local_experts": shape.num_moe_experts,
        "num_experts_per_tok": shape.moe_router_topk,
        "intermediate_size": shape.moe_ffn_hidden_size,
        "sliding_window": None,
    }


def _qwen3_moe_fields(config: Config) -> dict[str, Any]:
    layers, step, dense = config["num_hidden_layers"], config["decoder_sparse_step"], config["mlp_only_layers"] or []
    outside = [layer for layer in dense if not 0 <= layer < layers]
    require(
        not outside,
        f"mlp_only_layers names layers {outside}, but num_hidden_layers={layers}. "
        "Take the config.json published with the weights.",
    )
    return _qwen3_fields(config) | {
        "num_moe_experts": config["num_experts"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        "moe_layer_freq": tuple(int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)),
    }


def _qwen3_moe_keys(shape: ModelShape) -> dict[str, Any]:
    return _qwen3_keys(shape) | {
        "num_experts": shape.num_moe_experts,
        "num_local_experts": shape.num_moe_experts,
        "moe_intermediate_size": shape.moe_ffn_hidden_size,
        "num_experts_per_tok": shape.moe_router_topk,
        "norm_topk_prob": not shape.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(shape.num_layers) if not shape.has_experts(layer)],
    }


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _LLAMA_NAMES,
            _COMMON_DEFAULTS | {"max_position_embeddings": 2048},
            read=_llama_fields,
            write=_llama_keys,
            has_bias=_llama_has_bias,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _LLAMA_NAMES,
            _COMMON_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
            write=_mistral_keys,
        ),
        Family(
            "nemotron",
            "NemotronForCausalLM",
            _NEMOTRON_NAMES,
            _COMMON_DEFAULTS
            | {
                "hidden_act": "relu2",
                "norm_eps": 1e-5,
                "initializer_range": 0.0134,
                "max_position_embeddings": 4096,
                "partial_rotary_factor": 0.5,
            },
            epsilon_key="norm_eps",
            partial_rotary=True,
            read=_nemotron_fields,
            write=_llama_keys,
            has_bias=_llama_has_bias,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _LLAMA_NAMES,
            _QWEN_DEFAULTS,
            read=_qwen2_fields,
            write=_qwen_keys,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _QWEN3_NAMES,
            _QWEN_DEFAULTS | {"head_dim": 128},
            read=_qwen3_fields,
            write=_qwen3_keys,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _MIXTRAL_NAMES,
            _COMMON_DEFAULTS
            | {
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_key_value_heads": 8,
                "max_position_embeddings": 4096 * 32,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            read=_mixtral_fields,
            write=_mixtral_keys,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _QWEN3_MOE_NAMES,
            _QWEN_DEFAULTS
            | {
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": None,
            },
            read=_qwen3_moe_fields,
            write=_qwen3_moe_keys,
            renamed={"num_local_experts": "num_experts"},
        ),
    )
}


def family_of(model_type: str) -> Family:
    require(
        model_type in FAMILIES,
        f"model_type={model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
        "Convert the checkpoint to one of these, or add a row to hf/families.py.",
    )
    return FAMILIES[model_type]
