"""What does one rank of a large run send, hold and wait for in a step, and what of it grows with the number of ranks?

Llama-3.1-8B teaches its 4B student (recipe llama31_8b_to_4b_width, with hidden losses) on 64 and on 1024 ranks. Nothing
is computed and no other rank is there: the product's own training runs at full size on tensors without memory and
groups that send nothing, once for each pipeline stage asked for, and is counted (tests/support/fake_ranks.py).

    bytes       of whole messages of one step, larger of what goes in and comes out, by collective and group
    held        weights, gradients and moments of the rank, before the step
    at the peak what the step adds to that
    host        CPU time of the step's Python here, on a laptop and through torch's fake tensors: only the ratio counts

The command fails where a message within the model, or one to all ranks, the number of messages or the peak differ
between the two worlds, or where the data-parallel bytes differ by more than padding. `--save` keeps the result in
benchmarks/results/scale.json and prints the table as docs/scale.md has it; `--tiny` has shapes for a look.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.fake_ranks import count_each

WORLDS = (64, 1024)
LAYOUTS = [(4, 2), (8, 4)]
"""Tensor and pipeline parallel sizes; with sequence parallelism."""
SEQ_LENGTH = 8192
PADDING = 0.01
"""Share of data-parallel bytes: Megatron pads its buffers to a multiple of the data-parallel ranks."""


def cases(tiny: bool) -> list[dict[str, Any]]:
    """One for each layout, stage (first, middle, last) and world."""
    from minitron_nemo.published import PUBLISHED
    from minitron_nemo.shape import ModelShape

    teacher, student = PUBLISHED["Llama-3.1-8B"], PUBLISHED["Llama-3.1-Minitron-4B-Width"]
    if tiny:
        few = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 8, "padded_vocab_size": 512}
        teacher = ModelShape.from_dict(teacher.to_dict() | few)
        student = teacher.pruned_to(hidden_size=48, ffn_hidden_size=96)
    found = []
    for tp, pp in LAYOUTS:
        for stage in sorted({0, pp // 2, pp - 1}):
            for world in WORLDS:
                trainer = {
                    "tensor_model_parallel_size": tp,
                    "pipeline_model_parallel_size": pp,
                    "sequence_parallel": True,
                    "seq_length": 64 if tiny else SEQ_LENGTH,
                    "micro_batch_size": 1,
                    "global_batch_size": world // (tp * pp) * max(2, pp),
                }
                models = {"teacher": teacher.to_dict(), "student": student.to_dict()}
                found.append(models | {"trainer": trainer, "world": world, "rank": stage * world // pp, "stage": stage})
    return found


def grown(few: dict[str, Any], many: dict[str, Any]) -> list[str]:
    """What differs between two worlds and should not."""
    said = []
    for group in sorted(few["sent"].keys() | many["sent"].keys()):
        a, b = few["sent"].get(group, {}), many["sent"].get(group, {})
        calls = [{kind: calls for kind, (calls, _) in each.items()} for each in (a, b)]
        near = calls[0] == calls[1] and all(abs(b[kind][1] / max(a[kind][1], 1) - 1) < PADDING for kind in a)
        if a != b and not (group == "dp" and near):
            said.append(f"{group}: {a} became {b}")
    if few["activations"] != many["activations"]:
        said.append(f"peak: {few['activations']} bytes became {many['activations']}")
    return said


def row(case: dict[str, Any], found: dict[str, Any]) -> str:
    trainer, stages = case["trainer"], case["trainer"]["pipeline_model_parallel_size"]
    layout = f"TP={trainer['tensor_model_parallel_size']} PP={stages}"
    sent = found["sent"]

    def megabytes(group: str, *kinds: str) -> str:
        pairs = [sent.get(group, {}).get(kind, [0, 0]) for kind in kinds]
        size = sum(each[1] for each in pairs)
        return f"{size / 1e6:,.0f} ({sum(each[0] for each in pairs)})" if size else "-"

    to_all = sum(size for _, size in sent.get("world", {}).values())
    cells = [
        layout,
        f"{case['stage'] + 1} of {stages}",
        f"{case['world']}",
        megabytes("tp", "all-gather"),
        megabytes("tp", "reduce-scatter"),
        megabytes("tp", "all-reduce"),
        megabytes("pp", "send", "receive"),
        megabytes("pp", "all-reduce"),
        megabytes("dp", "reduce-scatter"),
        megabytes("dp", "all-gather"),
        f"{to_all} B",
        f"{found['held'] / 1e9:.2f}",
        f"{found['activations'] / 1e9:.2f}",
        f"{found['seconds']:.0f}",
        f"{found['groups_seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "layout",
    "stage",
    "ranks",
    *(f"tp {kind}" for kind in ("all-gather", "reduce-scatter", "all-reduce")),
    "pp messages",
    "pp all-reduce",
    "dp reduce-scatter",
    "dp all-gather",
    "to all ranks",
    "held, GB",
    "at the peak, GB",
    "host, s",
    "building groups, s",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scale.json")
    parser.add_argument("--tiny", action="store_true", help="shapes for a look at the command itself")
    given = parser.parse_args()
    asked, rows, wrong = cases(given.tiny), [], []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for case, found in zip(asked, count_each(asked), strict=True):
        print(row(case, found), flush=True)
        rows.append({name: case[name] for name in ("trainer", "stage", "world", "rank")} | found)
        if case["world"] == WORLDS[-1]:
            wrong += grown(rows[-2], rows[-1])
    if given.save:
        import torch

        result = {
            "command": "python benchmarks/scale.py --save",
            "date": date.today().isoformat(),
            "versions": {"torch": torch.__version__, "python": machine.python_version()},
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / "scale.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(wrong) or "Nothing that should stay the same differs between the worlds.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
