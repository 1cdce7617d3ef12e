"""Documents: where text comes from, in which order, and which of it is held out.

A corpus is one or several sources: text files (one document each), JSONL or Parquet files (one document a record), or
folders of these. The order is the sorted relative path, then the record's place in its file: the same everywhere.

The embedded corpus, `stdlib`, is the source of the running interpreter's own standard library: real text on every
machine, without a network. It is licensed under the PSF licence, and differs a little between Python versions; since
files are held out by name, a file held out under one version is held out under the next.

Nothing here writes or communicates; what cannot be read raises before a later stage writes.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.checks import Mistake, NothingThere, did_you_mean, require
from minitron_nemo.config.data import STDLIB
from minitron_nemo.text.jsonl import read_jsonl

TRAIN, VALIDATION = "train", "validation"
"""The splits."""
STDLIB_LICENCE = "PSF-2.0 (Python Software Foundation License); some modules add their own compatible notice"
_STDLIB_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}
_STDLIB_BROKEN_ON_PURPOSE = ("lib2to3/tests/data/", "test/test_lib2to3/data/")
_JSONL = {".jsonl", ".ndjson", ".json"}
_PARQUET = {".parquet", ".pq"}
_KEYS = (("text_key", "text"), ("prompt_key", "prompt"))
_SOURCE_KEYS = ("path", "weight", "text_key", "prompt_key", "glob")


@dataclass(frozen=True)
class Document:
    """One document; `name` is its path relative to the source, None for a record of a JSONL or Parquet file."""

    name: str | None
    text: str
    prompt: str = ""
    """What stands before the text and is not to be learned."""


@dataclass(frozen=True)
class Source:
    """One entry of `corpus`: a file, a folder, or `stdlib`."""

    path: str
    weight: float | None = None
    """Share of the training samples drawn from here, relative to the other sources; None: in proportion to its size."""
    text_key: str = "text"
    """Key (JSONL) or column (Parquet) that holds the text."""
    prompt_key: str | None = None
    """That of a prompt, which the text answers; null: there are none. Files of other kinds have none."""
    glob: str = "*"
    """Which files of a folder to take, by name; applied at every depth."""

    def __post_init__(self) -> None:
        require(
            self.weight is None or (math.isfinite(self.weight) and self.weight > 0),
            f"corpus: weight={self.weight} of {self.path} must be a positive number. Leave the source out instead.",
        )

    def files(self) -> list[tuple[str, Path]]:
        """(relative POSIX path, file), sorted by the former. Raises: FileNotFoundError, ValueError: nothing there."""
        if self.path == STDLIB:
            return _stdlib_files()
        root = Path(self.path)
        require(
            root.exists(),
            f"corpus={self.path} does not exist. Give a text, JSONL or Parquet file, a folder of these, or '{STDLIB}'.",
            NothingThere,
        )
        if root.is_file():
            return [(root.name, root)]
        files = sorted(
            (file.relative_to(root).as_posix(), file)
            for file in root.rglob(self.glob)
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
        )
        require(
            bool(files),
            f"corpus={self.path} is a folder without files that match glob={self.glob!r} (hidden ones do not count). "
            "Put text, JSONL or Parquet files there, or correct corpus.",
        )
        return files

    def documents(self) -> Iterator[Document]:
        """Every document that is more than white space. Raises: ValueError: a file or record that cannot be read."""
        keys = [self.text_key] if self.prompt_key is None else [self.text_key, self.prompt_key]
        for name, file in self.files():
            if file.suffix in _JSONL:
                documents = (Document(None, *texts) for texts in _jsonl_texts(file, keys))
            elif file.suffix in _PARQUET:
                documents = (Document(None, *texts) for texts in _parquet_texts(file, keys))
            else:
                documents = (Document(name, text) for text in _whole_text(file, skip_undecodable=self.path == STDLIB))
            yield from (each for each in documents if each.text and not each.text.isspace())


def read_corpus(corpus: Any, *, text_key: str = "text", prompt_key: str | None = None) -> list[Source]:
    """The sources named by the config key `corpus`.

    Args:
        corpus: `stdlib`, a path, or a list of paths or of mappings {path, weight, text_key, prompt_key, glob}.
    Raises: ValueError: an empty list, an unknown key, or weights on some sources only.
    """
    entries = [corpus] if isinstance(corpus, (str, Path, Mapping)) else corpus
    require(
        isinstance(entries, Sequence) and len(entries) > 0,
        f"corpus={corpus!r} names no source. Set it to '{STDLIB}', a path, or a list of paths or {{path, weight}}.",
    )
    sources = [_read_source(entry, text_key, prompt_key) for entry in entries]
    weighted = [source for source in sources if source.weight is not None]
    require(
        len(weighted) in (0, len(sources)),
        f"corpus gives a weight to {len(weighted)} of {len(sources)} sources. Give every source a weight, or none.",
    )
    return sources


@dataclass
class Splitter:
    """Says of each document, whole, whether it is held out for validation.

    A named document goes by the sha256 of its name, so the choice survives an edit of its text; a nameless one by that
    of its text. Of exactly equal texts the first decides for all, so none is on both sides.

    Remembers 16 bytes for each different text (about 100 bytes of memory): 10 million documents take 1 GB.
    """

    validation_fraction: float
    """Share of the documents that is held out, in (0, 0.5]."""
    _side: dict[bytes, bool] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require(
            0 < self.validation_fraction <= 0.5,
            f"validation_fraction={self.validation_fraction} must be above 0 and at most 0.5. Try 0.02.",
        )

    def is_validation(self, document: Document) -> bool:
        of_text = hashlib.sha256((document.prompt + document.text).encode()).digest()
        if document.name is None:
            deciding = of_text
        else:
            deciding = hashlib.sha256(document.name.encode(errors="surrogateescape")).digest()
        held_out = int.from_bytes(deciding[:8], "big") < self.validation_fraction * 2**64
        return self._side.setdefault(of_text[:16], held_out)

    @property
    def different_texts(self) -> int:
        """How many different texts were asked about so far."""
        return len(self._side)


def _read_source(entry: Any, text_key: str, prompt_key: str | None) -> Source:
    if isinstance(entry, (str, Path)):
        return Source(str(entry), text_key=text_key, prompt_key=prompt_key)
    require(isinstance(entry, Mapping), f"corpus: {entry!r} is neither a path nor a mapping {{path, weight}}.")
    for key in entry:
        require(key in _SOURCE_KEYS, f"corpus: unknown key {key!r} in {dict(entry)}; {did_you_mean(key, _SOURCE_KEYS)}")
    require("path" in entry, f"corpus: {dict(entry)} has no path. Write it as {{path: ..., weight: ...}}.")
    weight = entry.get("weight")
    require(
        weight is None or (isinstance(weight, (int, float)) and not isinstance(weight, bool)),
        f"corpus: weight={weight!r} of {entry['path']} is not a number.",
    )
    return Source(
        str(entry["path"]),
        weight=None if weight is None else float(weight),
        text_key=entry.get("text_key") or text_key,
        prompt_key=entry.get("prompt_key") or prompt_key,
        glob=entry.get("glob") or "*",
    )


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((file.relative_to(root).as_posix(), file) for file in root.rglob("*.py") if file.is_file())
    files = [(name, file) for name, file in files if _is_stdlib_source(name)]
    require(
        bool(files),
        f"corpus={STDLIB}: this Python keeps no .py files in {root}. Set corpus to a folder of text files.",
        NothingThere,
    )
    return files


def _is_stdlib_source(name: str) -> bool:
    parts = name.split("/")
    if _STDLIB_NOT_SOURCE.intersection(parts) or name.startswith(_STDLIB_BROKEN_ON_PURPOSE):
        return False
    if parts[-1].startswith("_sysconfigdata") or parts[0].startswith("config-"):
        return False  # generated: how and where this interpreter was built
    return not (parts[0] == "test" and parts[-1].startswith("bad"))


def _whole_text(file: Path, *, skip_undecodable: bool) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        require(
            skip_undecodable,
            f"corpus: {file} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start}). "
            "Convert it (iconv -t UTF-8), take it out of the folder, or choose files with glob.",
        )
    except OSError as error:
        raise _unreadable(file, error) from error


def _jsonl_texts(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Of each record what stands under `keys`: the text's, and the prompt's if there are prompts."""
    try:
        for here, record in read_jsonl(file, f"corpus: {file}", holds="a text"):
            for key, (name, what) in zip(keys, _KEYS, strict=False):
                require(
                    key in record,
                    f"{here} has no key {name}={key}; {did_you_mean(key, record)} "
                    f"Set {name} to the one that holds the {what}.",
                )
                require(
                    isinstance(record[key], str),
                    f"{here}: {key} is {type(record[key]).__name__}, not a string. "
                    f"Set {name} to the key that holds the {what}.",
                )
            yield tuple(_without_lone_surrogates(record[key]) for key in keys)
    except OSError as error:
        raise _unreadable(file, error) from error


def _without_lone_surrogates(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and cannot be encoded; it becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet_texts(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        for key, (name, what) in zip(keys, _KEYS, strict=False):
            require(
                key in names,
                f"corpus: {file} has no column {name}={key}; {did_you_mean(key, names)} "
                f"Set {name} to the one that holds the {what}.",
            )
            kind = table.schema_arrow.field(key).type
            require(
                pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind),
                f"corpus: {file}: column {key} holds {kind}, not strings. Set {name} to the one with the {what}.",
            )
        for batch in table.iter_batches(batch_size=1024, columns=list(keys)):
            rows = zip(*(batch.column(key).to_pylist() for key in keys), strict=True)
            yield from (tuple(value or "" for value in row) for row in rows)
    except pyarrow.ArrowException as error:
        raise Mistake(f"corpus: {file} is not a readable Parquet file ({error}). Write it again.") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> Mistake:
    return Mistake(f"corpus: {file} cannot be read ({error.strerror or error}). Repair it or take it out of corpus.")
