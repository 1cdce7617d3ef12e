"""config.json of a Hugging Face checkpoint <-> ModelShape.

transformers 4.57 and 5.x spell some keys differently. Here a config is read from either form, refused where it has both
and they disagree, and written in both, so that either line opens the same model. A shape that config.json cannot say is
refused on export: what is written must read back as the same shape. Nothing communicates.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.checks import Mistake, NothingThere, require
from minitron_nemo.hf.families import Config, family_of
from minitron_nemo.rope import require_known_scaling
from minitron_nemo.shape import ModelShape

CONFIG = "config.json"
_ACTIVATION_OF_HF = {"silu": "silu", "gelu": "gelu", "relu2": "squared_relu"}
_HF_OF_ACTIVATION = {ours: theirs for theirs, ours in _ACTIVATION_OF_HF.items()}

# ---- reading ---------------------------------------------------------------------------------------------------------


def read_config(path: Path | str) -> dict[str, Any]:
    path = Path(path)
    require(path.is_dir(), f"{path} is not a directory. Give the directory of a HF checkpoint.", NothingThere)
    require(
        (path / CONFIG).is_file(),
        f"{path} has no {CONFIG}, so it is no HF checkpoint. Give the directory that holds it and *.safetensors.",
        NothingThere,
    )
    return read_json(path / CONFIG)


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise Mistake(f"{file} is not valid JSON ({error}). Fetch it again.") from error


def with_defaults(config: Config) -> dict[str, Any]:
    """The config under the keys of transformers 4.57, whichever line wrote it; absent keys as it assumes them.

    Raises: ValueError: no supported family, or two spellings of one key that disagree.
    """
    require(
        "text_config" not in config,
        f"model_type={config.get('model_type')!r} has a text_config: it is a vision-language model, or another one of "
        "several parts. Save its language model alone: load the whole with transformers, then "
        "model.language_model.save_pretrained(folder), with its lm_head where it has one.",
    )
    family = family_of(config.get("model_type", "none"))
    config = dict(config)
    for theirs, ours in family.renamed.items():
        if theirs in config:
            _require_agreement(ours, config.get(ours, config[theirs]), theirs, config[theirs])
            config[ours] = config.pop(theirs)
    return {**family.defaults, **config, **_flat_rope(config)}


def _flat_rope(config: Config) -> dict[str, Any]:
    """rope_theta, rope_scaling and partial_rotary_factor, as far as the config says; 5.x keeps them in one dict."""
    flat = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    if "rope_scaling" in config:
        flat |= _parts_of_rope(config["rope_scaling"] or {}, "rope_scaling")
    if not config.get("rope_parameters"):
        return flat
    parameters = _parts_of_rope(config["rope_parameters"], "rope_parameters")
    for key, value in parameters.items():
        _require_agreement(key, flat.get(key, value), f"rope_parameters' {key}", value)
    return flat | parameters


def _parts_of_rope(parameters: Config, key: str) -> dict[str, Any]:
    by_layer = sorted(name for name, value in parameters.items() if isinstance(value, dict))
    require(
        not by_layer,
        f"{key} differs by the type of layer ({', '.join(by_layer)}), as Gemma's does; one rotary base and scaling for "
        "all layers is supported. Use a checkpoint of another family.",
    )
    own = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    rest = {name: value for name, value in parameters.items() if name not in own}
    kind = rest.pop("rope_type", rest.pop("type", "default"))
    rest.pop("type", None)
    return own | {"rope_scaling": None if kind == "default" else {"rope_type": kind} | rest}


def _require_agreement(key: str, value: Any, other: str, theirs: Any) -> None:
    require(
        value == theirs,
        f"config.json has {key}={value} and {other}={theirs}. Which of them transformers goes by depends on its "
        "version: one folder, two models. Remove the wrong one.",
    )


def shape_from_config(config: Config, *, make_vocab_size_divisible_by: int = 1) -> ModelShape:
    """The ModelShape a config.json describes.

    Args:
        make_vocab_size_divisible_by: the embedding table is padded up to a multiple of it.
    Raises: ValueError: unsupported model_type, activation, rope_scaling or quantization; a missing key.
    """
    config = with_defaults(config)
    family = family_of(config["model_type"])
    for key in ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"):
        require(key in config, f"config.json lacks {key}. Take the config.json published with the weights.")
    _require_not_quantized(config.get("quantization_config"))
    activation = config["hidden_act"]
    require(
        activation in _ACTIVATION_OF_HF,
        f"hidden_act={activation!r} is not supported; supported: {', '.join(_ACTIVATION_OF_HF)}.",
    )
    _require_known_layers(config)
    require_known_scaling(config["rope_scaling"])
    rotary_percent = float(config["partial_rotary_factor"])
    require(
        rotary_percent == 1.0 or family.partial_rotary,
        f"partial_rotary_factor={rotary_percent} has no meaning in a {family.model_type} model. Remove it.",
    )
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
        "rotary_base": float(config["rope_theta"]),
        "rotary_percent": rotary_percent,
        "rope_scaling": config["rope_scaling"],
        "init_method_std": config["initializer_range"],
    }
    return ModelShape(family=family.model_type, **fields | family.read(config))


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


def _require_not_quantized(quantization: Config | None) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method", "unknown")
    mend = "Use the bf16 or fp32 checkpoint."
    if method == "fp8":
        mend = (
            "Write it once in bf16: AutoModelForCausalLM.from_pretrained(path, quantization_config="
            "FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16).save_pretrained(new_path) with transformers."
        )
    raise Mistake(
        f"config.json has a quantization_config (quant_method={method}): quantized weights cannot be pruned. {mend}"
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


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
        "dtype": str(dtype).removeprefix("torch."),
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
        **_both_forms_of_rope(shape),
        "initializer_range": shape.init_method_std,
        "tie_word_embeddings": shape.share_embeddings_and_output_weights,
        "use_cache": True,
    } | family.write(shape)
    for field, theirs, ours in weight_differences(shape_from_config(config), shape):
        raise Mistake(
            f"{field}={ours} has no place in a HF {family.model_type} checkpoint, which has {field}={theirs}. "
            "Export it as a family that has it."
        )
    return config


def _both_forms_of_rope(shape: ModelShape) -> dict[str, Any]:
    """4.57 reads the flat keys and never looks into rope_parameters; 5.x has all in it."""
    flat: dict[str, Any] = {"rope_theta": shape.rotary_base}
    if family_of(shape.family).partial_rotary:
        flat["partial_rotary_factor"] = shape.rotary_percent
    parameters = {"rope_type": "default"} | (shape.rope_scaling or {}) | flat
    return flat | {"rope_scaling": shape.rope_scaling, "rope_parameters": parameters}


# ---- comparing -------------------------------------------------------------------------------------------------------

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


def require_same_shape(
    theirs: ModelShape,
    ours: ModelShape,
    path: Path | str,
    *,
    mend: str = "Build the model from shape_from_hf of the same path.",
) -> None:
    """ValueError unless a model of shape `ours` can be filled from the checkpoint at `path`, of shape `theirs`."""
    differences = [f"{field}: {there} there, {here} here" for field, there, here in weight_differences(theirs, ours)]
    require(
        not differences,
        f"{path} is a model of another shape ({'; '.join(differences)}). {mend}",
    )
