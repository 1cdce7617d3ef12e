"""What a search has measured, kept beside its output: one that was killed measures nothing twice.

One JSON file, written anew by rank 0 after each measurement and put in place by a rename.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from minitron_nemo.checks import reading
from minitron_nemo.config.identity import differences
from minitron_nemo.parallel import rank_zero_works

Entry = dict[str, float]


class Ledger:
    """Name -> numbers. Every rank makes one, asks it and puts into it the same."""

    def __init__(self, file: Path, made_by: dict[str, Any]) -> None:
        """
        Args:
            made_by: all that decides the numbers; those of another are thrown away, with a line that says so.
        """
        self._file, self._made_by = file, made_by
        self._entries: dict[str, Entry] = rank_zero_works(self._read)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def put(self, name: str, entry: Entry) -> None:
        """Communicates: all ranks."""
        self._entries[name] = entry
        rank_zero_works(partial(self._write, self._entries))

    def _read(self) -> dict[str, Entry]:
        if not self._file.is_file():
            return {}
        with reading(self._file, f"Remove {self._file}: what it held is measured again."):
            found = json.loads(self._file.read_text())
            then, entries = found["made_by"], found["entries"]
        for key, before, now in differences(then, self._made_by):
            words = f"was measured with {key}={before}, not {now}: everything is measured again"
            print(f"{self._file} {words}.", file=sys.stderr, flush=True)
            return {}
        return dict(entries)

    def _write(self, entries: dict[str, Entry]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self._file.with_name(self._file.name + ".partial")
        partial_file.write_text(json.dumps({"made_by": self._made_by, "entries": entries}, indent=1) + "\n")
        os.replace(partial_file, self._file)
