"""The files of a corpus: whole texts, and records of JSONL and Parquet files, each with where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_nemo.checks import Mistake, did_you_mean, require
from minitron_nemo.text.jsonl import is_compressed, kind_of, open_bytes, read_jsonl

_JSONL = {".jsonl", ".ndjson", ".json"}
_PARQUET = {".parquet", ".pq"}


def has_records(file: Path) -> bool:
    """Whether it is one document a record, not one in all."""
    return kind_of(file) in _JSONL | _PARQUET


def whole_text(file: Path, *, skip_undecodable: bool) -> str | None:
    """A text file; None where it is not UTF-8 and may be left out. Raises: ValueError: it cannot be read."""
    try:
        with open_bytes(file) as content:
            return content.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        require(
            skip_undecodable,
            f"corpus: {file} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start}). "
            "Convert it (iconv -t UTF-8), take it out of the folder, or choose files with glob.",
        )
        return None
    except OSError as error:
        raise _unreadable(file, error) from error


def read_records(
    file: Path, columns: Mapping[str, str], *, text: str, chat: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, record) of a file's records.

    Args:
        columns: those of a Parquet file that are read, and the config key that chose each.
        text, chat: two of them, of which a Parquet file needs one.
    Raises: ValueError: what cannot be read.
    """
    try:
        if kind_of(file) in _JSONL:
            yield from read_jsonl(file, f"corpus: {file}", holds="a text")
        else:
            yield from _parquet(file, columns, text, chat)
    except OSError as error:
        raise _unreadable(file, error) from error


def _parquet(file: Path, columns: Mapping[str, str], text: str, chat: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    require(
        not is_compressed(file), f"corpus: {file} is a compressed Parquet file, which compresses itself. Unpack it."
    )
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        needed = [] if text not in names and chat in names else [text]
        needed += [key for key, chosen_by in columns.items() if chosen_by == "prompt_key" and text in names]
        for key in needed:
            what = columns[key].removesuffix("_key")
            require(
                key in names,
                f"corpus: {file} has no column {columns[key]}={key}; {did_you_mean(key, names)} "
                f"Set {columns[key]} to the one that holds the {what}.",
            )
            kind = table.schema_arrow.field(key).type
            require(
                any(is_(kind) for is_ in (types.is_string, types.is_large_string, types.is_null)),
                f"corpus: {file}: column {key} holds {kind}, not strings. "
                f"Set {columns[key]} to the one with the {what}.",
            )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[key for key in columns if key in names]):
            for record in batch.to_pylist():
                number += 1
                yield f"corpus: {file}, record {number}", record
    except pyarrow.ArrowException as error:
        raise Mistake(f"corpus: {file} is not a readable Parquet file ({error}). Write it again.") from error


def _unreadable(file: Path, error: OSError) -> Mistake:
    return Mistake(f"corpus: {file} cannot be read ({error.strerror or error}). Repair it or take it out of corpus.")
