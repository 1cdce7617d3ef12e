"""Documents: where text comes from, in which order, and which of it is held out.

A corpus is one or several sources: text files (one document each), JSONL or Parquet files (one document a record: a
text, a prompt with its answer, or a chat), or folders of these; text and JSONL also as .gz or .zst. The order is the
sorted relative path, then the record's place in its file: the same everywhere.

The embedded corpus, `stdlib`, is the source of the running interpreter's own standard library: real text on every
machine, without a network. It is licensed under the PSF licence, and differs a little between Python versions; since
files are held out by name, a file held out under one version is held out under the next.

Nothing here writes or communicates; what cannot be read raises before a later stage writes.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.checks import NothingThere, did_you_mean, require
from minitron_nemo.config.data import STDLIB
from minitron_nemo.text.chats import TOOLS, Chat, read_chat
from minitron_nemo.text.records import has_records, read_records, whole_text

TRAIN, VALIDATION = "train", "validation"
"""The splits."""
STDLIB_LICENCE = "PSF-2.0 (Python Software Foundation License); some modules add their own compatible notice"
_STDLIB_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}
_STDLIB_BROKEN_ON_PURPOSE = ("lib2to3/tests/data/", "test/test_lib2to3/data/")
_SOURCE_KEYS = ("path", "weight", "text_key", "prompt_key", "messages_key", "glob")


@dataclass(frozen=True)
class Document:
    """One document; `name` is its path relative to the source, None for a record of a JSONL or Parquet file."""

    name: str | None
    text: str
    prompt: str | None = None
    """What stands before the text and is not to be learned; None: it answers nothing."""
    chat: Chat | None = None
    """What the text is written from, by a tokenizer's template; then only the assistant's part is learned."""

    @property
    def whole(self) -> str:
        return (self.prompt or "") + self.text


@dataclass
class Reading:
    """How records become documents, and how many did not."""

    render: Callable[[Chat], str] | None = None
    """Writes a chat as text; None: a chat is an error."""
    max_characters: int | None = None
    """Longer documents are left out; None: none are."""
    documents: int = 0
    null: int = 0
    """Records whose text or messages are null."""
    empty: int = 0
    """Documents of nothing but white space, and chats without an answer."""
    too_long: int = 0
    first_null: str | None = None
    """Where the first of them stands."""

    def _take(self, document: Document | None) -> Iterator[Document]:
        """The document, if it is one."""
        if document is None or not document.text or document.text.isspace():
            self.empty += 1
        elif self.max_characters is not None and len(document.whole) > self.max_characters:
            self.too_long += 1
        else:
            self.documents += 1
            yield document

    def _skip_null(self, where: str) -> None:
        self.null += 1
        self.first_null = self.first_null or where


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
    messages_key: str = "messages"
    """That of a chat's messages, in records without a text."""
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

    def documents(self, reading: Reading | None = None) -> Iterator[Document]:
        """Every document that is more than white space.

        Args:
            reading: how, and what counts those left out.
        Raises: ValueError: a file or record that cannot be read.
        """
        reading = reading or Reading()
        for name, file in self.files():
            if has_records(file):
                for where, record in read_records(file, self._columns, text=self.text_key, chat=self.messages_key):
                    yield from self._of_record(record, where, reading)
            else:
                text = whole_text(file, skip_undecodable=self.path == STDLIB)
                if text is not None:
                    yield from reading._take(Document(name, text))

    @property
    def _columns(self) -> dict[str, str]:
        """The keys that are read, and the config key that chose each."""
        columns = {self.text_key: "text_key", self.messages_key: "messages_key", TOOLS: ""}
        return columns if self.prompt_key is None else columns | {self.prompt_key: "prompt_key"}

    def _of_record(self, record: Mapping[str, Any], where: str, reading: Reading) -> Iterator[Document]:
        text, messages = record.get(self.text_key), record.get(self.messages_key)
        if text is not None:
            prompt = None if self.prompt_key is None else self._string(record, self.prompt_key, "prompt", where) or ""
            yield from reading._take(Document(None, self._string(record, self.text_key, "text", where), prompt))
        elif messages is not None:
            chat = read_chat(messages, record.get(TOOLS), where)
            require(
                reading.render is not None,
                f"{where} is a chat, which a tokenizer's chat template writes as text. Set tokenizer to one of a chat "
                "model, or text_key to the key of a text.",
            )
            text = _without_lone_surrogates(reading.render(chat)) if chat.has_answer else ""  # type: ignore[misc]
            yield from reading._take(Document(None, text, chat=chat))
        elif self.text_key in record or self.messages_key in record:
            reading._skip_null(where)
        else:
            self._string(record, self.text_key, "text", where)

    def _string(self, record: Mapping[str, Any], key: str, what: str, where: str) -> str:
        require(
            key in record,
            f"{where} has no key {what}_key={key}; {did_you_mean(key, record)} Set {what}_key to the one that holds "
            f"the {what}.",
        )
        value = record[key]
        require(
            isinstance(value, str) or (value is None and what == "prompt"),
            f"{where}: {key} is {type(value).__name__}, not a string. Set {what}_key to the key that holds the {what}.",
        )
        return _without_lone_surrogates(value or "")


def read_corpus(
    corpus: Any, *, text_key: str = "text", prompt_key: str | None = None, messages_key: str = "messages"
) -> list[Source]:
    """The sources named by the config key `corpus`.

    Args:
        corpus: `stdlib`, a path, or a list of paths or of mappings {path, weight, text_key, prompt_key, messages_key,
            glob}.
    Raises: ValueError: an empty list, an unknown key, or weights on some sources only.
    """
    entries = [corpus] if isinstance(corpus, (str, Path, Mapping)) else corpus
    require(
        isinstance(entries, Sequence) and len(entries) > 0,
        f"corpus={corpus!r} names no source. Set it to '{STDLIB}', a path, or a list of paths or {{path, weight}}.",
    )
    sources = [_read_source(entry, text_key, prompt_key, messages_key) for entry in entries]
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
        of_text = hashlib.sha256(document.whole.encode()).digest()
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


def _read_source(entry: Any, text_key: str, prompt_key: str | None, messages_key: str) -> Source:
    if isinstance(entry, (str, Path)):
        return Source(str(entry), text_key=text_key, prompt_key=prompt_key, messages_key=messages_key)
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
        messages_key=entry.get("messages_key") or messages_key,
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


def _without_lone_surrogates(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and cannot be encoded; it becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
