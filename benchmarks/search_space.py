"""How long does a search take to look at ten million shapes, and in how much memory?

The dims of Llama-3.1-8B in fine steps, under a band of parameters, one of memory and multiples: every shape is counted,
in a process of its own whose peak memory beyond what imports take is read at the end. Exits 1 above 2 s of a core or
200 MiB.
`make bench-search-space`, or `python benchmarks/search_space.py`; `--save` keeps the answer in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import resource
import sys
import time
from datetime import date
from pathlib import Path

from minitron_nemo.config.search import ConstraintsConfig
from minitron_nemo.published import PUBLISHED
from minitron_nemo.search.constraints import constraints_of, feasible
from minitron_nemo.search.space import Space

SECONDS, MEBIBYTES = 2.0, 200
MODEL = PUBLISHED["Llama-3.1-8B"]
TIMES = 3
SPACE = {
    "num_layers": {"from": 8, "to": 32, "step": 1},
    "hidden_size": {"from": 1024, "to": 4096, "step": 16},
    "ffn_hidden_size": {"from": 2048, "to": 14336, "step": 22},
    "num_attention_heads": [8, 16, 24, 32],
}
CONSTRAINTS = ConstraintsConfig(
    parameters=["4.2B", "4.8B"], memory="16GiB", batch_size=8, multiple_of={"ffn_hidden_size": 64}, opens=False
)


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    space, before, seconds = Space.of(MODEL, SPACE), peak_mebibytes(), []
    for _ in range(TIMES):
        began = time.process_time()
        found = feasible(space, constraints_of(CONSTRAINTS, MODEL))
        seconds.append(time.process_time() - began)
    result = {
        "command": "make bench-search-space",
        "date": date.today().isoformat(),
        "device": machine.processor() or machine.machine(),
        "shapes": len(space),
        "left": found.left,
        "seconds_of_a_core": [round(each, 3) for each in seconds],
        "mebibytes_beyond_imports": round(peak_mebibytes() - before, 1),
    }
    print(json.dumps(result, indent=2))
    if given.save:
        path = Path(__file__).parent / "results" / "search_space.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    return int(min(seconds) > SECONDS or result["mebibytes_beyond_imports"] > MEBIBYTES)


if __name__ == "__main__":
    sys.exit(main())
