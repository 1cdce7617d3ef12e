"""safetensors files read and written a block of rows at a time.

    8 bytes, little endian: length of the header | header: JSON, name -> dtype, shape, data_offsets | data

The library maps a file to read it, and what was touched of the map counts as resident memory; to write, it wants every
tensor of the file at once. Here a tensor passes through in blocks of a few MiB, so that what is resident stays the same
for a model of any size. Nothing communicates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minitron_nemo.checks import Mistake, require

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_BYTES = 4 * 2**20  # fits the cache of a core, and is long enough for a disk

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the library's own


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        with self.file.open("rb") as stream:
            return self._rows(stream, 0, self.shape[0])

    def blocks(self, wanted: Tensor | None = None) -> Iterator[Tensor]:
        """The tensor's rows in order, about BLOCK_BYTES of the file at a time.

        Args:
            wanted: rows to yield, ascending, int64; None: all. Where none is wanted nothing is read.
        """
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, BLOCK_BYTES // row_bytes)
        with self.file.open("rb") as stream:
            for first in range(0, self.shape[0], step):
                last = min(first + step, self.shape[0])
                if wanted is None:
                    yield self._rows(stream, first, last)
                    continue
                begin, end = torch.searchsorted(wanted, torch.tensor([first, last])).tolist()
                if begin < end:
                    here = wanted[begin:end] - first
                    block = self._rows(stream, first, last)
                    yield block if len(here) == len(block) else block.index_select(0, here)

    def _rows(self, stream: BinaryIO, first: int, last: int) -> Tensor:
        rows = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
        stream.seek(self.offset + first * (self.nbytes // max(1, self.shape[0])))
        got = stream.readinto(_bytes(rows))  # type: ignore[attr-defined]
        require(got == rows.nbytes, f"{self.file} ended within {self.name}; it was cut short while being read.")
        return rows


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, by name, once its size is found to be what its header says.

    Raises: FileNotFoundError. ValueError: damaged or cut short, or a dtype that torch does not have.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        require(size >= 8 and length <= min(size - 8, _HEADER_LIMIT), _damaged(file, "its header is longer than it"))
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Mistake(_damaged(file, f"its header is not what safetensors writes: {error}")) from error
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        require(
            dtype in _DTYPES,
            f"{name} in {file} has dtype {dtype}, which is not known here. Take the bf16, fp16 or fp32 checkpoint.",
        )
        tensors[name] = StoredTensor(file, name, _DTYPES[dtype], shape, 8 + length + begin)
        require(end - begin == tensors[name].nbytes, _damaged(file, f"{name} does not have the bytes of its shape"))
    expected = 8 + length + max((end for *_, end in entries.values()), default=0)
    require(size == expected, _damaged(file, f"it has {size} bytes where its header calls for {expected}"))
    return tensors


def _damaged(file: Path, how: str) -> str:
    return f"{file} cannot be read as safetensors: {how}. The file is damaged or cut short; fetch it again."


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Files of at most `max_shard_bytes`, which tensors are appended to in the order in which they were planned.

    Which tensor goes where is decided before the first byte; a tensor larger than a file gets one of its own.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Planned], max_shard_bytes: int) -> None:
        self.folder, self.tensors = folder, tensors
        shards: list[list[str]] = [[]]
        room = max_shard_bytes
        for name, tensor in tensors.items():
            if tensor.nbytes > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append(name)
            room -= tensor.nbytes
        self.shards = {
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
            for number, names in enumerate(shards, start=1)
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._places = iter([(file, name) for file, names in self.shards.items() for name in names])
        self._file, self._name = next(self._places)
        self._stream = self._open(self._file)
        self._missing = tensors[self._name].nbytes

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of `name`: all at once or block by block."""
        if self._missing == 0:
            self._next_tensor()
        assert name == self._name and rows.dtype == self.tensors[name].dtype, (name, self._name, rows.dtype)
        self._missing -= self._stream.write(_bytes(rows.detach().contiguous()))
        assert self._missing >= 0, f"{name} has {-self._missing} bytes too many"

    def finish(self) -> None:
        """Close the last file and write the index of several."""
        assert self._missing == 0 and next(self._places, None) is None, f"{self._name} is not the last, or incomplete"
        self._stream.close()
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in self.tensors.values())},
                "weight_map": {name: file for file, names in self.shards.items() for name in names},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _next_tensor(self) -> None:
        file, self._name = next(self._places)
        if file != self._file:
            self._stream.close()
            self._file, self._stream = file, self._open(file)
        self._missing = self.tensors[self._name].nbytes

    def _open(self, file: str) -> BinaryIO:
        stream = (self.folder / file).open("wb")
        stream.write(self._header(self.shards[file]))
        return stream

    def _header(self, names: list[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            tensor = self.tensors[name]
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as the library has it
        return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
