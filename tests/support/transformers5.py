"""The newest transformers beside the 4.57 that NeMo allows: a second folder of packages, used by a process of its own.

`make test` installs it from constraints/transformers-5.txt as `<environment>/transformers-5`. The process has the
environment's torch, and those packages in front.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("MINITRON_TRANSFORMERS5", Path(sys.prefix) / "transformers-5"))


def transformers5(code: str, *arguments: str | Path) -> Any:
    """What `code` prints last, read as JSON; `arguments` are its `sys.argv[1:]`."""
    assert (FOLDER / "transformers").is_dir(), f"no transformers 5 in {FOLDER}: run `make test` once"
    return in_a_process(code, *arguments, PYTHONPATH=str(FOLDER))


def transformers4(code: str, *arguments: str | Path) -> Any:
    """The same with the environment's own."""
    return in_a_process(code, *arguments, PYTHONPATH="")


def in_a_process(code: str, *arguments: str | Path, **environment: str) -> Any:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
