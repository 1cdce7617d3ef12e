"""What benchmarks of two versions of this project share: where the files of each are, and what its processes see."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def checkout(name: str) -> Iterator[Path]:
    """The files of a version: `name` is a folder that holds them, or a revision of this repository.

    A revision's files stand in a temporary folder for as long as the context lasts.
    Raises: SystemExit: neither.
    """
    if (Path(name) / "src" / "minitron_nemo").is_dir():
        yield Path(name).resolve()
        return
    with TemporaryDirectory(prefix="minitron-") as folder:
        packed = subprocess.run(["git", "-C", str(ROOT), "archive", name], stdout=subprocess.PIPE)
        if packed.returncode:
            raise SystemExit(
                f"{name} is neither a folder with src/minitron_nemo in it nor a revision of this repository."
            )
        subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
        yield Path(folder)


def environment(tree: Path) -> dict[str, str]:
    """That of a process which imports the project from `tree`; one thread, so that sums keep their order."""
    return os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
