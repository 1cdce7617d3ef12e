"""What does an importance pass cost beside the plain forward pass over the same data?

Both run alternately in one process, on the machine's CPU or GPU: the forward pass (loss of each token), bare and with
every hook on, which is all nine aggregations of every width axis. The outputs must be equal to the bit before any clock
starts. The answer leads with the ratio importance / forward; it should stay below 1.10 on a CPU and 1.05 on a GPU, and
the command fails where it does not. `--save` keeps the result in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform as machine
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo import platform
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.importance.watches import Watch
from minitron_nemo.parallel import Groups
from minitron_nemo.shape import ModelShape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.megatron import bare_model, causal_mask, start_alone

QUICKSTART = ModelShape(
    family="llama",
    num_layers=6,
    hidden_size=224,
    ffn_hidden_size=640,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=32,
    padded_vocab_size=4096,
    seq_length=256,
)
"""The quickstart's teacher."""
WIDE = dataclasses.replace(
    QUICKSTART,
    num_layers=3,
    hidden_size=1536,
    ffn_hidden_size=4096,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=128,
    padded_vocab_size=8192,
    seq_length=1024,
)
"""Layers of a model of about 1B parameters, fewer of them."""
CASES = [  # name, shape, seq_length, micro_batch, micro-batches a pass
    ("quickstart teacher", QUICKSTART, 256, 8, 8),
    ("wide", WIDE, 512, 2, 2),
    ("wide, long", WIDE, 1024, 1, 2),
]
REPEATS, SECONDS = 16, 90
"""At least so many, for at least so long, of short passes: a machine's speed changes over seconds. Which of the two
comes first alternates."""
LIMIT = {"cpu": 1.10, "cuda": 1.05}


def setup(shape: ModelShape, dtype: torch.dtype, seq_length: int, rows: int) -> dict[str, Any]:
    torch.manual_seed(0)
    device = platform.device()
    model = bare_model(shape, dtype=dtype).to(device).eval()
    tokens = torch.randint(shape.padded_vocab_size, (rows, seq_length + 1), device=device)
    return {
        "shape": shape,
        "model": model,
        "mask": torch.ones(rows, seq_length, device=device),
        "input": {
            "input_ids": tokens[:, :-1],
            "position_ids": torch.arange(seq_length, device=device).expand(rows, seq_length),
            "attention_mask": causal_mask(seq_length).to(device),
            "labels": tokens[:, 1:].contiguous(),
        },
    }


def forward(case: dict[str, Any], passes: int) -> Tensor:
    for _ in range(passes):
        losses = case["model"](**case["input"])
    return losses


def importance(case: dict[str, Any], passes: int) -> Tensor:
    with ImportanceEstimator(case["model"], case["shape"], Groups()) as estimator:
        for _ in range(passes):
            estimator.sample(case["mask"])
            losses = case["model"](**case["input"])
        estimator.finish()
    return losses


def seconds_of(run: Callable[[], Any]) -> float:
    synchronise()
    begin = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - begin


def synchronise() -> None:
    if platform.has_accelerator():
        torch.cuda.synchronize()


def seconds_by_hook(case: dict[str, Any], passes: int) -> dict[str, float]:
    """Seconds inside each kind of hook over `passes` micro-batches."""
    spent: dict[str, float] = defaultdict(float)
    see = Watch.see

    def timed(watch: Watch, activation: Tensor) -> None:
        spent[watch.name.split(".", 3)[-1]] += seconds_of(lambda: see(watch, activation))

    Watch.see = timed  # type: ignore[method-assign]
    try:
        importance(case, passes)
    finally:
        Watch.see = see  # type: ignore[method-assign]
    return spent


def measure(name: str, shape: ModelShape, dtype: torch.dtype, seq_length: int, rows: int, passes: int) -> dict:
    case = setup(shape, dtype, seq_length, rows)
    assert torch.equal(forward(case, 1), importance(case, 1)), "the hooks changed the model's output"
    seconds: dict[Callable, list[float]] = {forward: [], importance: []}
    began = time.monotonic()
    while len(seconds[forward]) < REPEATS or time.monotonic() - began < SECONDS:
        for run in (forward, importance) if len(seconds[forward]) % 2 else (importance, forward):
            seconds[run].append(seconds_of(lambda run=run: run(case, passes)))
    ratios = sorted(i / f for i, f in zip(seconds[importance], seconds[forward], strict=True))
    plain = statistics.median(seconds[forward])
    return {
        "case": name,
        "s, b, l, h, f, n, g, d, v": [
            seq_length,
            rows,
            shape.num_layers,
            shape.hidden_size,
            shape.ffn_hidden_size,
            shape.num_attention_heads,
            shape.num_query_groups,
            shape.kv_channels,
            shape.padded_vocab_size,
        ],
        "dtype": str(dtype).removeprefix("torch."),
        "time_ratio_20_50_80": [round(ratios[int(q * (len(ratios) - 1))], 3) for q in (0.2, 0.5, 0.8)],
        "forward_median_ms": round(1e3 * plain, 1),
        "pairs": len(ratios),
        "hooks_percent_of_forward": {
            hook: round(100 * spent / plain, 1) for hook, spent in seconds_by_hook(case, passes).items()
        },
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    save = parser.parse_args().save
    start_alone()
    limit = LIMIT[platform.device().type]
    rows = []
    for name, shape, seq_length, micro_batch, passes in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            row = measure(name, shape, dtype, seq_length, micro_batch, passes)
            rows.append(row)
            low, middle, high = row["time_ratio_20_50_80"]
            hooks = "  ".join(f"{hook} {share}%" for hook, share in row["hooks_percent_of_forward"].items())
            print(
                f"{name:20}{row['dtype']:10}time {middle:.3f}x [{low:.3f}, {high:.3f}]  (importance / forward of "
                f"{row['forward_median_ms']} ms)   {hooks}",
                flush=True,
            )
    if save:
        result = {
            "command": "python benchmarks/importance.py --save",
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if platform.has_accelerator() else machine.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "limit": limit,
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / "importance.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    slow = [row for row in rows if row["time_ratio_20_50_80"][1] > limit]
    for row in slow:
        print(f"{row['case']} {row['dtype']}: {row['time_ratio_20_50_80'][1]} is above the limit of {limit}.")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
