"""Weights from and to Hugging Face checkpoints, one tensor at a time.

    config.json           <->  ModelShape                             config.py
    *.safetensors shards  <->  full parameters of the axis table      the family's name map; axes fuse and unfuse
    full parameters       <->  Megatron-core model on any layout      weights.py

Only safetensors are read and written, never pickles; transformers is not needed. The embedding table may be larger here
(`padded_vocab_size`) than in the checkpoint (`vocab_size`): padding rows are zero on import and dropped on export.

Communication: importing none, every rank reads what it holds; exporting gathers over tp and pp, global rank 0 writes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from minitron_nemo.axes import full_shape, parameter_axes, parameter_names
from minitron_nemo.axis_expressions import Named
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.hf.config import CONFIG, hf_config, read_config, read_json, require_same_shape, shape_from_config
from minitron_nemo.hf.families import Config, Family, family_of
from minitron_nemo.hf.safetensors_stream import INDEX, SINGLE, Planned, ShardWriter, StoredTensor, read_header
from minitron_nemo.parallel import Groups, is_rank_zero, rank_zero_works
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer_files import copy_tokenizer, require_ids_within, special_token_ids
from minitron_nemo.weights import load_full_parameters, stream_full_parameters

# ---- reading ---------------------------------------------------------------------------------------------------------


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
    config = family.with_defaults(config)
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
            raise NothingThere(
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
            NothingThere,
        )
        return read_header(self.path / file)


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
        tokenizer_dir: HF tokenizer files to copy beside the weights, with the chat templates, generation config and
            terms of use there; its bos, eos and pad tokens go to config.json.
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
        require_ids_within(tokenizer_dir, vocab_size)
        config |= special_token_ids(tokenizer_dir, key="tokenizer_dir")
    rank_zero_works(lambda: require_no_weights(path))
    planned = {hf_name: Planned(dtype, sizes) for parts in tensors.values() for hf_name, sizes in parts}
    writer = ShardWriter(path, planned, max_shard_bytes) if is_rank_zero() else None
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
            copy_tokenizer(tokenizer_dir, path, key="tokenizer_dir")


def require_no_weights(directory: Path) -> None:
    """Raises: FileExistsError: weights would be written over, or beside others."""
    require(
        not any(directory.glob("*.safetensors")),
        f"{directory} already holds safetensors. Choose a new directory, or remove the old files.",
        FileExistsError,
    )


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
