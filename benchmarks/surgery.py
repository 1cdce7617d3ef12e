"""What does surgery on disk need beside copying the same bytes: how much longer, and how much memory?

A Llama-shaped model of 1.2 billion parameters with random bf16 weights, as a HF folder and as a model artifact, pruned
to a width and to a depth target. Copies and prunings alternate, each in a process of its own, with the source in the
page cache and everything written before flushed; seconds are those of the call, after imports. Falls short, with exit
status 1, where the median time is over 2x that of copying the model's weights, or the peak resident memory of the
process (Python, torch and NeMo included) over twice the largest tensor + 1 GiB.

`python benchmarks/surgery.py` keeps its table in benchmarks/results/surgery.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: a child's peak memory counts that of the process it was started from.

SHAPE = {
    "family": "llama",
    "num_layers": 16,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 64,
    "padded_vocab_size": 64128,
}
TARGETS = {
    "width": {"hidden_size": 1536, "ffn_hidden_size": 6144, "num_attention_heads": 24},
    "depth": {"num_layers": 8},
}
SHARD_BYTES = 10**9
REPEATS = 5
GIB = 2**30
TIME_LIMIT = 2.0
FREE_DISK, FREE_MEMORY = 12 * GIB, 6 * GIB


# ---- what runs in processes of its own -------------------------------------------------------------------------------


def make(folder: Path) -> dict[str, Any]:
    """The model at folder/hf and folder/artifact, the plans at folder/width and folder/depth."""
    import torch

    from minitron_nemo.axes import parameter_names
    from minitron_nemo.config.trainer import Layout
    from minitron_nemo.hf.checkpoint import hf_tensors, load_hf
    from minitron_nemo.hf.config import hf_config
    from minitron_nemo.hf.families import family_of
    from minitron_nemo.hf.safetensors_stream import Planned, ShardWriter
    from minitron_nemo.nemo.models import build_core, nemo_config
    from minitron_nemo.parallel import Groups
    from minitron_nemo.runtime.distributed_checkpoint import save_weights
    from minitron_nemo.runtime.layout import use_layout
    from minitron_nemo.shape import ModelShape

    shape = ModelShape(**SHAPE)
    tensors = {
        hf_name: Planned(torch.bfloat16, sizes)
        for name in parameter_names(shape)
        for hf_name, sizes in hf_tensors(name, shape, family_of(shape.family), shape.padded_vocab_size)
    }
    writer = ShardWriter(folder / "hf", tensors, SHARD_BYTES)
    for name, tensor in tensors.items():
        writer.append(name, torch.randn(tensor.shape).to(tensor.dtype))
    writer.finish()
    (folder / "hf" / "config.json").write_text(json.dumps(hf_config(shape)))

    use_layout(Layout(), seed=0)
    config = nemo_config(shape, params_dtype=torch.bfloat16, bf16=True, perform_initialization=False)
    core = build_core(config, shape).bfloat16()
    load_hf(core, folder / "hf", shape, Groups.from_megatron())
    save_weights(core, folder / "artifact")
    for name, target in TARGETS.items():
        random_plan(shape, target).save(folder / name)
    return {
        "parameters": shape.num_parameters,
        "largest_tensor_bytes": max(tensor.nbytes for tensor in tensors.values()),
    }


def random_plan(shape: Any, target: dict[str, int]) -> Any:
    import torch

    from minitron_nemo.plan import PruningPlan

    generator = torch.Generator().manual_seed(0)

    def some(have: int, keep: int) -> torch.Tensor:
        return torch.randperm(have, generator=generator)[:keep].sort().values

    smaller, layers, per_group = shape.pruned_to(**target), range(shape.num_layers), shape.heads_per_group
    groups = range(shape.num_query_groups)
    return PruningPlan(
        source=shape,
        target=smaller,
        hidden=some(shape.hidden_size, smaller.hidden_size),
        ffn=torch.stack([some(shape.ffn_hidden_size, smaller.ffn_hidden_size) for _ in layers]),
        head=torch.stack(
            [torch.cat([g * per_group + some(per_group, smaller.heads_per_group) for g in groups]) for _ in layers]
        ),
        group=torch.arange(shape.num_query_groups).repeat(shape.num_layers, 1),
        layer=some(shape.num_layers, smaller.num_layers),
    )


def copy(weights: Path, output: Path) -> None:
    output.mkdir()
    for file in sorted(weights.iterdir()):
        shutil.copyfile(file, output / file.name)


def run_one(kind: str, folder: Path, what: str) -> dict[str, Any]:
    """Copy or prune the HF folder or the artifact's weights; seconds, and this process's peak memory in bytes."""
    output = folder / "output"
    if what == "copy":
        begin = time.perf_counter()
        copy(folder / "hf" if kind == "hf" else folder / "artifact" / "weights", output)
    elif kind == "hf":
        from minitron_nemo.hf.surgery import prune_hf
        from minitron_nemo.plan import PruningPlan

        plan = PruningPlan.load(folder / what)
        begin = time.perf_counter()
        prune_hf(folder / "hf", plan, output, max_shard_bytes=SHARD_BYTES)
    else:
        from minitron_nemo import engine
        from minitron_nemo.plan import PruningPlan
        from minitron_nemo.runtime.checkpoint_surgery import prune_checkpoint
        from minitron_nemo.runtime.model_artifact import ModelInput
        from minitron_nemo.stages.import_hf import embedded_teacher

        plan = PruningPlan.load(folder / what)
        source = ModelInput(folder / "artifact", plan.source, embedded_teacher(), plan.source.padded_vocab_size, None)
        begin = time.perf_counter()
        prune_checkpoint(source, plan, output, meta_core=engine.meta_core)
        engine.describe_model(plan.target, source.tokenizer, output)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_own_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- the table -------------------------------------------------------------------------------------------------------


def measure(kind: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in ("copy", *TARGETS)}
    for repeat in range(REPEATS + 1):
        for what, results in runs.items():
            shutil.rmtree(folder / "output", ignore_errors=True)
            os.sync()
            result = in_own_process("--run", kind, what, "--folder", str(folder))
            if repeat > 0:  # the first round brings the source into the page cache
                results.append(result)
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tmp", help="where the models are made and removed; default: the system's")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make or options.run:
        made = make(options.folder) if options.make else run_one(options.run[0], options.folder, options.run[1])
        print(json.dumps(made))
        return 0
    with tempfile.TemporaryDirectory(dir=options.tmp, prefix="surgery-") as name:
        folder = Path(name)
        free_disk = shutil.disk_usage(folder).free
        free_memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if free_disk < FREE_DISK or free_memory < FREE_MEMORY:
            print(
                f"{folder} has {free_disk / GIB:.1f} GiB free and the machine {free_memory / GIB:.1f} GiB of memory, "
                f"but {FREE_DISK / GIB:.0f} and {FREE_MEMORY / GIB:.0f} are needed. Name a larger disk with --tmp."
            )
            return 1
        model = in_own_process("--make", "--folder", name)
        rows = [row for kind in ("hf", "artifact") for row in table(kind, measure(kind, folder), model)]
    result = {
        "command": "python benchmarks/surgery.py",
        "date": date.today().isoformat(),
        "device": machine.processor() or machine.machine(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "shape": SHAPE,
        "targets": TARGETS,
        **model,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "surgery.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(row["passes"] for row in rows) else 1


def table(kind: str, runs: dict[str, list[dict[str, Any]]], model: dict[str, Any]) -> list[dict[str, Any]]:
    limit = 2 * model["largest_tensor_bytes"] + GIB
    rows = []
    for what in TARGETS:
        ratios = sorted(p["seconds"] / c["seconds"] for p, c in zip(runs[what], runs["copy"], strict=True))
        peak = max(run["peak_bytes"] for run in runs[what])
        row = {
            "kind": kind,
            "target": what,
            "time_ratio_20_50_80": [round(ratios[int(q * (len(ratios) - 1))], 2) for q in (0.2, 0.5, 0.8)],
            "copy_median_seconds": round(statistics.median(run["seconds"] for run in runs["copy"]), 2),
            "peak_bytes": peak,
            "peak_limit_bytes": limit,
        }
        low, middle, high = row["time_ratio_20_50_80"]
        row["passes"] = middle <= TIME_LIMIT and peak <= limit
        rows.append(row)
        print(
            f"{kind:9}{what:6} time {middle:.2f}x [{low:.2f}, {high:.2f}] of copying (limit {TIME_LIMIT:.0f}x)   "
            f"peak {peak / GIB:.2f} GiB (limit {limit / GIB:.2f})   {'ok' if row['passes'] else 'FALLS SHORT'}"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
