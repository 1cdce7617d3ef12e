"""The weights of a NeMo 2 checkpoint a piece at a time, in one process, never a model.

    models on the meta device     ->  what a model calls each piece and where it lies, from its own
                                      `sharded_state_dict`: every layer spec and every writer's layout is understood
    StoredWeights                 ->  a piece, read from the files when asked for
    save_pieces                   ->  each piece made when it is its turn to be written, in a file of its own

A piece is what Megatron-core writes as one chunk on a single rank: one layer's matrix of the stacked [l, ...] that
layers are kept as, gate and up apart. Nothing communicates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from minitron_nemo.checks import reading, require
from minitron_nemo.config.trainer import Layout
from minitron_nemo.places import local_name
from minitron_nemo.runtime.checkpoint_metadata import MEND, MetadataReader, require_whole
from minitron_nemo.runtime.distributed_checkpoint import CONTENT, PREFIX, WEIGHTS, content_of
from minitron_nemo.runtime.layout import use_layout
from minitron_nemo.shape import ModelShape

MetaCore = Callable[[ModelShape], GPTModel]
"""Makes a whole model of a shape on the meta device, of whatever layers the trainer gives it."""

Make = Callable[[str, int, ShardedTensor], tuple[torch.dtype, Callable[[], Tensor]]]
"""(parameter, number of its piece, piece) -> dtype of the piece, and what makes it."""

_Place = tuple[str, tuple[int, ...]]
"""A piece by its key in the checkpoint and its offsets there."""


def require_one_process(doing: str) -> None:
    """Megatron's groups for a model that is not split. Raises: ValueError: several processes."""
    use_layout(Layout(), seed=0)
    processes = dist.get_world_size()
    require(
        processes == 1,
        f"{doing} runs in one process, not in {processes}. Start it without torchrun, or go through the loaded model.",
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


class StoredWeights:
    """The weights of a checkpoint on disk; found in their places when made, read when asked for.

    Args:
        core: a model of the checkpoint's shape, on the meta device.
    Raises: ValueError: a weight is missing or of another shape, or a file is cut short.
    """

    def __init__(self, weights: Path, core: GPTModel) -> None:
        self.weights, self.reader, self.metadata = weights, MetadataReader(weights), require_whole(weights)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.pieces = _pieces(_sharded_state(core, content_of(weights)))
        for name, pieces in self.pieces.items():
            for piece in pieces:
                stored = self.metadata.state_dict_metadata.get(piece.key)
                require(stored is not None, f"{weights} has no {piece.key}, which a model of its shape has ({name}).")
                assert isinstance(stored, TensorStorageMetadata)
                require(
                    tuple(stored.size) == tuple(piece.global_shape),
                    f"{piece.key} in {weights} has shape {list(stored.size)} where {list(piece.global_shape)} is "
                    "expected. Take the shape and the weights of the same model.",
                )

    def dtype(self, piece: ShardedTensor) -> torch.dtype:
        return self._stored(piece).properties.dtype

    def _stored(self, piece: ShardedTensor) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata[piece.key]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def read(self, piece: ShardedTensor) -> Tensor:
        """One piece, whichever chunks it was stored as; they are read one at a time.

        Raises: ValueError: a file is damaged.
        """
        sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        wanted = ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(sizes))
        into = torch.empty(sizes, dtype=self.dtype(piece))
        items = create_read_items_for_chunk_list(piece.key, self._stored(piece), [wanted])
        for item in items:
            with reading(self.weights / self.metadata.storage_data[item.storage_index].relative_path, MEND):
                self.reader.read_data(LoadPlan([item]), _Into(into))
        return into.view(piece.local_shape)

    def read_whole(self, name: str) -> Tensor:
        """A parameter that is one piece, by its name in the axis table."""
        (piece,) = self.pieces[name]
        return self.read(piece)


class _Into(dcp.DefaultLoadPlanner):
    """Puts what is read in its place in one tensor."""

    def __init__(self, into: Tensor) -> None:
        super().__init__()
        self.into = into

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.into[tuple(slice(a, a + n) for a, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: it was copied where it belongs."""


# ---- what a model calls its pieces -----------------------------------------------------------------------------------


def _sharded_state(core: GPTModel, content: dict[str, Any]) -> dict[str, Any]:
    """`sharded_state_dict` of a whole model on the meta device; fused matrices taken apart."""
    state = core.sharded_state_dict(prefix=PREFIX, metadata=dict(content))
    apply_factories(state)
    return state


def _pieces(state: dict[str, Any]) -> dict[str, list[ShardedTensor]]:
    """By the axis table's name of each parameter, the chunks it is stored as, in order of their rows."""
    pieces = {}
    for name, entry in state.items():
        tensors = [value for value in nested_values([entry]) if isinstance(value, ShardedTensor)]
        if tensors:
            pieces[local_name(name.removeprefix(PREFIX))] = tensors
    return pieces


def _place(piece: ShardedTensor) -> _Place:
    return piece.key, tuple(piece.global_offset)


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_pieces(core: GPTModel, directory: Path, make: Make) -> None:
    """Write `directory/weights` of a model on the meta device, each piece as `make` gives it when its turn comes.

    `make` is called for all pieces before the first byte is written, and may raise.
    """
    state = _sharded_state(core, CONTENT)
    origin: dict[_Place, Callable[[], Tensor]] = {}
    for name, pieces in _pieces(state).items():
        for number, piece in enumerate(pieces):
            dtype, origin[_place(piece)] = make(name, number, piece)
            piece.data = torch.empty(piece.local_shape, dtype=dtype, device="meta")
    weights = directory / WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(weights), sharded_strategy=_PieceByPiece(origin), content_metadata=CONTENT)


class _PieceByPiece(SaveShardedStrategy):
    """Megatron-core's torch_dist format, each tensor made when it is written; its own strategy wants all at once."""

    def __init__(self, origin: Mapping[_Place, Callable[[], Tensor]]) -> None:
        super().__init__("torch_dist", 1)
        self.origin = origin

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        by_key: dict[str, list[Any]] = defaultdict(list)
        for entry in nested_values(sharded_state_dict):
            by_key[entry.unique_key if isinstance(entry, ShardedObject) else entry.key].append(entry)
        dcp.save(
            mcore_to_pyt_state_dict(by_key, False),
            # a file a tensor: the writer keeps what it has put into one file in memory until the file is complete
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, single_file_per_rank=False, sync_files=False),
            planner=_MadeWhenWritten(self.origin),
            no_dist=True,
        )


class _MadeWhenWritten(MCoreSavePlanner):
    def __init__(self, origin: Mapping[_Place, Callable[[], Tensor]]) -> None:
        super().__init__(flatten_state_dict=False, dedup_replicated_tensors=False)
        self.origin = origin

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.tensor_data is None:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        return self.origin[write_item.index.fqn, tuple(chunk.offsets)]().view(chunk.sizes)
