"""Hugging Face families: one row each, how `config.json` reads as a ModelShape and what the tensors are called.

A family is a name map from the axis table's parameters to HF's, and the few config keys of its own. A parameter that HF
keeps as several tensors (query, key, value; gate, up) lists them in the order its axis fuses them.

A shape that config.json cannot say is refused on export: what is written must read back as the same shape. Defaults are
those of the config classes of transformers 4.57.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minitron_nemo.axes import expert_of, layer_of, parameter_axes
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
        not config.get("rope_scaling"),
        "rope_scaling has no effect in transformers' Nemotron. Set rope_scaling to null in config.json.",
    )
    return _llama_fields(config) | {
        "normalization": "LayerNorm1p",
        "gated_linear_unit": False,
        "rotary_percent": float(config["partial_rotary_factor"]),
    }


def _nemotron_keys(shape: ModelShape) -> dict[str, Any]:
    return _llama_keys(shape) | {"partial_rotary_factor": shape.rotary_percent}


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
            read=_nemotron_fields,
            write=_nemotron_keys,
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
    _require_known_layers(config)
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
    Raises: ValueError: the family's config.json has no place for something the shape says.
    """
    family = family_of(shape.family)
    require_known_scaling(shape.rope_scaling)
    config = {
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
    for field, theirs, ours in weight_differences(shape_from_config(config), shape):
        raise ValueError(
            f"{field}={ours} has no place in a HF {family.model_type} checkpoint, which has {field}={theirs}. "
            "Export it as a family that has it."
        )
    return config


_NOT_WEIGHTS = ("seq_length", "padded_vocab_size", "init_method_std", "family")
"""ModelShape fields in which a model may differ from the checkpoint it is filled from."""


def weight_differences(theirs: ModelShape, ours: ModelShape) -> list[tuple[str, Any, Any]]:
    """(field, there, here) of what makes one model's weights mean something else in another."""
    ignored = set(_NOT_WEIGHTS)
    if not ours.has_dense_layers:
        ignored.add("ffn_hidden_size")
    if ours.add_bias_linear:
        ignored.add("add_qkv_bias")  # included
    fields = [field.name for field in dataclasses.fields(ModelShape) if field.name not in ignored]
    return [
        (name, getattr(theirs, name), getattr(ours, name))
        for name in fields
        if getattr(theirs, name) != getattr(ours, name)
    ]


def with_defaults(config: Config, family: Family) -> dict[str, Any]:
    return {**family.defaults, **config}


def _require_known_layers(config: Config) -> None:
    """ValueError where `layer_types` does not name attention for each layer."""
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is None:
        return
    require(
        len(kinds) == layers,
        f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}. "
        "Take the config.json published with the weights.",
    )
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    require(
        not unknown,
        f"layer_types has {', '.join(unknown)}; supported are full_attention and sliding_attention. "
        "Use a checkpoint of attention layers only.",
    )


def sliding_window(config: Config) -> int | None:
    """Tokens a layer with a sliding window sees, None where no layer has one; defaults filled in."""
    if not config.get("use_sliding_window", True) or "sliding_attention" not in config.get(
        "layer_types", ["sliding_attention"]
    ):
        return None
    return config.get("sliding_window")


def _rope(config: Config) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from the `rope_parameters` of later transformers."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(parameters.pop("rope_theta", config["rope_theta"]))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling = None if kind == "default" else parameters
    require_known_scaling(scaling)
    return theta, scaling
