"""What does calibrated surgery cost before it saves anything?

    stream        importance with the second moments of the residual stream, beside the plain forward pass: by count of
                  FLOPs for published models, and as measured here on layers of a 1B model
    compensation  one layer shaped as Llama-3.1-8B's (linear_fc2: 14336 inputs, 9216 kept; linear_proj: 4096 inputs, 24
                  of 32 heads kept): seconds to sum second moments, to choose by compensated error and to refit, and
                  peak memory

The first should stay below 1.25; by FLOPs, and as measured on an accelerator, the command fails where it does not. On a
CPU the products of a bf16 model's stream are float32, which its own matrices are not, so the ratio there says little.
`make bench-calibration-cost`; `--save` keeps the result in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import resource
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from importance import WIDE, forward, seconds_of, setup, start_alone
from minitron_nemo import platform
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.parallel import Groups
from minitron_nemo.pruning.least_squares import eliminate, refit
from minitron_nemo.shape import ModelShape

LIMIT = 1.25
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
LINEARS = {"linear_proj": (4096, 4096, 3072, 128), "linear_fc2": (4096, 14336, 9216, 1)}
"""Outputs, inputs, kept inputs, inputs that go together; the smaller first, as a peak of memory does not fall."""
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


def compensated(outputs: int, inputs: int, keep: int, together: int) -> dict[str, Any]:
    weight = torch.randn(outputs, inputs, device=platform.device()) * inputs**-0.5
    before, tokens = peak_gib(), 4096
    moments = []
    summing = seconds_of(lambda: moments.append(second_moment(inputs, tokens)))
    moment = moments.pop()
    moment.diagonal().add_(tokens)  # fewer tokens than inputs leave it singular
    pools = torch.zeros(inputs // together, dtype=torch.int64)
    choosing = seconds_of(lambda: eliminate(weight, moment, pools, torch.tensor([keep // together]), RIDGE))
    refitting = seconds_of(lambda: refit(weight, moment, torch.arange(keep), RIDGE))
    return {
        "outputs, inputs, kept, together": [outputs, inputs, keep, together],
        "seconds_to_sum_4096_tokens": round(summing, 1),
        "seconds_to_choose": round(choosing, 1),
        "seconds_to_refit": round(refitting, 1),
        "second_moment_gib": round(inputs**2 * 8 / 2**30, 2),
        "peak_gib_before_and_after": [round(before, 2), round(peak_gib(), 2)],
    }


def peak_gib() -> float:
    """Of this process, or of the accelerator's memory."""
    if platform.has_accelerator():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    save = parser.parse_args().save
    start_alone()
    answer: dict[str, Any] = {"flops": {name: round(flop_ratio(shape), 3) for name, shape in PUBLISHED.items()}}
    for name, ratio in answer["flops"].items():
        print(f"stream    {name:16}{ratio:.3f}x the forward pass by FLOPs", flush=True)
    answer["measured"] = {}
    for dtype in (torch.bfloat16, torch.float32):
        ratios = measured_ratio(dtype)
        answer["measured"][str(dtype).removeprefix("torch.")] = ratios
        print(f"stream    measured {dtype!s:16}{ratios[1]:.3f}x [{ratios[0]:.3f}, {ratios[2]:.3f}]", flush=True)
    answer["compensation"] = {}
    for name, sizes in LINEARS.items():
        row = answer["compensation"][name] = compensated(*sizes)
        print(
            f"{name:14}4096 tokens {row['seconds_to_sum_4096_tokens']} s, choice {row['seconds_to_choose']} s, "
            f"refit {row['seconds_to_refit']} s; peak {row['peak_gib_before_and_after'][1]} GiB, of which one second "
            f"moment {row['second_moment_gib']} GiB",
            flush=True,
        )
    if save:
        result = {
            "command": "make bench-calibration-cost, with --save",
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if platform.has_accelerator() else machine.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "limit": LIMIT,
            **answer,
        }
        path = Path(__file__).parent / "results" / "calibration_cost.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    limited = list(answer["flops"].values())
    if platform.has_accelerator():
        limited.append(statistics.median(answer["measured"]["bfloat16"]))
    return 1 if max(limited) > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
