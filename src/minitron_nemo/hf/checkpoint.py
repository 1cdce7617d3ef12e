"""Weights from and to Hugging Face checkpoints, one tensor at a time.

    config.json           <->  ModelShape                             hf_families.py
    *.safetensors shards  <->  full parameters of the axis table      the family's name map; axes fuse and unfuse
    full parameters       <->  Megatron-core model on any layout      weights.py

Only safetensors are read and written, never pickles; transformers is not needed. The embedding table may be larger here
(`padded_vocab_size`) than in the checkpoint (`vocab_size`): padding rows are zero on import and dropped on export.

Communication: importing none, every rank reads what it holds; exporting gathers over tp and pp, global rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_nemo.axes import Named, full_shape, parameter_axes, parameter_names
from minitron_nemo.checks import require
from minitron_nemo.hf.families import (
    Config,
    Family,
    family_of,
    hf_config,
    shape_from_config,
    sliding_window,
    weight_differences,
    with_defaults,
)
from minitron_nemo.hf.safetensors_stream import INDEX, SINGLE, Planned, ShardWriter, StoredTensor, read_header
from minitron_nemo.parallel import Groups
from minitron_nemo.rope import apply_rope_scaling
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import load_full_parameters, stream_full_parameters

__all__ = ["apply_rope_scaling", "hf_config", "load_hf", "save_hf", "shape_from_hf", "vocab_size_from_hf"]

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

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
    window = sliding_window(with_defaults(config, family_of(shape.family)))
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


def load_hf(model: nn.Module, path: Path | str, shape: ModelShape, groups: Groups) -> None:
    """Fill a model from a HF checkpoint; parameters keep the model's dtype.

    Args:
        model: bare or wrapped GPTModel of this rank, built from `shape`.
        path: directory with config.json and safetensors.
        shape: as from `shape_from_hf`; context length and vocabulary padding may differ.
    Communicates: nothing; a rank reads the tensors it holds a part of, one at a time.
    Raises: FileNotFoundError: a file is missing. ValueError: the checkpoint is of another shape, lacks a tensor, is in
        pickles only, or is damaged.
    """
    config = read_config(path)
    family = family_of(config.get("model_type", "none"))
    require_same_shape(shape_from_config(config), shape, path)
    config = with_defaults(config, family)
    require(
        config["vocab_size"] <= shape.padded_vocab_size,
        f"{path} has vocab_size={config['vocab_size']}, more than padded_vocab_size={shape.padded_vocab_size}. "
        f"Build the model with at least {config['vocab_size']}.",
    )
    checkpoint = Checkpoint(Path(path))

    def read(name: str) -> Tensor:
        axis = parameter_axes(name).axes[0]
        if not is_held(name, family, config):
            return torch.zeros(full_shape(name, shape))
        sources = hf_tensors(name, shape, family, config["vocab_size"])
        parts = [checkpoint.find(hf_name, sizes).read() for hf_name, sizes in sources]
        full = axis.fuse(parts, shape)
        if axis == Named("vocab"):
            padding = shape.padded_vocab_size - full.shape[0]
            full = nn.functional.pad(full, (0, 0, 0, padding)) if padding else full
        return full

    load_full_parameters(model, shape, groups, read)


class Checkpoint:
    """safetensors of a directory: a single file, or shards with their index; the headers of all are read and checked.

    Raises: FileNotFoundError: no weights, or a shard is missing. ValueError: pickles only, or a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / INDEX).is_file():
            file_of: dict[str, str] = read_json(path / INDEX)["weight_map"]
            held = {file: self._header(file) for file in sorted(set(file_of.values()))}
            self.tensors = {name: held[file][name] for name, file in file_of.items() if name in held[file]}
        elif (path / SINGLE).is_file():
            self.tensors = self._header(SINGLE)
        else:
            pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in path.glob(ending))
            require(
                not pickles,
                f"{path} holds weights only as pickles ({', '.join(pickles[:3])}), which can run code when loaded and "
                "are never read here. Convert it once to safetensors: AutoModelForCausalLM.from_pretrained(path)"
                ".save_pretrained(new_path, safe_serialization=True) with transformers.",
            )
            raise FileNotFoundError(
                f"{path} has neither {SINGLE} nor {INDEX}. Point at a checkpoint directory with its weights."
            )

    def find(self, name: str, sizes: tuple[int, ...]) -> StoredTensor:
        """A tensor of these sizes and a floating dtype, not read yet."""
        require(
            name in self.tensors,
            f"{self.path} has no tensor {name}, which its config.json calls for. The download is incomplete or "
            "config.json belongs to another model; fetch the checkpoint again.",
        )
        found = self.tensors[name]
        require(
            found.shape == sizes,
            f"{name} in {self.path} has shape {list(found.shape)} where config.json calls for {list(sizes)}. "
            "Take config.json and weights of the same model.",
        )
        require(
            found.dtype.is_floating_point and found.dtype.itemsize > 1,
            f"{name} in {self.path} has dtype {found.dtype}: quantized weights cannot be pruned. "
            "Use the bf16 or fp32 checkpoint.",
        )
        return found

    def _header(self, file: str) -> dict[str, StoredTensor]:
        require(
            (self.path / file).is_file(),
            f"{self.path} lacks the shard {file} that its index names. Fetch the missing file.",
            FileNotFoundError,
        )
        return read_header(self.path / file)


def read_config(path: Path | str) -> dict[str, Any]:
    path = Path(path)
    require(path.is_dir(), f"{path} is not a directory. Give the directory of a HF checkpoint.", FileNotFoundError)
    require(
        (path / CONFIG).is_file(),
        f"{path} has no {CONFIG}, so it is no HF checkpoint. Give the directory that holds it and *.safetensors.",
        FileNotFoundError,
    )
    return read_json(path / CONFIG)


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Fetch it again.") from error


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


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_hf(
    model: nn.Module,
    path: Path | str,
    shape: ModelShape,
    groups: Groups,
    *,
    vocab_size: int | None = None,
    tokenizer_dir: Path | str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model as a HF checkpoint that transformers loads as it is.

    Args:
        model: bare or wrapped GPTModel of this rank.
        path: directory, made if need be; it must not hold safetensors yet.
        vocab_size: rows of the embedding table to keep, the rest being padding; None: all.
        tokenizer_dir: HF tokenizer files to copy beside the weights; its bos, eos and pad tokens go to config.json.
        dtype: of the tensors written; None: the model's own.
        max_shard_bytes: size of a file; a larger tensor gets a file of its own.
    Every rank calls this; global rank 0 writes.
    Communicates: tp and pp, as `stream_full_parameters`.
    Raises: ValueError: a shape this family cannot hold, or vocab_size out of range. FileExistsError, FileNotFoundError.
    """
    path, family = Path(path), family_of(shape.family)
    vocab_size = vocab_size or shape.padded_vocab_size
    require(
        0 < vocab_size <= shape.padded_vocab_size,
        f"vocab_size={vocab_size} is more than the padded_vocab_size={shape.padded_vocab_size} rows the model has.",
    )
    dtype = dtype or next(model.parameters()).dtype
    config = hf_config(shape, vocab_size=vocab_size, dtype=dtype)
    tensors = {name: hf_tensors(name, shape, family, vocab_size) for name in parameter_names(shape)}
    if tokenizer_dir is not None:
        config |= _special_tokens(Path(tokenizer_dir))
    require(
        not any(path.glob("*.safetensors")),
        f"{path} already holds safetensors. Choose a new directory, or remove the old files.",
        FileExistsError,
    )
    if dist.is_initialized():
        dist.barrier()  # all have looked before rank 0 starts to write
    planned = {hf_name: Planned(dtype, sizes) for parts in tensors.values() for hf_name, sizes in parts}
    writer = ShardWriter(path, planned, max_shard_bytes) if _is_writer() else None
    for name, full in stream_full_parameters(model, shape, groups):
        if writer is not None:
            axis = parameter_axes(name).axes[0]
            rows = full[:vocab_size] if axis == Named("vocab") else full
            for (hf_name, _), tensor in zip(tensors[name], axis.unfuse(rows, shape), strict=True):
                writer.append(hf_name, tensor.to("cpu", dtype))
    if writer is not None:
        writer.finish()
        (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer_dir is not None:
            for file in _tokenizer_files(Path(tokenizer_dir)):
                shutil.copy2(file, path / file.name)


def is_held(name: str, family: Family, config: Config) -> bool:
    """Whether a checkpoint of this config holds a full parameter; the biases it does not hold are zero."""
    return not name.endswith(".bias") or "layernorm" in name or family.has_bias(config, name)


def hf_tensors(name: str, shape: ModelShape, family: Family, vocab_size: int) -> list[tuple[str, tuple[int, ...]]]:
    """HF names and sizes of the tensors a full parameter is fused from."""
    axis = parameter_axes(name).axes[0]
    full = torch.empty(full_shape(name, shape), device="meta")
    parts = axis.unfuse(full[:vocab_size] if axis == Named("vocab") else full, shape)
    names = family.hf_names(name)
    assert len(names) == len(parts), f"{name}: {family.model_type} names {names}, the axis has {len(parts)} parts"
    return list(zip(names, (tuple(part.shape) for part in parts), strict=True))


def _tokenizer_files(directory: Path) -> Iterator[Path]:
    files = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    require(
        bool(files),
        f"tokenizer_dir={directory} holds no tokenizer files (looked for {', '.join(_TOKENIZER_FILES)}). "
        "Give the directory of a HF tokenizer.",
        FileNotFoundError,
    )
    return iter(files)


def _special_tokens(directory: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id as far as the tokenizer's own files say."""
    _tokenizer_files(directory)
    settings, ids = {}, {}
    if (directory / "tokenizer_config.json").is_file():
        settings = read_json(directory / "tokenizer_config.json")
        ids = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if (directory / "tokenizer.json").is_file():
        tokenizer = read_json(directory / "tokenizer.json")
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    found = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            found[f"{role}_token_id"] = ids[content]
    return found


def _is_writer() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
