"""The chain where the image has transformers 5, which NeMo 2.7's own bound does not foresee."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from support.tiny import quickstart_overrides, write_corpus, write_teacher
from support.transformers5 import FOLDER


@pytest.mark.slow
def test_a_model_is_compressed_and_exported_beside_transformers_5(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    teacher = write_teacher(tmp_path / "teacher", corpus)
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run(
        [sys.executable, "-m", "minitron_nemo.cli", "compress", *quickstart_overrides(tmp_path, teacher, corpus)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (FOLDER, source))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    export = open_artifact(tmp_path / "run" / "export", made_by=("export-hf",))
    assert export.metrics["max_relative_logit_difference"] < 1e-4
    assert export.facts["sample"]
