"""A GGUF file (llama.cpp's, mostly quantized) becomes an ordinary Hugging Face folder, one tensor at a time.

    metadata            ->  config.json, generation_config.json      what is not understood is refused by name
    quantized tensors   ->  model.safetensors, dequantized           float32; F16 and BF16 stay what they are
    tokenizer.*         ->  tokenizer.json and its settings          gguf_tokenizer.py

Weights and names come from llama.cpp's own `gguf` package, not from transformers' reader (4.57, 5.23): that one drops
rope_freqs.weight, rope.scaling.* and the pre-tokenizer of a llama in silence and holds the whole model; 4.57 also loses
add_bos_token and the end-of-text token, and 5.23 does not save what it has read. What llama.cpp's
convert_hf_to_gguf.py did to the weights is undone here: query and key rows of `llama` stand in pairs, as its rotary
embedding is interleaved, norms of `nemotron` have 1 added, and experts of a layer are one tensor. Nothing communicates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_nemo.axes import parameter_names
from minitron_nemo.checks import Mistake, require
from minitron_nemo.hf.config import CONFIG, shape_from_config, with_defaults
from minitron_nemo.hf.families import Config, family_of
from minitron_nemo.hf.folder import hf_tensors, is_held
from minitron_nemo.hf.gguf_metadata import ROPE_FREQS, GgufFile, gguf_config, gguf_package, open_gguf
from minitron_nemo.hf.gguf_tokenizer import Metadata, require_known_tokenizer, special_ids, write_tokenizer
from minitron_nemo.hf.safetensors_stream import Planned, ShardWriter
from minitron_nemo.shape import ModelShape

SUFFIX = ".gguf"
GENERATION = "generation_config.json"
_MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Tensor types that keep their dtype; whatever else there is becomes float32, which holds it exactly."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix == SUFFIX or stream.read(4) == b"GGUF"


def unpack_gguf(file: Path, folder: Path, *, with_tokenizer: bool = True) -> dict[str, Any]:
    """Write the Hugging Face folder that a GGUF file holds. Tensors pass one at a time.

    Args:
        folder: made here.
        with_tokenizer: the file's own too.
    Returns: what a manifest says of the file: its tensors by type, and its pre-tokenizer.
    Raises: ValueError: no model of a family that is supported, something that cannot be kept, or a damaged file.
        Nothing is written then.
    """
    opened = open_gguf(file)
    config = gguf_config(opened)
    shape = shape_from_config(config)
    sources = list(_sources(opened, config, shape))
    if with_tokenizer:
        require_known_tokenizer(opened.metadata, file)
    folder.mkdir(parents=True)
    if with_tokenizer:
        write_tokenizer(opened.metadata, folder)
    for name, content in ((CONFIG, config | special_ids(opened.metadata)), (GENERATION, _generation(opened.metadata))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    writer = ShardWriter(folder, {source.name: source.planned for source in sources}, _MAX_SHARD_BYTES)
    for source in sources:
        values = _undone(source.name, source.read(), opened.architecture, shape)
        writer.append(source.name, values.to(source.planned.dtype))
    writer.finish()
    return {
        "format": "GGUF, dequantized",
        "architecture": opened.architecture,
        "tensor_types": dict(Counter(tensor.tensor_type.name for tensor in opened.tensors.values())),
        "pre_tokenizer": opened.metadata.get("tokenizer.ggml.pre"),
    }


def _generation(metadata: Metadata) -> dict[str, Any]:
    """generation_config.json: the special ids, and both ends where a turn ends otherwise than a text."""
    ids: dict[str, Any] = special_ids(metadata)
    ends = [ids.get("eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    distinct = sorted({end for end in ends if end is not None})
    return ids | ({"eos_token_id": distinct} if len(distinct) > 1 else {})


# ---- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A Hugging Face tensor, and where it lies in the file."""

    name: str
    sizes: tuple[int, ...]
    tensor: Any
    expert: int | None

    @property
    def planned(self) -> Planned:
        return Planned(_DTYPES.get(self.tensor.tensor_type.name, torch.float32), self.sizes)

    def read(self) -> Tensor:
        """The values in float32."""
        from gguf.quants import dequantize

        data = self.tensor.data if self.expert is None else self.tensor.data[self.expert]
        values = dequantize(data, self.tensor.tensor_type)
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # W: a copy of what is only mapped


def _sources(file: GgufFile, config: Config, shape: ModelShape) -> Iterator[_Source]:
    """Every tensor that config.json calls for.

    Raises: ValueError: one is missing, of other sizes or of a type that cannot be dequantized, or one is left over.
    """
    gguf = gguf_package(file.path)
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[file.architecture]
    names = gguf.get_tensor_name_map(architecture, shape.num_layers)
    used = {ROPE_FREQS}
    for name, sizes in _called_for(shape, config):
        before, of_experts, after = name.partition(".experts.")
        number, _, part = after.partition(".")
        expert = int(number) if of_experts else None
        # llama.cpp's map knows the experts of a layer as one tensor
        merged = f"{before}.experts.{part}" if of_experts else name
        theirs = names.get_name(merged, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, f"gguf has no name for {merged}"
        require(
            theirs in file.tensors,
            f"{file.path} has no tensor {theirs}, which its metadata calls for. The file is incomplete, or older than "
            "the layout that is read here; convert the model again.",
        )
        tensor = file.tensors[theirs]
        wanted = sizes if expert is None else (shape.num_moe_experts, *sizes)
        found = tuple(int(size) for size in reversed(tensor.shape))
        require(found == wanted, f"{theirs} in {file.path} has shape {found} where its metadata calls for {wanted}.")
        if theirs not in used:
            _require_known_type(tensor, file.path)
        used.add(theirs)
        yield _Source(name, sizes, tensor, expert)
    left = sorted(file.tensors.keys() - used)
    require(
        not left,
        f"{file.path} holds {len(left)} tensors that a {config['model_type']} does not have ({', '.join(left[:3])}). "
        "Import the model's Hugging Face checkpoint instead.",
    )


def _called_for(shape: ModelShape, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face tensors and their sizes."""
    family = family_of(config["model_type"])
    complete = with_defaults(config)
    for name in parameter_names(shape):
        if is_held(name, family, complete):
            yield from hf_tensors(name, shape, family, config["vocab_size"])


def _require_known_type(tensor: Any, file: Path) -> None:
    from gguf.quants import dequantize

    try:
        dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError as error:
        raise Mistake(
            f"{tensor.name} in {file} is {tensor.tensor_type.name}, which the installed gguf package cannot "
            "dequantize. Update it, or take another quantization of the model."
        ) from error


def _undone(name: str, values: Tensor, architecture: str, shape: ModelShape) -> Tensor:
    """A tensor as it was before llama.cpp's converter."""
    if architecture == "nemotron" and name.endswith("norm.weight"):
        return values - 1
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = shape.num_attention_heads if ".q_proj." in name else shape.num_query_groups
        return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    return values
