"""Hugging Face families: one row each, how `config.json` reads as a ModelShape and what the tensors are called.

A family is a name map from the axis table's parameters to HF's, and the few config keys of its own. A parameter that HF
keeps as several tensors (query, key, value; gate, up) lists them in the order its axis fuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minitron_nemo.axes import layer_of, parameter_axes
from minitron_nemo.checks import require
from minitron_nemo.rope import require_known_scaling
from minitron_nemo.shape import ModelShape

Config = Mapping[str, Any]
"""config.json, defaults of the family filled in."""


@dataclass(frozen=True)
class Family:
    """One HF `model_type`."""

    model_type: str
    architecture: str
    names: Mapping[str, tuple[str, ...]]
    """Axis-table parameter without `.weight` or `.bias`, `{i}` for the layer -> HF tensors it is fused from."""
    defaults: Config
    """What transformers assumes where config.json has no such key."""
    epsilon_key: str = "rms_norm_eps"
    read: Callable[[Config], dict[str, Any]] = lambda config: {}
    """ModelShape fields this family reads in its own way."""
    write: Callable[[ModelShape], dict[str, Any]] = lambda shape: {}
    """Config keys only this family has."""
    has_bias: Callable[[Config, str], bool] = lambda config, name: True
    """Whether the checkpoint holds this bias of the model; one it does not hold is zero."""

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
        return tuple(f"{hf_stem.format(i=layer_of(name))}.{kind}" for hf_stem in self.names[stem])


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

_COMMON_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def _llama_fields(config: Config) -> dict[str, Any]:
    # Megatron's linears have all biases or none (query, key and value apart): what HF lacks of them becomes zeros.
    return {"add_bias_linear": bool(config["attention_bias"] or config["mlp_bias"])}


def _llama_keys(shape: ModelShape) -> dict[str, Any]:
    _no_lone_qkv_bias(shape)
    return {"attention_bias": shape.add_bias_linear, "mlp_bias": shape.add_bias_linear}


def _llama_has_bias(config: Config, name: str) -> bool:
    return bool(config["attention_bias" if ".self_attention." in name else "mlp_bias"])


def _mistral_keys(shape: ModelShape) -> dict[str, Any]:
    _no_lone_qkv_bias(shape)
    require(
        not shape.add_bias_linear,
        "add_bias_linear=true has no place in a HF mistral checkpoint. Export it as family=llama.",
    )
    return {"sliding_window": None}  # transformers assumes 4096 where the key is absent


def _no_lone_qkv_bias(shape: ModelShape) -> None:
    require(
        not shape.add_qkv_bias or shape.add_bias_linear,
        f"add_qkv_bias=true without add_bias_linear has no place in a HF {shape.family} checkpoint.",
    )


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
    )
}

_ACTIVATION_OF_HF = {"silu": "silu", "gelu": "gelu", "relu2": "squared_relu"}
_HF_OF_ACTIVATION = {ours: theirs for theirs, ours in _ACTIVATION_OF_HF.items()}


def family_of(model_type: str) -> Family:
    require(
        model_type in FAMILIES,
        f"model_type={model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
        "Convert the checkpoint to one of these, or add a row to engine/hf_families.py.",
    )
    return FAMILIES[model_type]


def shape_from_config(config: Config, *, make_vocab_size_divisible_by: int = 1) -> ModelShape:
    """The ModelShape a config.json describes.

    Args:
        make_vocab_size_divisible_by: the embedding table is padded up to a multiple of it.
    Raises: ValueError: unsupported model_type, activation, rope_scaling or quantization; a missing key.
    """
    family = family_of(config.get("model_type", "none"))
    for key in ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"):
        require(key in config, f"config.json lacks {key}. Take the config.json published with the weights.")
    require(
        config.get("quantization_config") is None,
        "config.json has a quantization_config: quantized weights cannot be pruned. Use the bf16 or fp32 checkpoint.",
    )
    config = with_defaults(config, family)
    activation = config["hidden_act"]
    require(
        activation in _ACTIVATION_OF_HF,
        f"hidden_act={activation!r} is not supported; supported: {', '.join(_ACTIVATION_OF_HF)}.",
    )
    theta, scaling = _rope(config)
    heads, multiple = config["num_attention_heads"], make_vocab_size_divisible_by
    fields: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "padded_vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config[family.epsilon_key],
        "activation": _ACTIVATION_OF_HF[activation],
        "share_embeddings_and_output_weights": bool(config["tie_word_embeddings"]),
        "rotary_base": theta,
        "rope_scaling": scaling,
        "init_method_std": config["initializer_range"],
    }
    return ModelShape(family=family.model_type, **fields | family.read(config))


def hf_config(
    shape: ModelShape, *, vocab_size: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """config.json of a shape; `head_dim` is always written, as it need not be hidden_size / num_attention_heads.

    Args:
        vocab_size: rows of the exported embedding table; None: `shape.padded_vocab_size`.
        dtype: of the exported tensors.
    """
    family = family_of(shape.family)
    require_known_scaling(shape.rope_scaling)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size or shape.padded_vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "hidden_act": _HF_OF_ACTIVATION[shape.activation],
        "max_position_embeddings": shape.seq_length,
        family.epsilon_key: shape.layernorm_epsilon,
        "rope_theta": shape.rotary_base,
        "rope_scaling": shape.rope_scaling,
        "initializer_range": shape.init_method_std,
        "tie_word_embeddings": shape.share_embeddings_and_output_weights,
        "use_cache": True,
    } | family.write(shape)


def with_defaults(config: Config, family: Family) -> dict[str, Any]:
    return {**family.defaults, **config}


def _rope(config: Config) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from the `rope_parameters` of later transformers."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(parameters.pop("rope_theta", config["rope_theta"]))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling = None if kind == "default" else parameters
    require_known_scaling(scaling)
    return theta, scaling
