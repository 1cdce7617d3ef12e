"""NeMo, Megatron-core and ModelOpt as NVIDIA's last image with `nemo.collections.llm` has them: a second folder of
packages, used by processes of their own.

`make test` installs it from constraints/nemo-26.02.txt as `<environment>/nemo-26.02`. A process has the environment's
torch and all the rest, and those packages in front.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.door import ROOT
from support.patience import run_patiently

FOLDER = Path(os.environ.get("MINITRON_LAST_IMAGE", Path(sys.prefix) / "nemo-26.02"))


def on_the_last_image(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python arguments...` at the root of this checkout, finished and not failed."""
    assert (FOLDER / "nemo").is_dir(), f"no NeMo of the last image in {FOLDER}: run `make test` once"
    path = os.pathsep.join(map(str, (FOLDER, ROOT / "src")))
    done = run_patiently(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done
