"""Weights from and to Hugging Face checkpoints, one tensor at a time.

    config.json           <->  ModelShape                             config.py, folder.py
    *.safetensors shards  <->  full parameters of the axis table      the family's name map; axes fuse and unfuse
    full parameters       <->  Megatron-core model on any layout      weights.py

Only safetensors are written. The embedding table may be larger here
(`padded_vocab_size`) than in the checkpoint (`vocab_size`): padding rows are zero on import and dropped on export.

Communication: importing none, every rank reads what it holds; exporting gathers over tp and pp, global rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minitron_nemo.axes import parameter_axes, parameter_names
from minitron_nemo.axis_expressions import Named
from minitron_nemo.checks import CannotWrite, require
from minitron_nemo.hf.config import CONFIG, hf_config, require_same_shape
from minitron_nemo.hf.families import family_of
from minitron_nemo.hf.folder import Folder, hf_tensors
from minitron_nemo.hf.safetensors_stream import Planned, ShardWriter, StoredTensor
from minitron_nemo.parallel import Groups, is_rank_zero, rank_zero_works
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer_files import copy_tokenizer, require_ids_within, special_token_ids
from minitron_nemo.weights import load_full_parameters, stream_full_parameters

# ---- reading ---------------------------------------------------------------------------------------------------------


def load_hf(
    model: nn.Module, path: Path | str, shape: ModelShape, groups: Groups, *, ignore: Sequence[str] = ()
) -> None:
    """Fill a model from a HF checkpoint; parameters keep the model's dtype.

    Args:
        model: bare or wrapped GPTModel of this rank, built from `shape`.
        path: directory with config.json and safetensors.
        shape: as from `shape_from_hf`; context length and vocabulary padding may differ.
        ignore: as of `Folder`.
    Communicates: nothing; a rank reads the tensors it holds a part of, one at a time.
    Raises: FileNotFoundError: a file is missing. ValueError: the checkpoint is of another shape, lacks a tensor or has
        one too many, is in pickles only, or is damaged.
    """
    folder = Folder(path, ignore=ignore)
    tensors = require_fitting(folder, shape)
    load_full_parameters(model, shape, groups, lambda name: folder.read(name, tensors, shape))


def require_fitting(folder: Folder, shape: ModelShape) -> dict[str, list[StoredTensor]]:
    """`folder.parameters`, once a model of `shape` can be filled from it. Raises: as `load_hf`."""
    require_same_shape(folder.shape(), shape, folder.path)
    require(
        folder.vocab_size <= shape.padded_vocab_size,
        f"{folder.path} has vocab_size={folder.vocab_size}, more than padded_vocab_size={shape.padded_vocab_size}. "
        f"Build the model with at least {folder.vocab_size}.",
    )
    return folder.parameters(shape)


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
        dtype: of the tensors written; None: the model's own.
        others: as of `write_hf`.
    Every rank calls this; global rank 0 writes.
    Communicates: tp and pp, as `stream_full_parameters`.
    Raises: as `write_hf`.
    """
    write_hf(
        ((name, [full]) for name, full in stream_full_parameters(model, shape, groups)),
        path,
        shape,
        dtype=dtype or next(model.parameters()).dtype,
        vocab_size=vocab_size,
        tokenizer_dir=tokenizer_dir,
        max_shard_bytes=max_shard_bytes,
    )


def write_hf(
    parameters: Iterable[tuple[str, Sequence[Tensor]]],
    path: Path | str,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    vocab_size: int | None = None,
    tokenizer_dir: Path | str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write full parameters as a HF checkpoint, one at a time.

    Args:
        parameters: in the order of `parameter_names(shape)`, each whole or in the parts that it is fused from; every
            rank takes all of them.
        path: directory, made if need be; it must not hold safetensors yet.
        vocab_size: rows of the embedding table to keep, the rest being padding; None: all.
        tokenizer_dir: HF tokenizer files to copy beside the weights, with the chat templates, generation config and
            terms of use there; its bos, eos and pad tokens go to config.json.
        dtype: of the tensors written.
        max_shard_bytes: size of a file; a larger tensor gets a file of its own.
    Every rank calls this; global rank 0 writes.
    Raises: ValueError: a shape this family cannot hold, or vocab_size out of range. CannotWrite, FileNotFoundError.
    """
    path, family = Path(path), family_of(shape.family)
    vocab_size = vocab_size or shape.padded_vocab_size
    require(
        0 < vocab_size <= shape.padded_vocab_size,
        f"vocab_size={vocab_size} is more than the padded_vocab_size={shape.padded_vocab_size} rows the model has.",
    )
    config = hf_config(shape, vocab_size=vocab_size, dtype=dtype)
    tensors = {name: hf_tensors(name, shape, family, vocab_size) for name in parameter_names(shape)}
    if tokenizer_dir is not None:
        require_ids_within(tokenizer_dir, vocab_size)
        config |= special_token_ids(tokenizer_dir, key="tokenizer_dir")
    rank_zero_works(lambda: require_no_weights(path))
    planned = {hf_name: Planned(dtype, sizes) for parts in tensors.values() for hf_name, sizes in parts}
    writer = ShardWriter(path, planned, max_shard_bytes) if is_rank_zero() else None
    for name, parts in parameters:
        if writer is not None:
            axis = parameter_axes(name).axes[0]
            if len(parts) == 1:
                parts = axis.unfuse(parts[0][:vocab_size] if axis == Named("vocab") else parts[0], shape)
            for (hf_name, _), tensor in zip(tensors[name], parts, strict=True):
                writer.append(hf_name, tensor.to("cpu", dtype))
    if writer is not None:
        writer.finish()
        (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, path, key="tokenizer_dir")


def require_no_weights(directory: Path) -> None:
    """Raises: CannotWrite: weights would be written over, or beside others."""
    require(
        not any(directory.glob("*.safetensors")),
        f"{directory} already holds safetensors. Choose a new directory, or remove the old files.",
        CannotWrite,
    )
