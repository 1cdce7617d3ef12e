"""How much faster do the papers' students read and write than their teachers, under transformers, with random weights?

    Llama-3.1-8B        its students 4B-Width and 4B-Depth
    Mistral-NeMo-12B    its student MN-Minitron-8B

On a GPU the published shapes, beside what the papers print: 1.8x and 2.7x, which are requests per second of
TensorRT-LLM in FP8 on an H100, at twice the teacher's batch, and so not the same question. A CPU gets models of the
same proportions, each 1/128 of its parameters: widths and heads divided by 8, layers by 2, the vocabulary by 16, heads
as wide as they are. What that says of the real shapes is the arithmetic, not a GPU's memory. There CPU time of the
process counts, and no largest batch is looked for. `--save` keeps the result in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from minitron_nemo import platform
from minitron_nemo.config.throughput import ThroughputConfig, TimedModel
from minitron_nemo.evaluation.throughput import comparison, measure
from minitron_nemo.hf.config import hf_config
from minitron_nemo.published import PUBLISHED
from minitron_nemo.quiet import hush
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.throughput import timed_model, write_shape

FAMILIES = (  # the teacher first
    ("Llama-3.1-8B", "Llama-3.1-Minitron-4B-Width", "Llama-3.1-Minitron-4B-Depth"),
    ("Mistral-NeMo-12B", "MN-Minitron-8B"),
)
PAPERS = {
    "times_the_teacher": {"Llama-3.1-Minitron-4B-Width": 1.8, "Llama-3.1-Minitron-4B-Depth": 2.7},
    "what": "papers', TensorRT-LLM on H100: requests per second in FP8 on one of 80 GB, averages over lengths of "
    "prompt and answer, at batch 32 for Llama-3.1-8B and 64 for the 4B models",
    "source": "arXiv:2408.11796, figure 10; its section Insights has 1.7 for the width-pruned model",
}
ON_A_GPU = {"batch_size": 32, "prompt_tokens": 512, "new_tokens": 128, "repeats": 5}
ON_A_CPU = {"batch_size": 2, "prompt_tokens": 64, "new_tokens": 9, "repeats": 3, "largest_batch": False}
SCALED = "widths and heads divided by 8, layers by 2, the vocabulary by 16, heads as wide: 1/128 of the parameters"


def scaled(shape: ModelShape) -> ModelShape:
    return replace(
        shape,
        num_layers=shape.num_layers // 2,
        hidden_size=shape.hidden_size // 8,
        ffn_hidden_size=shape.ffn_hidden_size // 8,
        num_attention_heads=shape.num_attention_heads // 8,
        num_query_groups=shape.num_query_groups // 8,
        padded_vocab_size=shape.padded_vocab_size // 16,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/throughput.json")
    save = parser.parse_args().save
    hush()
    on_gpu = platform.has_accelerator()
    config = ThroughputConfig(**ON_A_GPU if on_gpu else ON_A_CPU)
    clock = time.perf_counter if on_gpu else time.process_time
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for names in FAMILIES:
            models = []
            for name in names:
                shape = PUBLISHED[name] if on_gpu else scaled(PUBLISHED[name])
                models.append(timed_model(write_shape(Path(folder) / name, hf_config(shape)), TimedModel(name), config))
            found.append(measure(models, config, clock))
            print(comparison(found[-1]).markdown(), flush=True)
    rows = [row for each in found for row in each["rows"]]
    for name, times in PAPERS["times_the_teacher"].items():
        (own,) = (row["times_first_model"] for row in rows if row["label"] == name and not row["largest"])
        seen = ", ".join(f"{what} {ratio:.2f}x" for what, ratio in own.items())
        print(f"{name}: {seen} here; {times}x in the paper ({PAPERS['what']}).")
    if save:
        result = {
            "command": "python benchmarks/throughput.py --save",
            "date": date.today().isoformat(),
            "device": found[0]["machine"],
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": sys.version.split()[0],
            },
            "shapes": "as published, random weights" if on_gpu else f"published, {SCALED}; random weights",
            "time": "by the clock" if on_gpu else "CPU time of the process",
            "times_first_model": "of the first model of its family, from medians",
            "papers": PAPERS,
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / "throughput.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
