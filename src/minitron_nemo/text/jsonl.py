"""JSONL files: one JSON object a line, blank lines left out; what cannot be read is named by its line.

Files whose names end in .gz or .zst are read as what they hold.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minitron_nemo.checks import Mistake, require

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def read_jsonl(file: Path, named: str, *, holds: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of every line, UTF-8 with or without a byte-order mark.

    Args:
        named: the file in messages, with the user's key where there is one.
        holds: what a record is, for the message about one that is something else.
    Raises: Mistake: a line that is no JSON object, or a file that is not UTF-8. OSError: it cannot be read.
    """
    try:
        with open_bytes(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                here = f"{named}, line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise Mistake(f"{here} is not JSON ({error.msg}). JSONL holds one object a line.") from error
                require(isinstance(record, dict), f"{here} is not a JSON object with {holds}.")
                yield here, record
    except UnicodeDecodeError as error:
        raise Mistake(f"{named} is not UTF-8 ({error.reason}). Convert it (iconv -t UTF-8).") from error


def kind_of(file: Path) -> str:
    """The ending that says what a file holds, without that of its compression."""
    return Path(file.stem).suffix if is_compressed(file) else file.suffix


def is_compressed(file: Path) -> bool:
    return file.suffix in _COMPRESSION


def open_bytes(file: Path) -> BinaryIO:
    """What the file holds, unpacked. Raises: OSError, also while it is read: it is damaged."""
    if not is_compressed(file):
        return file.open("rb")
    import pyarrow

    unpacked = pyarrow.input_stream(str(file), compression=_COMPRESSION[file.suffix])
    return io.BufferedReader(unpacked)
