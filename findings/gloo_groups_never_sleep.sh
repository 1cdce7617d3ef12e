#!/usr/bin/env bash
# torch 2.13.0, gloo: a process group that nobody uses is not idle. Each keeps an event loop of its own
# (`gloo_tcp_loop`) that wakes about a hundred times a second for as long as the group's object lives; after
# destroy_process_group it goes on until the last reference is gone. Also where the group has one rank.
#
# Megatron-core makes some twenty groups for a run of one rank, and as many again for each further layout, so a process
# that waits wakes 2000 times a second: about 2% of a core here, which multiplies with ranks, and a load average of 20
# to 40 that says nothing of how busy a machine is. NCCL's groups have no such loop.
#
# Seen on 2026-11-30, Python 3.11, two cores:
#
#     {"loops": 21, "wakes_per_second_each": 95, "after_destroying": 21, "after_forgetting": 1}
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 'numpy<3'

cat >"$place/look.py" <<'PY'
import gc
import json
import sys
import time
from pathlib import Path

import torch.distributed as dist


def wakes() -> dict[Path, int]:
    """Thread of a loop -> how often it has gone to sleep."""
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        if "gloo_tcp_loop" in (thread / "comm").read_text():
            [line] = [line for line in (thread / "status").read_text().splitlines() if line.startswith("voluntary_ctxt")]
            found[thread] = int(line.split()[1])
    return found


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
groups = [dist.new_group([0]) for _ in range(20)]
before, began = wakes(), time.monotonic()
time.sleep(5)
after, seconds = wakes(), time.monotonic() - began
each = sum(after[thread] - before[thread] for thread in before) / len(before) / seconds
for group in groups:
    dist.destroy_process_group(group)
destroyed = len(wakes())
del groups, group
gc.collect()
said = {"loops": len(before), "wakes_per_second_each": round(each), "after_destroying": destroyed}
print(json.dumps(said | {"after_forgetting": len(wakes())}))
assert len(before) == destroyed == 21 and len(wakes()) == 1 and 40 < each < 150
PY
"$place/venv/bin/python" "$place/look.py" "$place/met"
