"""What a search has measured, kept beside its output: one that was killed measures nothing twice.

One JSON file, written anew by rank 0 after each measurement and put in place by a rename; other processes that make the
same search (search/share.py) write into it too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from minitron_nemo.checks import Mistake, reading, require
from minitron_nemo.config.identity import differences
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.search.share import alone

Entry = dict[str, float]


class Ledger:
    """Name -> numbers. Every rank makes one, asks it and puts into it the same."""

    def __init__(self, file: Path, made_by: dict[str, Any], *, refuses: bool = False) -> None:
        """
        Args:
            made_by: all that decides the numbers; those of another are thrown away, with a line that says so.
            refuses: instead a Mistake, as what lies beside the file cost much and is of another too.
        """
        self._file, self._made_by, self._refuses = file, made_by, refuses
        self._entries: dict[str, Entry] = rank_zero_works(self._begin)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def look(self) -> Collection[str]:
        """Names of all that has been put into it, by other processes too. Communicates: all ranks."""
        self._entries = rank_zero_works(self._read)
        return self._entries.keys()

    def put(self, name: str, entry: Entry) -> None:
        """Communicates: all ranks."""
        self._entries = rank_zero_works(partial(self._add, name, entry))

    def _begin(self) -> dict[str, Entry]:
        with alone(self._lock):
            found = self._load()
            for key, before, now in differences(found["made_by"], self._made_by):
                folder = self._file.parent
                require(
                    not self._refuses,
                    f"{folder} holds candidates that were made with {key}={before}, not {now}. Go on with "
                    f"{key}={before}, or remove {folder} to start over.",
                )
                words = f"was measured with {key}={before}, not {now}: everything is measured again"
                print(f"{self._file} {words}.", file=sys.stderr, flush=True)
                return self._write({})
            return self._write(found["entries"]) if self._refuses else found["entries"]

    def _add(self, name: str, entry: Entry) -> dict[str, Entry]:
        with alone(self._lock):
            return self._write(self._read() | {name: entry})

    def _write(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        partial_file = self._file.with_name(self._file.name + ".partial")
        partial_file.write_text(json.dumps({"made_by": self._made_by, "entries": entries}, indent=1) + "\n")
        os.replace(partial_file, self._file)
        return entries

    def _read(self) -> dict[str, Entry]:
        """Raises: Mistake: another process has begun it anew since."""
        found = self._load()
        for key, before, now in differences(found["made_by"], self._made_by):
            raise Mistake(
                f"{self._file} was begun anew with {key}={before}, not {now}, while this search went on. Processes "
                "that share a search need the same command; give another search another output."
            )
        entries: dict[str, Entry] = found["entries"]
        return entries

    def _load(self) -> dict[str, Any]:
        if not self._file.is_file():
            return {"made_by": self._made_by, "entries": {}}
        with reading(self._file, f"Remove {self._file}: what it held is measured again."):
            found = json.loads(self._file.read_text())
            return {"made_by": found["made_by"], "entries": found["entries"]}

    @property
    def _lock(self) -> Path:
        return self._file.with_suffix(".lock")
