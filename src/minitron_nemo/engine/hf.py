"""Weights from and to Hugging Face checkpoints, one tensor at a time.

    config.json           <->  ModelShape                             hf_families.py
    *.safetensors shards  <->  full parameters of the axis table      the family's name map; axes fuse and unfuse
    full parameters       <->  Megatron-core model on any layout      weights.py

Only safetensors are read and written, never pickles; transformers is not needed. The embedding table may be larger here
(`padded_vocab_size`) than in the checkpoint (`vocab_size`): padding rows are zero on import and dropped on export.

Communication: importing none, every rank reads what it holds; exporting gathers over tp and pp, global rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minitron_nemo.axes import Named, full_shape, parameter_axes, parameter_names
from minitron_nemo.checks import require
from minitron_nemo.engine.hf_families import Family, family_of, hf_config, shape_from_config, with_defaults
from minitron_nemo.parallel import Groups
from minitron_nemo.rope import apply_rope_scaling
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import load_full_parameters, stream_full_parameters

__all__ = ["apply_rope_scaling", "hf_config", "load_hf", "save_hf", "shape_from_hf", "vocab_size_from_hf"]

logger = logging.getLogger(__name__)

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_NOT_WEIGHTS = ("seq_length", "padded_vocab_size", "init_method_std", "family")
"""ModelShape fields in which a model may differ from the checkpoint it is filled from."""
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
    config = _read_config(path)
    shape = shape_from_config(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    window = with_defaults(config, family_of(shape.family)).get("sliding_window")
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
    return int(_read_config(path)["vocab_size"])


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
    config = _read_config(path)
    family = family_of(config.get("model_type", "none"))
    _require_same_shape(shape_from_config(config), shape, path)
    config = with_defaults(config, family)
    require(
        config["vocab_size"] <= shape.padded_vocab_size,
        f"{path} has vocab_size={config['vocab_size']}, more than padded_vocab_size={shape.padded_vocab_size}. "
        f"Build the model with at least {config['vocab_size']}.",
    )
    checkpoint = _Checkpoint(Path(path))

    def read(name: str) -> Tensor:
        axis = parameter_axes(name).axes[0]
        if name.endswith(".bias") and "layernorm" not in name and not family.has_bias(config, name):
            return torch.zeros(full_shape(name, shape))
        parts = [checkpoint.read(hf, sizes) for hf, sizes in _hf_tensors(name, shape, family, config["vocab_size"])]
        full = axis.fuse(parts, shape)
        if axis == Named("vocab"):
            padding = shape.padded_vocab_size - full.shape[0]
            full = nn.functional.pad(full, (0, 0, 0, padding)) if padding else full
        return full

    load_full_parameters(model, shape, groups, read)


class _Checkpoint:
    """safetensors of a directory: a single file, or shards with their index. Files are mapped, not read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, Any] = {}
        if (path / _INDEX).is_file():
            self.file_of = dict(_read_json(path / _INDEX)["weight_map"])
        elif (path / _SINGLE).is_file():
            self.file_of = dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        else:
            pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in path.glob(ending))
            require(
                not pickles,
                f"{path} holds weights only as pickles ({', '.join(pickles[:3])}), which can run code when loaded and "
                "are never read here. Convert it once to safetensors: AutoModelForCausalLM.from_pretrained(path)"
                ".save_pretrained(new_path, safe_serialization=True) with transformers.",
            )
            raise FileNotFoundError(
                f"{path} has neither {_SINGLE} nor {_INDEX}. Point at a checkpoint directory with its weights."
            )

    def read(self, name: str, sizes: tuple[int, ...]) -> Tensor:
        require(
            name in self.file_of,
            f"{self.path} has no tensor {name}, which its config.json calls for. The download is incomplete or "
            "config.json belongs to another model; fetch the checkpoint again.",
        )
        tensor = self._open(self.file_of[name]).get_tensor(name)
        require(
            tuple(tensor.shape) == sizes,
            f"{name} in {self.path} has shape {list(tensor.shape)} where config.json calls for {list(sizes)}. "
            "Take config.json and weights of the same model.",
        )
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self.files:
            require(
                (self.path / file).is_file(),
                f"{self.path} lacks the shard {file} that its index names. Fetch the missing file.",
                FileNotFoundError,
            )
            try:
                self.files[file] = safe_open(self.path / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{self.path / file} cannot be read as safetensors ({error}). The file is damaged or cut short; "
                    "fetch it again."
                ) from error
        return self.files[file]


def _read_config(path: Path | str) -> dict[str, Any]:
    path = Path(path)
    require(path.is_dir(), f"{path} is not a directory. Give the directory of a HF checkpoint.", FileNotFoundError)
    require(
        (path / _CONFIG).is_file(),
        f"{path} has no {_CONFIG}, so it is no HF checkpoint. Give the directory that holds it and *.safetensors.",
        FileNotFoundError,
    )
    return _read_json(path / _CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Fetch it again.") from error


def _require_same_shape(theirs: ModelShape, ours: ModelShape, path: Path | str) -> None:
    differences = [
        f"{field.name}: {getattr(theirs, field.name)} there, {getattr(ours, field.name)} here"
        for field in dataclasses.fields(ModelShape)
        if field.name not in _NOT_WEIGHTS and getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    require(
        not differences,
        f"{path} is a model of another shape ({'; '.join(differences)}). "
        "Build the model from shape_from_hf of the same path.",
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
        max_shard_bytes: size of a file, and what global rank 0 holds in host memory at a time; a larger tensor gets a
            file of its own.
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
    tensors = {name: _hf_tensors(name, shape, family, vocab_size) for name in parameter_names(shape)}
    if tokenizer_dir is not None:
        config |= _special_tokens(Path(tokenizer_dir))
    require(
        not any(path.glob("*.safetensors")),
        f"{path} already holds safetensors. Choose a new directory, or remove the old files.",
        FileExistsError,
    )
    if dist.is_initialized():
        dist.barrier()  # all have looked before rank 0 starts to write
    writer = _ShardWriter(path, tensors, dtype, max_shard_bytes) if _is_writer() else None
    for name, full in stream_full_parameters(model, shape, groups):
        if writer is not None:
            axis = parameter_axes(name).axes[0]
            rows = full[:vocab_size] if axis == Named("vocab") else full
            for (hf_name, _), tensor in zip(tensors[name], axis.unfuse(rows, shape), strict=True):
                writer.add(hf_name, tensor)
    if writer is not None:
        writer.finish()
        (path / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer_dir is not None:
            for file in _tokenizer_files(Path(tokenizer_dir)):
                shutil.copy2(file, path / file.name)


class _ShardWriter:
    """Files of at most `max_shard_bytes`, decided before the first tensor; each is written with its last one."""

    def __init__(
        self,
        path: Path,
        tensors: dict[str, list[tuple[str, tuple[int, ...]]]],
        dtype: torch.dtype,
        max_shard_bytes: int,
    ) -> None:
        self.path, self.dtype = path, dtype
        path.mkdir(parents=True, exist_ok=True)
        shards: list[list[str]] = [[]]
        room, self.total_bytes = max_shard_bytes, 0
        for hf_name, sizes in (tensor for parts in tensors.values() for tensor in parts):
            size = torch.Size(sizes).numel() * dtype.itemsize
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append(hf_name)
            room -= size
            self.total_bytes += size
        self.file_of: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self.file_of |= dict.fromkeys(names, file)
        self.last_of = {names[-1] for names in shards}
        self.waiting: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        # a copy of its own: the stream's tensor may be a view of the model's memory
        self.waiting[name] = tensor.detach().to("cpu", self.dtype, copy=True).contiguous()
        if name in self.last_of:
            save_file(self.waiting, self.path / self.file_of[name], metadata={"format": "pt"})
            self.waiting = {}

    def finish(self) -> None:
        assert not self.waiting
        if len(self.last_of) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.file_of}
            (self.path / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _hf_tensors(name: str, shape: ModelShape, family: Family, vocab_size: int) -> list[tuple[str, tuple[int, ...]]]:
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
        settings = _read_json(directory / "tokenizer_config.json")
        ids = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if (directory / "tokenizer.json").is_file():
        tokenizer = _read_json(directory / "tokenizer.json")
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
