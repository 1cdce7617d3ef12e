"""The next major transformers, which the suite keeps beside the one of this environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def transformers5(code: str, *args: str) -> Any:
    """What source text run with transformers 5 prints as its last line, from JSON; `args` are its sys.argv[1:]."""
    folder = Path(os.environ.get("MINITRON_TRANSFORMERS5", Path(sys.prefix) / "transformers-5"))
    if not folder.is_dir():
        pytest.skip(f"transformers 5 is not at {folder}")
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
