"""config.json of a Hugging Face checkpoint <-> ModelShape.

A shape that config.json cannot say is refused on export: what is written must read back as the same shape. Nothing
communicates.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.checks import Mistake, NothingThere, require
from minitron_nemo.hf.families import Config, family_of
from minitron_nemo.rope import require_known_scaling
from minitron_nemo.shape import ModelShape

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_ACTIVATION_OF_HF = {"silu": "silu", "gelu": "gelu", "relu2": "squared_relu"}
_HF_OF_ACTIVATION = {ours: theirs for theirs, ours in _ACTIVATION_OF_HF.items()}

# ---- reading ---------------------------------------------------------------------------------------------------------


def shape_from_hf(path: Path | str, *, make_vocab_size_divisible_by: int = 1) -> ModelShape:
    """The ModelShape of a HF checkpoint directory, from its config.json.

    `sliding_window` is not part of it: attention here sees the whole sequence, which is the same model up to that
    length; a window shorter than the context is reported in the log.

    Args:
        make_vocab_size_divisible_by: pad the embedding table up to a multiple of it, so that it splits over tp.
    Raises: FileNotFoundError: no such directory or no config.json. ValueError: what this project cannot represent.
    """
    config = read_config(path)
    shape = shape_from_config(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    window = sliding_window(family_of(shape.family).with_defaults(config))
    if window is not None and window < shape.seq_length:
        logger.warning(
            "%s: sliding_window=%s is ignored: attention is over the whole sequence. The model is the same for "
            "sequences of up to %s tokens; train and export within that length.",
            path,
            window,
            window,
        )
    return shape


def vocab_size_from_hf(path: Path | str) -> int:
    """Rows of the checkpoint's embedding table, which may be fewer than `padded_vocab_size`."""
    return int(read_config(path)["vocab_size"])


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
    config = family.with_defaults(config)
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
        raise Mistake(
            f"{field}={ours} has no place in a HF {family.model_type} checkpoint, which has {field}={theirs}. "
            "Export it as a family that has it."
        )
    return config


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
