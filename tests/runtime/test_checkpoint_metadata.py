"""A distributed checkpoint is read as data: what is no part of one is never made, and what is damaged is named."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from minitron_nemo.checks import Mistake
from minitron_nemo.engine import meta_core
from minitron_nemo.nemo.trainer import Strategy
from minitron_nemo.runtime.checkpoint_metadata import as_data, read_metadata, require_whole
from minitron_nemo.runtime.distributed_checkpoint import content_of, load_weights, save_weights, stored_dtype
from minitron_nemo.runtime.pieces import StoredWeights
from support.megatron import TINY, build_gpt, start_alone

MADE: list[str] = []
"""By whom a `Witness` was made out of a file."""


class Witness:
    """Harmless, but no class of a checkpoint; it leaves a mark where it is made by an unpickler."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        MADE.append(state["of"])

    def __getstate__(self) -> dict[str, Any]:
        return {"of": "a file"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `weights/`."""
    start_alone()
    directory = tmp_path_factory.mktemp("saved")
    save_weights(build_gpt(TINY), directory)
    return directory


@pytest.fixture
def weights(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved / "weights", tmp_path / "model" / "weights")


def with_megatron(directory: Path) -> None:
    key = "module.decoder.final_layernorm.weight"
    into = ShardedTensor.from_rank_offsets(key, torch.empty(TINY.hidden_size))
    with as_data(directory / "weights"):
        dist_checkpointing.load({key: into}, str(directory / "weights"))


READERS: dict[str, Callable[[Path], Any]] = {
    "a model": lambda directory: load_weights(build_gpt(TINY), directory),
    "its pieces": lambda directory: StoredWeights(directory / "weights", meta_core(TINY)),
    "its dtype": stored_dtype,
    "its naming": lambda directory: content_of(directory / "weights"),
    "training that goes on": lambda directory: Strategy.load_checkpoint(object.__new__(Strategy), directory),
    "Megatron": with_megatron,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_class_that_is_no_part_of_metadata_is_named_and_never_made(weights: Path, reader: str) -> None:
    metadata = read_metadata(weights)
    metadata.planner_data = Witness()
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    MADE.clear()
    with pytest.raises(
        ValueError, match=rf"{weights}/.metadata names \S*test_checkpoint_metadata.Witness, which is no"
    ):
        READERS[reader](weights.parent)
    assert MADE == []


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "torch.load", "functools.partial", "torch.hub.load"])
def test_functions_are_no_part_of_metadata_either(weights: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    (weights / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())  # names it, and calls nothing
    with pytest.raises(ValueError, match=f"names {name}, which is no part"):
        read_metadata(weights)


def test_objects_beside_tensors_are_not_unpickled(tmp_path: Path) -> None:
    """torch unpickles them whole; the second load shows that this one would have."""
    start_alone()
    (tmp_path / "weights").mkdir()

    def entries(data: Any) -> dict[str, Any]:
        return {"state": ShardedObject("state", data, (1,), (0,))}

    dist_checkpointing.save(entries(Witness()), str(tmp_path / "weights"))
    MADE.clear()
    damaged = pytest.raises(ValueError, match=r"\.distcp is damaged: a tensor or an object in it cannot be read")
    with damaged, as_data(tmp_path / "weights"):
        dist_checkpointing.load(entries(None), str(tmp_path / "weights"))
    assert MADE == []
    dist_checkpointing.load(entries(None), str(tmp_path / "weights"))
    assert MADE == ["a file"]


def test_what_libraries_read_elsewhere_is_as_it_was(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    reader, environment = dist_checkpointing.strategies.torch.FileSystemReader.read_metadata, dict(os.environ)
    with_megatron(weights.parent)
    (weights / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{weights}/metadata.json is gone. Make the checkpoint again"):
        with_megatron(weights.parent)
    assert dist_checkpointing.strategies.torch.FileSystemReader.read_metadata is reader
    assert dict(os.environ) == environment


def test_metadata_of_other_writers_is_read(weights: Path) -> None:
    """Written by other versions: sets, ordered dicts and paths come as what they are."""
    metadata = read_metadata(weights)
    metadata.planner_data = {"a": {1}, "b": frozenset({2}), "c": torch.Size([3]), "d": torch.bfloat16, "e": weights}
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    assert read_metadata(weights).planner_data == metadata.planner_data


@pytest.mark.parametrize("file", [".metadata", "common.pt", "metadata.json", "*.distcp"])
def test_a_file_that_is_cut_short_is_named(weights: Path, file: str) -> None:
    found = max(weights.glob(file), key=lambda path: path.stat().st_size)
    whole = found.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        found.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{found} (cannot be read|has \d+ of its \d+ bytes).* Make the check"):
            require_whole(weights)
    found.unlink()
    with pytest.raises(ValueError, match=rf"{found} (is gone|has 0 of its)"):
        require_whole(weights)


def test_metadata_with_a_changed_byte_is_named_or_still_metadata(weights: Path) -> None:
    """Anywhere in it; what still reads is for the manifest's digests to notice."""
    file = weights / ".metadata"
    whole = bytearray(file.read_bytes())
    named = 0
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        file.write_bytes(bytes(whole[:place]) + bytes([whole[place] ^ 0x15]) + bytes(whole[place + 1 :]))
        try:
            read_metadata(weights)
        except ValueError as error:
            named += str(error).startswith(f"{file} ")
            assert isinstance(error, Mistake), error  # noqa: PT017 (most bytes may be any)
    assert named > 20


def test_an_entry_that_torch_cannot_read_is_named_with_its_file(weights: Path) -> None:
    """Its bytes are all there; only the head of a tensor's own archive is wrong."""
    place = read_metadata(weights).storage_data
    entry = next(info for index, info in place.items() if index.fqn.endswith("word_embeddings.weight"))
    with (weights / entry.relative_path).open("r+b") as stream:
        stream.seek(entry.offset)
        archive = io.BytesIO(stream.read(entry.length)).getvalue()
        stream.seek(entry.offset + archive.rindex(b"PK\x05\x06"))  # end of the archive's directory
        stream.write(b"xxxx")
    expected = rf"{weights / entry.relative_path} (is damaged|cannot be read).* Make the checkpoint again"
    with pytest.raises(ValueError, match=expected):
        load_weights(build_gpt(TINY), weights.parent)
    stored = StoredWeights(weights, meta_core(TINY))
    with pytest.raises(ValueError, match=expected):
        stored.read_whole("embedding.word_embeddings.weight")
