"""From a Hugging Face folder to a model artifact's weights and back, a piece at a time, in one process.

    import    a tensor of the folder, when its piece is to be written   ->  the piece's file
    export    the pieces of a parameter, when it is to be written       ->  the folder's next shard

Resident is one parameter, with its parts where it is kept fused; never a model. Several processes go through the loaded
model instead (`hf.checkpoint`), which each fill with what they hold. Nothing communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from minitron_nemo.axes import parameter_axes, parameter_names
from minitron_nemo.hf.checkpoint import require_fitting
from minitron_nemo.hf.folder import Folder
from minitron_nemo.places import EMBEDDING, OUTPUT
from minitron_nemo.runtime.distributed_checkpoint import WEIGHTS
from minitron_nemo.runtime.pieces import MetaCore, StoredWeights, require_one_process, save_pieces
from minitron_nemo.shape import ModelShape


def import_weights(
    folder: Folder, shape: ModelShape, directory: Path, *, meta_core: MetaCore, dtype: torch.dtype
) -> None:
    """Write `directory/weights` of the model in `folder`.

    Args:
        shape: the folder's; its vocabulary may be padded.
        directory: a draft's path (`artifact.writing`).
        dtype: of the weights written.
    Raises: as `load_hf`; before anything is written.
    """
    require_one_process("Import on disk")
    tensors = require_fitting(folder, shape)

    def read(name: str, number: int, piece: ShardedTensor) -> tuple[torch.dtype, Callable[[], Tensor]]:
        tied = name == OUTPUT and shape.share_embeddings_and_output_weights
        source = EMBEDDING if tied else name
        sizes = tuple(piece.local_shape)

        def make() -> Tensor:
            parts = tensors.get(source, [])
            apart = number < len(parts) and parts[number].shape == sizes
            whole = parts[number].read() if apart else folder.read(source, tensors, shape)
            if tuple(whole.shape) != sizes:  # gate and up of one parameter, neither of them stored
                whole = parameter_axes(source).axes[0].unfuse(whole, shape)[number]
            return whole.to(dtype).contiguous()

        return dtype, make

    save_pieces(meta_core(shape), directory, read)


def stored_parameters(path: Path, shape: ModelShape, *, meta_core: MetaCore) -> Iterator[tuple[str, list[Tensor]]]:
    """Every parameter of the model artifact at `path`, in the order of `parameter_names(shape)`, as it is stored.

    Whole, or gate and up apart; the next is read while one is used.
    Raises: ValueError: several processes, or weights that are cut short, missing or of another shape; at once.
    """
    require_one_process("Export on disk")
    stored = StoredWeights(path / WEIGHTS, meta_core(shape))

    def read(name: str) -> list[Tensor]:
        return [stored.read(piece) for piece in stored.pieces[name]]

    def ahead() -> Iterator[tuple[str, list[Tensor]]]:
        names = parameter_names(shape)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, names[0])
            for name, following in zip(names, [*names[1:], None], strict=True):
                parts = coming.result()
                if following is not None:
                    coming = reader.submit(read, following)
                yield name, parts

    return ahead()
