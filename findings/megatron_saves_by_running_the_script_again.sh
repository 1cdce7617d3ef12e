#!/usr/bin/env bash
# megatron-core 0.15.3: `dist_checkpointing.save`, called as the blocking function it is, starts a helper process by
# multiprocessing's `spawn`, which imports the script that called it once more. A script without a `__main__` guard (which
# `torchrun` does not ask for, and which training scripts and notebooks turned into scripts often lack) therefore runs
# from its first line again in the middle of its first checkpoint, hours into the job, and the save ends in an EOFError
# that names neither. With a guard what stands outside it still runs once more.
#
# Seen on 2026-11-30, Python 3.11, torch 2.13.0, one gloo process on a CPU:
#
#     with a guard:    first line ran 2 times, saved
#     without a guard: first line ran 2 times, EOFError
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.15.3 psutil==7.2.2 'numpy<2'

cat >"$place/guarded.py" <<'PY'
import os
import pathlib
import sys

with open(os.environ["RUNS"], "a") as runs:
    runs.write("x")

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda device=None: None  # a save asks for a device, there or not
    torch.cuda.current_device = lambda: "cpu"


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    weight = dist_checkpointing.ShardedTensor.from_rank_offsets("weight", torch.ones(4), replica_id=0)
    dist_checkpointing.save({"weight": weight}, str(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
PY
sed 's/^if __name__ == "__main__":$/if True:/' "$place/guarded.py" >"$place/unguarded.py"
export OMP_NUM_THREADS=1
for which in guarded unguarded; do
    : >"$place/runs"
    outcome=saved
    RUNS="$place/runs" timeout 300 "$place/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 1 \
        "$place/$which.py" "$place/checkpoint_$which" >"$place/log_$which" 2>&1 ||
        outcome="$(grep -o 'EOFError' "$place/log_$which" | head -n 1)"
    case $which in guarded) name="with a guard:" ;; *) name="without a guard:" ;; esac
    printf '%-17sfirst line ran %s times, %s\n' "$name" "$(wc -c <"$place/runs")" "$outcome"
done | tee "$place/said"
grep -q '^with a guard: *first line ran 2 times, saved' "$place/said"
grep -q '^without a guard: *first line ran 2 times, EOFError' "$place/said"
