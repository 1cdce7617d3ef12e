"""What does calibrated surgery cost before it saves anything?

    stream        importance with the second moments of the residual stream, beside the plain forward pass: by count of
                  FLOPs for published models, and as measured here on layers of a 1B model
    compensation  one layer shaped as Llama-3.1-8B's (linear_fc2: 14336 inputs, 9216 kept; linear_proj: 4096 inputs, 3
                  of 4 heads kept of each of 8 groups): seconds to sum second moments, then to choose by compensated
                  error and to refit, beside the same done one input at a time in float64 (one_by_one.py among the
                  tests' support), the errors both end at, and peak memory

The first should stay below 1.25; by FLOPs, and as measured on an accelerator, the command fails where it does not. On a
CPU the products of a bf16 model's stream are float32, which its own matrices are not, so the ratio there says little.
The second should take at most 1/5 of the time on a CPU, at an error at most 1% higher; the command fails where it does
not. Its seconds are a core's own, which other processes do not lengthen; an accelerator's are by the clock. The inputs
are correlated, their eigenvalues fall as i^-1.5 (6 orders at f = 14336), and they differ in size.
`make bench-calibration-cost`; `--save` keeps the result in benchmarks/results/, `--only` runs one of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import platform as machine
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from importance import WIDE, forward, seconds_of, setup, start_alone, synchronise
from minitron_nemo import platform
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.least_squares.fits import eliminate_and_refit
from minitron_nemo.parallel import Groups
from minitron_nemo.shape import ModelShape
from support import one_by_one

LIMIT = 1.25
FASTER, ERROR_LIMIT = 5, 1.01
REPEATS = 7
_LLAMA = {"family": "llama", "kv_channels": 128, "num_query_groups": 8, "padded_vocab_size": 128256}
PUBLISHED = {
    "Llama-3.1-8B": ModelShape(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, **_LLAMA
    ),
    "Llama-3.1-70B": ModelShape(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, **_LLAMA
    ),
}
LINEARS = {"linear_proj": (4096, 4096, 128, 8, 3), "linear_fc2": (4096, 14336, 1, 1, 9216)}
"""Outputs, inputs, inputs that go together, pools, blocks that each keeps; the smaller first, as a peak of memory does
not fall."""
RIDGE = 1e-2


def flop_ratio(shape: ModelShape, seq_length: int = 8192) -> float:
    stream = (2 * shape.num_layers + 1) * 2 * shape.hidden_size**2
    return 1 + stream / shape.flops_per_token(seq_length)


def measured_ratio(dtype: torch.dtype) -> list[float]:
    """20, 50 and 80 percentiles of (importance with the stream) / forward, run by turns."""
    case, passes = setup(WIDE, dtype, 512, 2), 2

    def calibration() -> None:
        with ImportanceEstimator(case["model"], WIDE, Groups(), ImportanceConfig(stream="normalised")) as estimator:
            for _ in range(passes):
                estimator.sample(case["mask"])
                case["model"](**case["input"])
            estimator.finish()

    calibration()
    ratios = sorted(seconds_of(calibration) / seconds_of(lambda: forward(case, passes)) for _ in range(REPEATS))
    return [round(ratios[int(q * (REPEATS - 1))], 3) for q in (0.2, 0.5, 0.8)]


def second_moment(inputs: int, tokens: int) -> torch.Tensor:
    """Of random activations, in chunks as compensation sums them."""
    moment = torch.zeros(inputs, inputs, dtype=torch.float64, device=platform.device())
    for start in range(0, tokens, 4096):
        rows = torch.randn(min(4096, tokens - start), inputs, device=moment.device)
        moment += rows.t() @ rows
    return moment


def power_law_moment(inputs: int) -> torch.Tensor:
    """[f, f] float64: eigenvalues i^-1.5, on cosines of inputs in any order and of any sign and size."""
    generator = torch.Generator().manual_seed(0)
    moment = torch.arange(1, inputs + 1, dtype=torch.float64).pow(-1.5).mul(inputs).diag()
    signs = torch.randint(2, (inputs,), generator=generator).double() * 2 - 1
    order = torch.randperm(inputs, generator=generator)
    turn = torch.exp(-0.5j * math.pi / inputs * torch.arange(inputs))
    norm = torch.full((inputs,), math.sqrt(0.5 / inputs), dtype=torch.float64)
    norm[0] /= math.sqrt(2)
    for _ in range(2):  # the orthonormal cosine transform of rows, then of columns
        for rows in moment.split(512):
            mixed = (rows * signs)[:, order]
            rows.copy_((torch.fft.rfft(torch.cat([mixed, mixed.flip(1)], 1))[:, :inputs] * turn).real * norm)
        moment = moment.t().contiguous()
    size = torch.randn(inputs, generator=generator, dtype=torch.float64).mul(0.5).exp()
    return moment.mul_(size).mul_(size.unsqueeze(1)).to(platform.device())


def core_seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    clock = time.perf_counter if platform.has_accelerator() else time.process_time
    synchronise()
    begin = clock()
    found = run()
    synchronise()
    return found, clock() - begin


def compensated(outputs: int, inputs: int, together: int, pools: int, keep: int) -> dict[str, Any]:
    weight = torch.randn(outputs, inputs, device=platform.device()) * inputs**-0.5
    before = peak_gib()
    summing = core_seconds(lambda: second_moment(inputs, 4096))[1]
    moment = power_law_moment(inputs)
    blocks = inputs // together
    asked = torch.arange(pools).repeat_interleave(blocks // pools), torch.full((pools,), keep)
    (kept, refitted), seconds = core_seconds(lambda: eliminate_and_refit(weight, moment, *asked, RIDGE))
    peak = peak_gib()
    off = weight.double() - refitted.weight.double()
    power = ((weight.double() @ moment) * weight).sum()
    error = float(((off @ moment) * off).sum() / power)
    del off
    print(f"{inputs} inputs: {seconds:.1f} s, error {error:.5f}; now one by one", flush=True)
    old_kept, choosing = core_seconds(lambda: one_by_one.eliminate(weight, moment, *asked, RIDGE))
    columns = (old_kept.unsqueeze(1) * together + torch.arange(together)).flatten()
    old, refitting = core_seconds(lambda: one_by_one.refit(weight, moment, columns, RIDGE))
    return {
        "outputs, inputs, together, pools, kept of each": [outputs, inputs, together, pools, keep],
        "seconds_to_sum_4096_tokens": round(summing, 1),
        "seconds_to_choose_and_refit": round(seconds, 1),
        "one_by_one_seconds_to_choose, to refit": [round(choosing, 1), round(refitting, 1)],
        "times_faster": round((choosing + refitting) / seconds, 2),
        "error, as reported": [error, refitted.error],
        "one_by_one_error": old.error,
        "plain_error": old.plain_error,
        "share_of_kept_in_common": len(set(kept.tolist()) & set(old_kept.tolist())) / len(kept),
        "second_moment_gib": round(inputs**2 * 8 / 2**30, 2),
        "peak_gib_before, after, after_one_by_one": [round(gib, 2) for gib in (before, peak, peak_gib())],
    }


def peak_gib() -> float:
    """Of this process, or of the accelerator's memory."""
    if platform.has_accelerator():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def stream() -> dict[str, Any]:
    flops = {name: round(flop_ratio(shape), 3) for name, shape in PUBLISHED.items()}
    for name, ratio in flops.items():
        print(f"stream    {name:16}{ratio:.3f}x the forward pass by FLOPs", flush=True)
    measured = {}
    for dtype in (torch.bfloat16, torch.float32):
        ratios = measured[str(dtype).removeprefix("torch.")] = measured_ratio(dtype)
        print(f"stream    measured {dtype!s:16}{ratios[1]:.3f}x [{ratios[0]:.3f}, {ratios[2]:.3f}]", flush=True)
    return {"limit": LIMIT, "flops": flops, "measured": measured}


def compensation() -> dict[str, Any]:
    rows = {}
    for name, sizes in LINEARS.items():
        row = rows[name] = compensated(*sizes)
        choosing, refitting = row["one_by_one_seconds_to_choose, to refit"]
        peaks = row["peak_gib_before, after, after_one_by_one"]
        error = row["error, as reported"][0] / row["one_by_one_error"]
        print(
            f"{name:12}{row['times_faster']}x faster: {row['seconds_to_choose_and_refit']} s to choose and refit, one "
            f"by one {choosing} + {refitting} s; error {error:.5f} of one by one's {row['one_by_one_error']:.5f} "
            f"(plain {row['plain_error']:.5f}); peak {peaks[1]} GiB ({peaks[2]}), of which a second moment "
            f"{row['second_moment_gib']} GiB; 4096 tokens {row['seconds_to_sum_4096_tokens']} s",
            flush=True,
        )
    old = sum(sum(row["one_by_one_seconds_to_choose, to refit"]) for row in rows.values())
    faster = round(old / sum(row["seconds_to_choose_and_refit"] for row in rows.values()), 2)
    print(f"one layer   {faster}x faster (limit {FASTER}x on a CPU)", flush=True)
    return {"limits": [FASTER, ERROR_LIMIT], "times_faster": faster, "ridge": RIDGE, "linears": rows}


def holds(answer: dict[str, Any]) -> bool:
    ratios = list(answer["stream"]["flops"].values()) if "stream" in answer else []
    if ratios and platform.has_accelerator():
        ratios.append(statistics.median(answer["stream"]["measured"]["bfloat16"]))
    layer = answer.get("compensation", {"times_faster": FASTER, "linears": {}})
    errors = [row["error, as reported"][0] / row["one_by_one_error"] for row in layer["linears"].values()]
    fast = layer["times_faster"] >= FASTER or platform.has_accelerator()
    return max(ratios, default=0) <= LIMIT and max(errors, default=0) <= ERROR_LIMIT and fast


@torch.no_grad()
def main() -> int:
    parts = {"stream": stream, "compensation": compensation}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--only", choices=parts)
    arguments = parser.parse_args()
    start_alone()
    answer = {name: run() for name, run in parts.items() if arguments.only in (None, name)}
    if arguments.save:
        about = {
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if platform.has_accelerator() else machine.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        }
        path = Path(__file__).parent / "results" / "calibration_cost.json"
        result = {"command": "make bench-calibration-cost, with --save; each part says when it was last run"}
        result |= {name: part for name, part in json.loads(path.read_text()).items() if name in parts}
        result |= {name: about | part for name, part in answer.items()}
        path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if holds(answer) else 1


if __name__ == "__main__":
    sys.exit(main())
