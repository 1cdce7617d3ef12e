"""A stage typed in a shell inside a SLURM allocation is the one process it is, whatever the allocation holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nemo.lightning import io

from minitron_nemo.artifact import open_artifact
from support.door import environment
from support.tiny import TinyChain

ALLOCATION = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "main",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}
DESCRIBE = """
import sys
from pathlib import Path
from minitron_nemo.nemo.context import write_context
from minitron_nemo.runtime.model_artifact import read_shape
write_context(read_shape(Path(sys.argv[1]), key="model", foreign=None), Path(sys.argv[1]))
"""


def run_in_allocation(*command: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command], env=environment() | ALLOCATION, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_stages_run_alone_in_an_allocation(tiny_chain: TinyChain, tmp_path: Path) -> None:
    common = [*tiny_chain.overrides, f"run_dir={tmp_path}", f"prepare_data.output={tiny_chain.run_dir / 'data'}"]
    run_in_allocation("-m", "minitron_nemo.cli", "import-hf", *common, cwd=tmp_path)
    training = ["pretrain.training.steps=2", "pretrain.training.validation_every=0", "trainer.tensorboard=true"]
    training += ["pretrain.training.optim.warmup_steps=1"]
    begin = f"pretrain.initial={tmp_path / 'teacher'}"
    run_in_allocation("-m", "minitron_nemo.cli", "pretrain", *common, begin, *training, cwd=tmp_path)
    assert open_artifact(tmp_path / "pretrained").metrics["tokens"] > 0
    assert list((tmp_path / "pretrained" / "tensorboard").iterdir())  # rank 0's, which NeMo took for rank 3
    for name in ("teacher", "pretrained"):
        assert type(io.load_context(tmp_path / name / "context", subpath="model")).__name__ == "LlamaModel"


def test_a_context_is_the_same_inside_an_allocation(tiny_chain: TinyChain, tmp_path: Path) -> None:
    """Also for who calls the library without its commands."""
    for name in ("shape.json", "tokenizer"):
        os.symlink(tiny_chain.run_dir / "teacher" / name, tmp_path / name)
    run_in_allocation("-c", DESCRIBE, str(tmp_path), cwd=tmp_path)
    files = [file.name for file in sorted((tiny_chain.run_dir / "teacher" / "context").iterdir())]
    assert [file.name for file in sorted((tmp_path / "context").iterdir())] == files
    for name in ("io.json", "model.yaml"):
        ours, expected = (place / "context" / name for place in (tmp_path, tiny_chain.run_dir / "teacher"))
        assert ours.read_text() == expected.read_text()
