"""A Hugging Face folder as it is found: config.json, safetensors and what they say together.

    config.json            ->  ModelShape; whether embeddings are tied, the weights decide
    safetensors, sharded   ->  StoredTensor by name; nothing but headers is read until a tensor is asked for
    a full parameter       <-  the tensors it is fused from, by the family's names

Files of transformers 4.57 and 5.x are read alike. Mixtures may hold a tensor an expert, or all of a layer's experts in
one. Only safetensors are read, never pickles; transformers is not needed. Nothing communicates.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.axes import full_shape, parameter_axes, parameter_names
from minitron_nemo.axis_expressions import Named
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.hf.config import read_config, read_json, shape_from_config, sliding_window, with_defaults
from minitron_nemo.hf.families import Config, Family, family_of
from minitron_nemo.hf.safetensors_stream import INDEX, SINGLE, StoredTensor, read_header
from minitron_nemo.places import EMBEDDING, OUTPUT
from minitron_nemo.shape import ModelShape

logger = logging.getLogger(__name__)

_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Tensors that old checkpoints carry and config.json says as well."""
_FUSED = re.compile(r"\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj$")
"""All experts of a layer in one tensor, as transformers 5.x holds them: [e, 2 ffn, h] and [e, h, ffn]."""
_ROUTER = re.compile(r"\.layers\.(\d+)\.mlp\.gate\.weight$")
_UNFINISHED = ("*.incomplete", "*.part", "*.aria2", "*.crdownload")
_LFS_POINTER = b"version https://git-lfs"


class Folder:
    """A checkpoint directory.

    Args:
        path: holds config.json and, for all but `shape`'s dims, safetensors.
        ignore: patterns (`model.mtp.*`) of tensors that are left out though config.json does not call for them.
    Raises: FileNotFoundError: no such directory or no config.json. ValueError: what this project cannot represent.
    """

    def __init__(self, path: Path | str, *, ignore: Sequence[str] = ()) -> None:
        self.path, self.ignore = Path(path), tuple(ignore)
        self.raw_config = read_config(path)
        self.config = with_defaults(self.raw_config)
        self.family = family_of(self.config["model_type"])

    @property
    def vocab_size(self) -> int:
        """Rows of the checkpoint's embedding table, which may be fewer than a model's `padded_vocab_size`."""
        return int(self.config["vocab_size"])

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name, experts apart; the headers of all files are read and checked.

        Raises: FileNotFoundError: no weights, or a shard is missing. ValueError: pickles only, or a damaged file.
        """
        return _experts_apart(_read_headers(self.path), self.family)

    @property
    def dtype(self) -> torch.dtype:
        """What most of the weights are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def shape(self, *, make_vocab_size_divisible_by: int = 1) -> ModelShape:
        """The model's shape.

        `sliding_window` is not part of it: attention here sees the whole sequence, which is the same model up to that
        length; a window shorter than the context is reported in the log.

        Args:
            make_vocab_size_divisible_by: pad the embedding table up to a multiple of it, so that it splits over tp.
        """
        shape = shape_from_config(self.raw_config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
        window = sliding_window(self.config)
        if window is not None and window < shape.seq_length:
            logger.warning(
                "%s: sliding_window=%s is ignored: attention is over the whole sequence. The model is the same for "
                "sequences of up to %s tokens; train and export within that length.",
                self.path,
                window,
                window,
            )
        if not any(self.path.glob("*.safetensors")):
            return shape
        return dataclasses.replace(shape, share_embeddings_and_output_weights=self._tied)

    @cached_property
    def _tied(self) -> bool:
        """Whether the output layer is the embedding. transformers lines differ where flag and weights disagree."""
        said = bool(self.config["tie_word_embeddings"])
        (output,), (embedding,) = self.family.hf_names(OUTPUT), self.family.hf_names(EMBEDDING)
        has_output = output in self.tensors
        if not said and not has_output:
            logger.warning(
                "%s says tie_word_embeddings=false and has no %s: the embedding serves as the output layer.",
                self.path,
                output,
            )
        if not said or not has_output:
            return not has_output
        same = embedding in self.tensors and _equal(self.tensors[output], self.tensors[embedding])
        if not same:
            logger.warning(
                "%s says tie_word_embeddings=true, but its %s differs from %s: the model is taken as untied. "
                "transformers 4.57 drops that output layer, 5.x keeps it.",
                self.path,
                output,
                embedding,
            )
        return same

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

    def parameters(self, shape: ModelShape) -> dict[str, list[StoredTensor]]:
        """Of every full parameter that the checkpoint holds, the tensors it is fused from; each was found.

        Raises: ValueError: a tensor is missing, quantized or of another shape, or there are others beside them.
        """
        found = {
            name: [self.find(*tensor) for tensor in hf_tensors(name, shape, self.family, self.vocab_size)]
            for name in parameter_names(shape)
            if is_held(name, self.family, self.config)
        }
        known = {tensor.name for tensors in found.values() for tensor in tensors}
        if shape.share_embeddings_and_output_weights:
            known.update(self.family.hf_names(OUTPUT))  # a second copy, equal to the embedding
        unknown = sorted(
            name
            for name in self.tensors
            if name not in known
            and not _BUFFERS.search(name)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)
        )
        require(
            not unknown,
            f"{self.path} holds tensors that a {self.family.model_type} of its config.json does not have: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}. Take the config.json published with them, "
            "or leave them out with ignore_tensors if the model is whole without; nothing was written.",
        )
        return found

    def read(self, name: str, tensors: Mapping[str, Sequence[StoredTensor]], shape: ModelShape) -> Tensor:
        """A full parameter of `shape`, the vocabulary's padding zero.

        Args:
            tensors: as from `parameters`.
        """
        if name not in tensors:
            return torch.zeros(full_shape(name, shape))
        axis = parameter_axes(name).axes[0]
        full = axis.fuse([tensor.read() for tensor in tensors[name]], shape)
        padding = shape.padded_vocab_size - full.shape[0] if axis == Named("vocab") else 0
        return torch.nn.functional.pad(full, (0, 0, 0, padding)) if padding else full


def shape_from_hf(path: Path | str, *, make_vocab_size_divisible_by: int = 1) -> ModelShape:
    """As `Folder.shape`."""
    return Folder(path).shape(make_vocab_size_divisible_by=make_vocab_size_divisible_by)


def vocab_size_from_hf(path: Path | str) -> int:
    """As `Folder.vocab_size`."""
    return Folder(path).vocab_size


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


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_headers(path: Path) -> dict[str, StoredTensor]:
    if (path / SINGLE).is_file():  # where both are there, as transformers chooses
        return _read_file(path / SINGLE)
    if (path / INDEX).is_file():
        file_of: dict[str, str] = read_json(path / INDEX)["weight_map"]
        held = {file: _read_file(path / file) for file in sorted(set(file_of.values()))}
        return {name: held[file][name] for name, file in file_of.items() if name in held[file]}
    unfinished = sorted(file.name for pattern in _UNFINISHED for file in path.rglob(pattern))
    require(
        not unfinished,
        f"{path} is still being downloaded: {', '.join(unfinished[:3])} is there and no {SINGLE} or {INDEX}. "
        "Wait for the end.",
        NothingThere,
    )
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    require(
        not shards,
        f"{path} has {', '.join(shards[:3])} and no {INDEX}, which says what is in which file. Fetch it, and the files "
        "it names.",
        NothingThere,
    )
    pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in path.glob(ending))
    require(
        not pickles,
        f"{path} holds weights only as pickles ({', '.join(pickles[:3])}), which can run code when loaded and "
        "are never read here. Convert it once to safetensors: AutoModelForCausalLM.from_pretrained(path)"
        ".save_pretrained(new_path, safe_serialization=True) with transformers.",
    )
    raise NothingThere(f"{path} has neither {SINGLE} nor {INDEX}. Point at a checkpoint directory with its weights.")


def _read_file(file: Path) -> dict[str, StoredTensor]:
    require(
        file.is_file(),
        f"{file.parent} lacks the shard {file.name} that its index names. Fetch the missing file"
        f"{', or wait: a download is going on' if any(file.parent.rglob('*.incomplete')) else ''}.",
        NothingThere,
    )
    with file.open("rb") as stream:
        pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    require(not pointer, f"{file} is a Git LFS pointer, not the weights. Fetch them: git lfs pull in {file.parent}.")
    return read_header(file)


def _experts_apart(tensors: Mapping[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """The same tensors under the names of a checkpoint with a tensor an expert."""
    apart: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        fused, router = _FUSED.search(name), _ROUTER.search(name)
        if fused and len(tensor.shape) == 3:
            for part in _experts_of(tensor, int(fused[1]), fused[2] == "gate_up", family):
                apart[part.name] = part
        elif router and "decoder.layers.{i}.mlp.router" in family.names:
            (own,) = family.hf_names(f"decoder.layers.{router[1]}.mlp.router.weight")
            apart[own] = dataclasses.replace(tensor, name=own)
        else:
            apart[name] = tensor
    return apart


def _experts_of(tensor: StoredTensor, layer: int, gate_up: bool, family: Family) -> list[StoredTensor]:
    """[e, 2 ffn, h]: gate and up of each expert; [e, h, ffn]: down of each."""
    experts, rows, columns = tensor.shape
    linear = "linear_fc1" if gate_up else "linear_fc2"
    parts = []
    for expert in range(experts):
        names = family.hf_names(f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{linear}.weight")
        each = dataclasses.replace(tensor, shape=(rows // len(names), columns))
        first = tensor.offset + expert * len(names) * each.nbytes
        parts += [
            dataclasses.replace(each, name=name, offset=first + number * each.nbytes)
            for number, name in enumerate(names)
        ]
    return parts


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and all(
        torch.equal(a, b) for a, b in zip(one.blocks(), other.blocks(), strict=True)
    )
