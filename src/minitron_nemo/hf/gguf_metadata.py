"""The metadata of a GGUF file: what kind of file it is, and the config.json of the model in it.

Whatever is not understood is refused by name, as a key that is passed over may change what the model computes. Nothing
communicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from minitron_nemo.checks import Mistake, require
from minitron_nemo.hf.families import Config, family_of

ROPE_FREQS = "rope_freqs.weight"
_ARCHITECTURES = ("llama", "nemotron", "qwen2", "qwen3", "qwen3moe")
_READ = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window"),
    *("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length"),
}
"""Keys of an architecture that are understood; another one may change what the model computes."""
_WITHOUT_EFFECT = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}


@dataclass(frozen=True)
class GgufFile:
    """An open file: its metadata read, its tensors mapped."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]
    """Name -> gguf's ReaderTensor."""

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def number(self, key: str, default: Any = None) -> Any:
        """Value of an architecture's key, one for all layers.

        Raises: ValueError: it is missing and has no default, or layers differ in it.
        """
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        require(value is not None, f"{self.path} lacks {full}. The file is incomplete; fetch it again.")
        if isinstance(value, list):
            require(
                len(set(value)) == 1,
                f"{self.path} has another {full} in each layer ({value[:4]} ...): models whose layers differ are not "
                "supported. Use one with equal layers.",
            )
            value = value[0]
        # metadata is float32: its shortest decimal is what was meant, 1e-05 and not 9.999999747378752e-06
        return float(str(np.float32(value))) if isinstance(value, float) else value


def open_gguf(file: Path) -> GgufFile:
    """Raises: ValueError: the package is missing, the file is damaged, or it is not one whole model."""
    gguf = gguf_package(file)
    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises whatever a wrong number leads to
        raise Mistake(
            f"{file} cannot be read as GGUF ({error or type(error).__name__}). The file is damaged or cut short; "
            "fetch it again."
        ) from error
    require(
        reader.endianess == gguf.GGUFEndian.LITTLE,
        f"{file} is big-endian. Convert it with llama.cpp's gguf_convert_endian.py, or fetch the little-endian one.",
    )
    opened = GgufFile(Path(file), metadata, {tensor.name: tensor for tensor in reader.tensors})
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    require(
        kind == "model",
        f"{file} is a GGUF file of type {kind}, not a model. Give the model's own file; an adapter has to be "
        "merged into it first.",
    )
    require(
        parts <= 1,
        f"{file} is one of {parts} files. Join them first: llama-gguf-split --merge <first file> <whole file>.",
    )
    require(
        metadata.get("general.architecture") in _ARCHITECTURES,
        f"{file} has architecture {metadata.get('general.architecture')!r}; supported in GGUF: "
        f"{', '.join(_ARCHITECTURES)}. Import the Hugging Face checkpoint of a supported family instead.",
    )
    return opened


def gguf_package(file: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise Mistake(
            f"{file} is a GGUF file, and the package that reads it is not installed. Run: pip install "
            "'minitron-nemo[gguf]'"
        ) from error
    return gguf


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """config.json of the model in a file, special token ids apart.

    Raises: ValueError: it says something about the model that cannot be kept.
    """
    prefix = file.architecture + "."
    keys = {key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)}
    unknown = sorted(keys - _READ - _WITHOUT_EFFECT)
    require(
        not unknown,
        f"{file.path} sets {', '.join(prefix + key for key in unknown)}, which is not known here and may change what "
        "the model computes. Import the model's Hugging Face checkpoint instead.",
    )
    model_type = _model_type(file)
    family = family_of(model_type)
    heads, hidden = file.number("attention.head_count"), file.number("embedding_length")
    head_dim = file.number("attention.key_length", hidden // heads)
    require(
        file.number("attention.value_length", head_dim) == head_dim,
        f"{file.path} has values of another size than keys, which is not supported.",
    )
    for tensor in ("token_embd.weight", "output_norm.weight"):
        require(tensor in file.tensors, f"{file.path} has no tensor {tensor}. It holds no whole model.")
    config = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "torch_dtype": "float32",
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": file.number("feed_forward_length"),
        "num_hidden_layers": file.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": family.defaults["hidden_act"],
        "max_position_embeddings": file.number("context_length"),
        family.epsilon_key: file.number(
            "attention.layer_norm_epsilon" if model_type == "nemotron" else "attention.layer_norm_rms_epsilon"
        ),
        "rope_theta": float(file.number("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config["rope_scaling"] = _rope_scaling(file, config)
    return config | _own_keys(file, model_type, head_dim)


def _model_type(file: GgufFile) -> str:
    """`llama` in GGUF is every model with that block, of which Mixtral has experts and Mistral a window."""
    if file.architecture != "llama":
        return {"qwen3moe": "qwen3_moe"}.get(file.architecture, file.architecture)
    if file.number("expert_count", 0) > 0:
        return "mixtral"
    return "mistral" if "llama.attention.sliding_window" in file.metadata else "llama"


def _own_keys(file: GgufFile, model_type: str, head_dim: int) -> dict[str, Any]:
    """Keys that only some families have."""
    rotated = file.number("rope.dimension_count", head_dim)
    require(
        rotated == head_dim or model_type == "nemotron",
        f"{file.path} rotates {rotated} of {head_dim} channels of a head; {model_type} rotates all of them.",
    )
    window = file.metadata.get(f"{file.architecture}.attention.sliding_window")
    if model_type in ("llama", "nemotron"):
        biases = {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
        return biases | ({"partial_rotary_factor": rotated / head_dim} if model_type == "nemotron" else {})
    if model_type in ("mistral", "mixtral"):
        experts = {
            "num_local_experts": file.number("expert_count", 0),
            "num_experts_per_tok": file.number("expert_used_count", 0),
        }
        return {"sliding_window": window} | (experts if model_type == "mixtral" else {})
    keys = {"use_sliding_window": window is not None, "sliding_window": window}
    if model_type == "qwen3_moe":
        keys |= {
            "num_experts": file.number("expert_count"),
            "num_experts_per_tok": file.number("expert_used_count"),
            "moe_intermediate_size": file.number("expert_feed_forward_length"),
            "norm_topk_prob": True,  # as llama.cpp computes every qwen3moe
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return keys


def _rope_scaling(file: GgufFile, config: Config) -> dict[str, Any] | None:
    """`rope_scaling` of config.json.

    Raises: ValueError: linear, yarn or another scaling, or factors of no llama3 scaling.
    """
    # llama.cpp's defaults: a factor without a type is linear, and 0 or 1 is none
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 0.0))
    require(
        kind == "none" or (kind == "linear" and factor in (0.0, 1.0)),
        f"{file.path} has rope.scaling.type={kind} with factor {factor}; supported: none, and llama3's {ROPE_FREQS}. "
        "Use a model without it.",
    )
    if ROPE_FREQS not in file.tensors:
        return None
    factors = np.asarray(file.tensors[ROPE_FREQS].data, dtype=np.float64).reshape(-1)
    scaling = llama3_scaling(factors, theta=config["rope_theta"])
    require(
        scaling is not None,
        f"{file.path} holds {ROPE_FREQS} that no llama3 scaling gives ({len(factors)} factors up to "
        f"{factors.max():g}); other scalings of the rotary embedding are not supported.",
    )
    return scaling or None


def llama3_scaling(factors: np.ndarray, *, theta: float) -> dict[str, Any] | None:
    """The llama3 scaling by whose `factors` frequencies are divided, {} where that is none at all.

    Between the wavelengths that stay and those stretched in full, 1 / factor is a line in the turns a channel makes in
    one token. It gives original / (high - low) and low / (high - low), which is all that the frequencies depend on; low
    is 1, as in every Llama 3.

    Args:
        factors: [rotary channels / 2] float64, 1 where a wavelength stays.
    Returns: as in config.json; None where no llama3 scaling gives these factors.
    """
    if np.allclose(factors, 1.0):
        return {}
    full = factors.max()
    turns = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    between = (factors > 1 + 1e-5) & (factors < full * (1 - 1e-5))
    if between.sum() < 2:
        return None
    share = (1 / factors[between] - 1 / full) / (1 - 1 / full)
    slope, offset = np.polyfit(turns[between], share, 1)
    low, high, original = 1.0, round(1 - 1 / offset, 3), round(-slope / offset)
    kept = np.clip((original * turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / factors, kept + (1 - kept) / full, rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": float(full),
        "low_freq_factor": low,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": int(original),
    }
