"""What does FusedCausalAttention save against Megatron-core's own attention where transformer-engine is absent?

One forward and backward pass of the core attention, both contenders alternately in one process, on the machine's CPU
or GPU. Their results are compared before any clock starts. The answer leads with the ratio fused / Megatron: below 1 is
a gain. `python benchmarks/local_attention.py --save` keeps it in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_nemo import platform
from minitron_nemo.attention import FusedCausalAttention
from minitron_nemo.config.trainer import Layout
from minitron_nemo.runtime.layout import use_layout

CASES = [  # seq_length, micro_batch, heads, groups, kv_channels
    (256, 8, 8, 2, 32),
    (1024, 2, 8, 2, 64),
    (2048, 1, 32, 8, 128),
]
REPEATS = 7


def setup(case: tuple[int, ...], dtype: torch.dtype) -> dict:
    seq_length, rows, heads, groups, channels = case
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * channels,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bf16=dtype == torch.bfloat16,
    )
    make = {"fused": FusedCausalAttention, "megatron": DotProductAttention}
    layers = {
        name: layer(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
        for name, layer in make.items()
    }
    torch.manual_seed(0)
    size = (seq_length, rows)
    device = platform.device()
    query = torch.randn(*size, heads, channels, dtype=dtype, device=device, requires_grad=True)
    key, value = (
        torch.randn(*size, groups, channels, dtype=dtype, device=device, requires_grad=True) for _ in range(2)
    )
    return {
        "layers": layers,
        "inputs": (query, key, value),
        "mask": torch.ones(seq_length, seq_length, dtype=torch.bool, device=device).triu(1)[None, None],
    }


def one_pass(case: dict, name: str) -> torch.Tensor:
    context = case["layers"][name](*case["inputs"], case["mask"])
    context.float().square().mean().backward()
    gradient = case["inputs"][0].grad.clone()
    for tensor in case["inputs"]:
        tensor.grad = None
    return gradient


def synchronise() -> None:
    if platform.has_accelerator():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    save = parser.parse_args().save
    use_layout(Layout(), seed=0)
    rows = []
    for shape in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            case = setup(shape, dtype)
            ours, theirs = one_pass(case, "fused"), one_pass(case, "megatron")
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=5e-2, atol=1e-4)
            seconds: dict[str, list[float]] = {"fused": [], "megatron": []}
            for _ in range(REPEATS):
                for name, timings in seconds.items():
                    synchronise()
                    begin = time.perf_counter()
                    one_pass(case, name)
                    synchronise()
                    timings.append(time.perf_counter() - begin)
            ratios = sorted(f / m for f, m in zip(seconds["fused"], seconds["megatron"], strict=True))
            row = {
                "s, b, n, g, d": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "time_ratio_20_50_80": [round(ratios[int(q * (len(ratios) - 1))], 3) for q in (0.2, 0.5, 0.8)],
                "megatron_median_ms": round(1e3 * statistics.median(seconds["megatron"]), 2),
            }
            rows.append(row)
            low, middle, high = row["time_ratio_20_50_80"]
            print(f"s,b,n,g,d={shape} {row['dtype']:8}  time {middle:.2f}x [{low:.2f}, {high:.2f}]  (fused / Megatron)")
    if save:
        result = {
            "command": "python benchmarks/local_attention.py --save",
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if platform.has_accelerator() else machine.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / "local_attention.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
