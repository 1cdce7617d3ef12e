"""A Megatron distributed checkpoint is read as data: no file of it runs code, and a damaged one is named.

    .metadata       a pickle of torch's and Megatron's classes     an unpickler that knows those and nothing else
    common.pt       a torch file                                   torch's `weights_only`, and its list of classes
    metadata.json   which format it is                             JSON
    *.distcp        torch files one after the other, each read     `weights_only`; of objects too, which torch itself
                    where `.metadata` says                         would unpickle whole

torch 2.13 unpickles `.metadata` whole (filesystem.py, `read_metadata`) and objects as well (default_planner.py,
`load_bytes`). Megatron and NeMo read through both, so `as_data` stands around their calls. Nothing communicates.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from minitron_nemo.checks import Mistake, reading, require

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
MEND = "Make the checkpoint again, or copy it again."

_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
        "TensorProperties _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "pathlib": "PosixPath PurePosixPath",
    "pathlib._local": "PosixPath PurePosixPath",  # Python 3.13
    "collections": "OrderedDict",
    "builtins": "set frozenset",
}
"""Module -> what metadata may name of it: containers, and dataclasses that torch and Megatron write; beside them
torch's dtypes. None of them does anything when it is made."""


class _ForeignClass(Exception):
    """Metadata names what is no part of one."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _KNOWN.get(module, "").split()
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise _ForeignClass(f"{module}.{name}")
        return super().find_class("pathlib" if module == "pathlib._local" else module, name)


def read_metadata(weights: Path) -> Metadata:
    """What a checkpoint says it holds, and in which files.

    Raises: ValueError: it is damaged or gone, or names a class that is no part of metadata.
    """
    file = Path(weights) / METADATA
    try:
        with reading(file, MEND), file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
            metadata.storage_data.values(), metadata.state_dict_metadata.values()
    except Mistake as error:
        if not isinstance(error.__cause__, _ForeignClass):
            raise
        raise Mistake(
            f"{file} names {error.__cause__}, which is no part of a checkpoint's metadata; making one could run code "
            "of whoever wrote it, so it is not read. Import the model's HF safetensors with import-hf instead."
        ) from error
    return metadata


def read_common(weights: Path) -> dict[str, Any]:
    """What is no tensor in a checkpoint. Raises: ValueError: its file is damaged, gone, or of foreign classes."""
    file = Path(weights) / COMMON
    with reading(file, MEND):
        common: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    return common


def require_whole(weights: Path) -> Metadata:
    """The metadata of a checkpoint, all of whose files are there to their ends and can be read.

    Raises: ValueError: one is gone, cut short or damaged; bytes of its tensors are not looked at.
    """
    weights = Path(weights)
    metadata = read_metadata(weights)
    with reading(weights / FORMAT, MEND):
        json.loads((weights / FORMAT).read_text())
    read_common(weights)
    ends: dict[str, int] = defaultdict(int)
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
    for name, end in ends.items():
        size = (weights / name).stat().st_size if (weights / name).is_file() else 0
        require(size >= end, f"{weights / name} has {size} of its {end} bytes. {MEND}")
    return metadata


class MetadataReader(FileSystemReader):
    """torch's reader of a checkpoint's files, with metadata that is read as data."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _of_reader(self)


def _of_reader(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
    metadata = read_metadata(Path(reader.path))
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


@contextmanager
def as_data(weights: Path) -> Iterator[None]:
    """Whatever torch, Megatron or NeMo read of a checkpoint in the block, they read as this module does.

    It holds for the process, not for the thread: torch offers no other place for either.
    Raises: as `require_whole`; ValueError: tensors of it cannot be read.
    """
    weights = Path(weights)
    metadata = require_whole(weights)
    theirs, environment = FileSystemReader.read_metadata, dict(os.environ)
    FileSystemReader.read_metadata = _of_reader  # type: ignore[assignment, method-assign]
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # in which transformer-engine 1 keeps its state
            yield
    except (CheckpointException, RuntimeError) as error:  # NeMo makes the latter of the former
        file = _damaged_file(weights, metadata) if _of_checkpoint(error) else None
        if file is None:
            raise
        raise Mistake(f"{file} is damaged: a tensor or an object in it cannot be read. {MEND}") from error
    finally:
        FileSystemReader.read_metadata = theirs  # type: ignore[method-assign]
        for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            os.environ.pop(name, None)
            os.environ.update({name: environment[name]} if name in environment else {})


def _of_checkpoint(error: BaseException) -> bool:
    return isinstance(error, CheckpointException) or isinstance(error.__context__, CheckpointException)


def _damaged_file(weights: Path, metadata: Metadata) -> Path | None:
    """The first file with an entry that torch does not read; None where all are read, and something else is wrong."""
    for place in metadata.storage_data.values():
        with (weights / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            entry = io.BytesIO(stream.read(place.length))
        try:
            torch.load(entry, map_location="cpu", weights_only=True)  # noqa: TID251
        except Exception:
            return weights / place.relative_path
    return None
