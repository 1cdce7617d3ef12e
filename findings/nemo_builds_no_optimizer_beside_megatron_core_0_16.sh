#!/usr/bin/env bash
# nemo-toolkit 2.7.0 (and 2.7.3) beside megatron-core 0.16.0: the pair that NVIDIA names for its image 26.02, the last one
# with nemo.collections.llm. Everything imports, and nothing trains:
#
#     TypeError: get_megatron_optimizer() got an unexpected keyword argument 'no_weight_decay_cond'
#
# NeMo's setup_megatron_optimizer names no_weight_decay_cond, scale_lr_cond and lr_mult, which megatron-core 0.16 gave up
# for config_overrides. The wheels of the package index say so; the image itself was not at hand, and may be patched. It
# is made good by a get_megatron_optimizer that makes config_overrides of the three.
#
# Seen on 2026-11-30, Python 3.11, torch 2.13.0 for CPUs, on which 0.15 goes on until it wants a GPU:
#
#     {"megatron-core": "0.15.3", "nemo-toolkit": "2.7.3", "optimizer": "arguments taken"}
#     {"megatron-core": "0.16.0", "nemo-toolkit": "2.7.0", "optimizer": "get_megatron_optimizer() got an unexpected ..."}
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
pip() { "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 megatron-core==0.15.3 'nemo-toolkit[lightning,common-only]==2.7.3' nemo-run==0.11.1 \
    transformers==4.57.6 'leptonai>=0.26.6,<0.27' 'nvidia-modelopt>=0.37,<0.38' 'tensorstore<0.1.72' 'zarr<3' 'numpy<2' \
    'protobuf>=5.29.5,<6' 'packaging>=24.2,<25' 'datasets<4.1' 'pyarrow<21' tiktoken sacrebleu
pip --no-deps --target "$place/image" megatron-core==0.16.0 nemo-toolkit==2.7.0 nvidia-modelopt==0.41.0

cat >"$place/look.py" <<'PY'
import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm  # noqa: F401
from nemo.lightning._strategy_lib import setup_megatron_optimizer

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model = torch.nn.Linear(4, 4)
model.ddp_config = DistributedDataParallelConfig()  # as Megatron's own wrapper has it, which wants a GPU
try:
    setup_megatron_optimizer([SimpleNamespace(module=model)], OptimizerConfig(optimizer="adam", lr=1e-3))
    said = "arguments taken"
except TypeError as error:
    said = str(error)
except (AssertionError, RuntimeError) as error:
    assert "CUDA" in str(error) or "NVIDIA" in str(error), error
    said = "arguments taken"
print(json.dumps({name: version(name) for name in ("megatron-core", "nemo-toolkit")} | {"optimizer": said}))
PY
look() { "$place/venv/bin/python" "$place/look.py" "$place/met-$1" 2>"$place/log" || { cat "$place/log" >&2 && exit 1; }; }
look alone | tail -n 1 | tee "$place/15.json"
PYTHONPATH="$place/image" look image | tail -n 1 | tee "$place/16.json"
grep -q '0.15.3.*arguments taken' "$place/15.json"
grep -q "0.16.0.*unexpected keyword argument 'no_weight_decay_cond'" "$place/16.json"
