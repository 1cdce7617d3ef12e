#!/usr/bin/env bash
# megatron-core 0.15.3: `perform_initialization=False` is for models whose weights a checkpoint will fill. It also leaves
# the split weights without the mark `tensor_model_parallel`, which is set where they are drawn. Megatron's optimizer takes
# an unmarked parameter for a copy of the first tensor-parallel rank's and leaves it out on the others, so that the
# gradient's norm, and the clipping by it, count one shard of every matrix: with two ranks and gradients of 1, a norm of
# 8 where 11.31 is right. Nothing is said, and the loss falls all the same.
#
# Seen on 2026-11-29, Python 3.11, torch 2.13.0, two gloo ranks on a CPU, a ColumnParallelLinear of 8 x 16, 8 x 8 a rank:
#
#     perform_initialization=True:  norm 11.31, counted on 2 of 2 ranks
#     perform_initialization=False: norm 8.00, counted on 1 of 2 ranks
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.15.3 'numpy<2'

cat >"$place/norm.py" <<'PY'
import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, param_is_not_tensor_parallel_duplicate

dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
for drawn in (True, False):
    config = ModelParallelConfig(
        tensor_model_parallel_size=2, use_cpu_initialization=True, perform_initialization=drawn
    )
    linear = ColumnParallelLinear(
        8, 16, config=config, init_method=torch.nn.init.ones_, bias=False, skip_bias_add=False
    )
    counted = param_is_not_tensor_parallel_duplicate(linear.weight)  # what MegatronOptimizer asks before it sums
    sums = torch.tensor([linear.weight.numel() * 1.0 if counted else 0.0, float(counted)])
    dist.all_reduce(sums)
    if dist.get_rank() == 0:
        name = f"perform_initialization={drawn}:"
        print(f"{name:30}norm {sums[0].sqrt():.2f}, counted on {int(sums[1])} of 2 ranks", flush=True)
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$place/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$place/norm.py" \
    2>"$place/log" | tee "$place/said" || { cat "$place/log" >&2 && exit 1; }
grep -q 'True:  *norm 11.31, counted on 2 of 2' "$place/said"
grep -q 'False:  *norm 8.00, counted on 1 of 2' "$place/said"
