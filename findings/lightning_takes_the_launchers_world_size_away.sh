#!/usr/bin/env bash
# lightning 2.4.0: where a launcher other than torchrun or SLURM started the ranks (Open MPI with a wrapper, a shell loop
# that exports RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK), the end of `trainer.fit` with a DDP strategy
# deletes WORLD_SIZE from the process's environment, and RANK stays. What comes later in the process and joins a new
# process group by `env://` is refused, or, where it asks whether it was launched, takes itself for a plain process. Two
# stages in one process, of which the first trains, meet that. Under torchrun another class answers, and it stays.
#
# Seen on 2026-11-29, Python 3.11, torch 2.13.0, one process on a CPU:
#
#     a launcher of one's own: WORLD_SIZE before 1, after None; RANK after 0
#     torchrun:                WORLD_SIZE before 1, after 1; RANK after 0
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lightning==2.4.0 'numpy<2' 'setuptools<81'

cat >"$place/fit.py" <<'PY'
import logging
import os
import sys
import warnings

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

before = os.environ.get("WORLD_SIZE")
quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
options = dict.fromkeys(quiet, False) | {"strategy": "ddp"}
pl.Trainer(accelerator="cpu", devices=1, max_steps=1, limit_val_batches=0, **options).fit(BoringModel())
after, rank = os.environ.get("WORLD_SIZE"), os.environ.get("RANK")
print(f"{sys.argv[1]:25}WORLD_SIZE before {before}, after {after}; RANK after {rank}", flush=True)
PY
export OMP_NUM_THREADS=1
{
    RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29581 \
        "$place/venv/bin/python" "$place/fit.py" "a launcher of one's own:"
    "$place/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 1 "$place/fit.py" "torchrun:"
} 2>"$place/log" | tee "$place/said" || { cat "$place/log" >&2 && exit 1; }
grep -q "own: *WORLD_SIZE before 1, after None; RANK after 0" "$place/said"
grep -q "torchrun: *WORLD_SIZE before 1, after 1; RANK after 0" "$place/said"
