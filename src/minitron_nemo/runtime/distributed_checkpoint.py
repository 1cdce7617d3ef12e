"""Weights to and from Megatron distributed checkpoints, under the keys NeMo uses, whatever layout wrote them.

Where NeMo's save spends ten seconds on a laptop: Megatron-core starts a `spawn`ed manager process, which imports the
program's main module again, NeMo included. The doors of this package (cli.py, launch/) import nothing heavy at the top.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minitron_nemo.places import layer_of
from minitron_nemo.runtime.checkpoint_metadata import as_data, read_common, read_metadata
from minitron_nemo.stopping import only_this_process

WEIGHTS = "weights"
PREFIX = "module."
CONTENT: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""As NeMo's strategy writes: layers that are alike are stacked, [l, ...] under one key.

Whoever asks for a `sharded_state_dict` gives a copy: Megatron-core 0.16 puts a process group of the layout at hand into
it, which would be used for the next layout's.
"""


def save_weights(core: MCoreGPTModel, directory: Path) -> None:
    """Write `directory/weights`. Every rank calls; each writes its own shards."""
    weights = directory / WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    state = core.sharded_state_dict(prefix=PREFIX, metadata=dict(CONTENT))
    with only_this_process():
        dist_checkpointing.save(state, str(weights), content_metadata=CONTENT)


def load_weights(core: MCoreGPTModel, directory: Path) -> None:
    """Fill `core` from `directory/weights`. Every rank calls; each reads what it holds, into where it lies.

    Memory: beside the model one tensor as it is stored. Megatron would read the two halves of gated linears apart and
    make new tensors of them, for all layers at once; here the halves are views of the parameter.
    Raises: ValueError: a file is damaged or gone, or names classes that are no part of a checkpoint.
    """
    weights = directory / WEIGHTS
    wanted = core.sharded_state_dict(prefix=PREFIX, metadata=content_of(weights))
    # transformer-engine's own state, which it unpickles whole, is left out; it is empty but for FP8
    wanted = {key: entry for key, entry in wanted.items() if not key.endswith("._extra_state")}
    parts = {name: each.build() for name, each in wanted.items() if isinstance(each, ShardedTensorFactory)}
    places = [[each.data for each in nested_values(part)] for part in parts.values()]
    with as_data(weights):
        found = dist_checkpointing.load(wanted | parts, str(weights))
    for name, of_part in zip(parts, places, strict=True):
        for place, value in zip(of_part, nested_values(found.pop(name)), strict=True):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
    core.load_state_dict({key.removeprefix(PREFIX): value for key, value in found.items()}, strict=False)


def stored_dtype(directory: Path) -> torch.dtype:
    """What most of the weights of `directory/weights` are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in _tensors(directory / WEIGHTS).values():
        dtype = tensor.properties.dtype
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.size)
    return max(sizes, key=lambda dtype: sizes[dtype])


def content_of(weights: Path) -> dict[str, Any]:
    """How a checkpoint names its layers, as `sharded_state_dict` asks for it: stacked, or each by its number."""
    saved = read_common(weights).get("content_metadata") or {}
    by_number = any(layer_of(key.removeprefix(PREFIX)) is not None for key in _tensors(weights))
    return CONTENT | saved | {"non_homogeneous_layers": by_number}


def _tensors(weights: Path) -> dict[str, TensorStorageMetadata]:
    entries = read_metadata(weights).state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
