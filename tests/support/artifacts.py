"""Looking at directories of artifacts, and a disk that is too small for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def contents(directory: Path) -> dict[str, str]:
    """sha256 of every file below `directory`, by relative path; folders too, so that an empty one counts."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(directory.rglob("*"))
    }


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of writing of everything below `directory`, by relative path."""
    found = {str(path.relative_to(directory)): path.stat() for path in sorted(directory.rglob("*"))}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def change_manifest(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """As if an artifact had been made otherwise: `change` alters its manifest in place."""
    file = artifact / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]  # of itself; an earlier version's has none
    change(manifest)
    file.write_text(json.dumps(manifest))


@contextmanager
def full_disk(tmp_path: Path, *, kibibytes: int) -> Iterator[Path]:
    """A file system of this size, mounted for the length of the block. Needs root; elsewhere the test is skipped."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(directory)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield directory
    finally:
        # lazily: a reader may have mapped a file of it
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
