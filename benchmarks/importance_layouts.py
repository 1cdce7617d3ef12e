"""Are importance scores the same on every layout as in one process?

A small model in fp32 with the same weights everywhere, samples with padding and holes: all nine aggregations
of every width axis on 2 or 4 gloo ranks of this machine beside one process. The table holds, for each layout and axis,
the largest difference of a score, relative to the largest score of its tensor, over the nine aggregations. Exits
non-zero where one is above 1e-5. `--save` keeps the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from datetime import date
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "importance")]

from importance_on_ranks import estimate  # noqa: E402

from minitron_nemo.aggregation import Aggregation  # noqa: E402
from minitron_nemo.scores import Importance  # noqa: E402
from support.megatron import TINY  # noqa: E402
from support.ranks import Ranks  # noqa: E402

LAYOUTS = ("tp2", "tp2-sp", "pp2", "cp2", "dp2", "tp2-pp2", "tp2-dp2")
SHAPE = dataclasses.replace(TINY, num_layers=4, seq_length=64)
NUM_SAMPLES, TOKENS, MICRO_BATCH = 16, 64, 2
LIMIT = 1e-5
AXES = ("hidden", "ffn", "head", "group")


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and mask [16, 64]; most samples are padded, some have holes."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE.padded_vocab_size, (NUM_SAMPLES, TOKENS), generator=generator)
    lengths = torch.randint(TOKENS // 4, TOKENS + 1, (NUM_SAMPLES, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).float()
    mask[::5, 5:9] = 0
    return tokens, mask


def largest_difference(actual: Importance, expected: Importance, axis: str) -> dict[str, float]:
    """By aggregation, `batch,sequence`."""
    differences = {}
    for batch, sequence in itertools.product(Aggregation, Aggregation):
        here, reference = actual.scores(axis, batch, sequence), expected.scores(axis, batch, sequence)
        relative = (here.double() - reference.double()).abs().max() / reference.abs().max()
        differences[f"{batch.value},{sequence.value}"] = float(relative)
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    save = parser.parse_args().save
    ranks = Ranks()
    try:
        [alone] = ranks("single").run(estimate, *samples(), micro_batch=MICRO_BATCH, shape=SHAPE)
        table = {}
        print(f"{'layout':10}" + "".join(f"{axis:>10}" for axis in AXES))
        for layout in LAYOUTS:
            everyone = ranks(layout).run(estimate, *samples(), micro_batch=MICRO_BATCH, shape=SHAPE)
            by_rank = [{axis: largest_difference(each, alone, axis) for axis in AXES} for each in everyone]
            assert all(rank == by_rank[0] for rank in by_rank), f"ranks of {layout} differ"
            table[layout] = by_rank[0]
            worst = {axis: max(values.values()) for axis, values in by_rank[0].items()}
            print(f"{layout:10}" + "".join(f"{worst[axis]:10.1e}" for axis in AXES), flush=True)
    finally:
        ranks.close()
    if save:
        result = {
            "command": "python benchmarks/importance_layouts.py --save",
            "question": "largest |score - score of one process| / largest score of the tensor",
            "date": date.today().isoformat(),
            "dtype": "float32",
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "shape": SHAPE.to_dict(),
            "samples": [NUM_SAMPLES, TOKENS],
            "limit": LIMIT,
            "layouts": table,
        }
        path = Path(__file__).parent / "results" / "importance_layouts.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    worst_of_all = max(value for axes in table.values() for values in axes.values() for value in values.values())
    print(f"largest relative difference {worst_of_all:.1e}, limit {LIMIT:.0e}")
    return 0 if worst_of_all <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
