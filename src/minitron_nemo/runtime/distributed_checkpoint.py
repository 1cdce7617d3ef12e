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
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo import platform
from minitron_nemo.parallel import all_reduce_max, world
from minitron_nemo.places import layer_of

WEIGHTS = "weights"
PREFIX = "module."
CONTENT: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""As NeMo's strategy writes: layers that are alike are stacked, [l, ...] under one key."""
PIECE_BYTES = 256 << 20
"""Of a model's weights that are read at once."""


def save_weights(core: MCoreGPTModel, directory: Path) -> None:
    """Write `directory/weights`. Every rank calls; each writes its own shards."""
    weights = directory / WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(
        core.sharded_state_dict(prefix=PREFIX, metadata=CONTENT), str(weights), content_metadata=CONTENT
    )


def load_weights(core: MCoreGPTModel, directory: Path) -> None:
    """Fill `core` from `directory/weights`. Every rank calls; each reads what it holds, a few layers at a time.

    Memory: beside the model one piece, as reading makes copies (of gated linears, and of what another dtype or layout
    wrote).
    """
    content = content_of(directory / WEIGHTS)
    _require_each_once(core.sharded_state_dict(prefix=PREFIX, metadata=content))
    pieces = _pieces(core.sharded_state_dict(prefix=PREFIX, metadata=content))
    rounds = all_reduce_max(torch.tensor(len(pieces), device=platform.device()), group=world())
    pieces += [{} for _ in range(int(rounds) - len(pieces))]
    while pieces:
        piece = pieces.pop(0)
        found = dist_checkpointing.load(piece, str(directory / WEIGHTS), validate_access_integrity=False)
        core.load_state_dict({key.removeprefix(PREFIX): value for key, value in found.items()}, strict=False)


def _require_each_once(state: dict[str, Any]) -> None:
    """Megatron's check that all ranks together ask for each part of each tensor once, of the whole model: a piece does
    not cover the tensors of stacked layers. Communicates over the world."""
    sharded, _ = extract_sharded_base(load_preprocess(state)[0])
    validate_sharding_integrity(determine_global_metadata(sharded)[1])


def _pieces(state: dict[str, Any]) -> list[dict[str, Any]]:
    """A sharded state dict apart: layers together up to PIECE_BYTES, at least one; the rest counts as one."""
    of_layers: dict[int | None, dict[str, Any]] = {}
    for key, sharded in state.items():
        of_layers.setdefault(layer_of(key.removeprefix(PREFIX)), {})[key] = sharded
    pieces: list[dict[str, Any]] = []
    room = 0
    for entries in of_layers.values():
        nbytes = sum(each.data.nbytes for each in entries.values() if isinstance(each.data, torch.Tensor))
        if not pieces or nbytes > room:
            pieces.append({})
            room = PIECE_BYTES
        pieces[-1] |= entries
        room -= nbytes
    return pieces


def stored_dtype(directory: Path) -> torch.dtype:
    """What most of the weights of `directory/weights` are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in dist_checkpointing.load_tensors_metadata(str(directory / WEIGHTS)).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.global_shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def content_of(weights: Path) -> dict[str, Any]:
    """How a checkpoint names its layers, as `sharded_state_dict` asks for it: stacked, or each by its number."""
    saved = dist_checkpointing.load_content_metadata(str(weights)) or {}
    keys = dist_checkpointing.load_tensors_metadata(str(weights))
    by_number = any(layer_of(key.removeprefix(PREFIX)) is not None for key in keys)
    return CONTENT | saved | {"non_homogeneous_layers": by_number}
