"""Does this version of the project make the same student as another one, to the bit?

The quickstart's whole chain from the embedded teacher, with few steps and little text, by both versions at once in this
Python's environment: float32, one thread. Then every model each of them left, as one digest over its tensors: names,
dtypes, shapes and values, as the files hold them, whatever else stands beside.

    make bench-same-student BEFORE=<the other version>
    python benchmarks/same_student.py <the other version> [key=value ...]

A version is a folder that holds its files or a revision of this repository; overrides go to both chains. Exits 1 where
a model differs, or stands on one side alone. Three minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from checkouts import ROOT, checkout, environment
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

TEXT = "asyncio"  # of the standard library: half a megabyte
SMALL = [
    "trainer.precision=fp32",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=8",
    "trainer.tensorboard=false",
    "correct_teacher.training.steps=3",
    "correct_teacher.training.optim.warmup_steps=1",
    "estimate_importance.importance.num_samples=16",
    "distill.training.steps=4",
    "distill.training.validation_every=2",
    "distill.training.validation_batches=1",
    "distill.training.optim.warmup_steps=1",
    "evaluate.num_samples=8",
]


def start_chain(tree: Path, run_dir: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """`minitron compress` of the version in `tree`; what it says goes to `run_dir`.log."""
    corpus = f"prepare_data.corpus={run_dir.with_name('text')}"
    values = ["recipe=quickstart", f"run_dir={run_dir}", corpus, *SMALL, *overrides]
    with run_dir.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "minitron_nemo.cli", "compress", *values],
            cwd=tree,
            env=environment(tree),
            stdout=log,
            stderr=log,
        )


def write_text(folder: Path) -> None:
    folder.mkdir()
    for module in (Path(sysconfig.get_paths()["stdlib"]) / TEXT).glob("*.py"):
        shutil.copy(module, folder)


def digest(weights: Path) -> str:
    """sha256 over what a distributed checkpoint's tensors are and hold, in the order of their names."""
    reader = dcp.FileSystemReader(weights)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(what.size, dtype=what.properties.dtype)
        for name, what in sorted(stored.items())
        if isinstance(what, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of being one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def digests(run_dir: Path) -> dict[str, str]:
    return {folder.parent.name: digest(folder) for folder in sorted(run_dir.glob("*/weights"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="a folder or a revision")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--this", default=str(ROOT), help="another folder or revision than this checkout")
    options = parser.parse_args()
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory()))
        write_text(place / "text")
        trees = {
            side: stack.enter_context(checkout(name))
            for side, name in (("other", options.other), ("this", options.this))
        }
        chains = {side: start_chain(tree, place / side, options.overrides) for side, tree in trees.items()}
        codes = {side: chain.wait() for side, chain in chains.items()}
        for side, code in codes.items():
            if code:
                print(f"the chain of {trees[side]} ended with {code}:\n{(place / f'{side}.log').read_text()[-3000:]}")
        if any(codes.values()):
            return 1
        found = {side: digests(place / side) for side in trees}
    print(f"{'':24}{options.other:68}{options.this}")
    models = sorted(found["other"] | found["this"])
    same = {model: found["other"].get(model) == found["this"].get(model) for model in models}
    for model in models:
        other, this = (found[side].get(model, "is not there") for side in ("other", "this"))
        print(f"{model:24}{other:68}{this:68}{'' if same[model] else 'DIFFERS'}")
    return 0 if models and all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
