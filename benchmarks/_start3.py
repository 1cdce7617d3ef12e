"""How long does a person wait before a door answers, beside another version of the project?

Each command starts a Python of its own and is timed from its start to its end; both versions by turns, in this Python's
environment, files in the page cache. What answers without a model (a mistyped key, the composed config, a report of
what stands, a chain's scripts) should take no more than 0.35 of the time it took while every door imported NeMo; help
and a mistyped key no more than a second on an idle machine of two cores. Exits 1 where that falls short.

    make bench-start BEFORE=<a folder with the other version's files, or a revision of this repository>

`--save` keeps the answer in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from checkouts import ROOT, checkout, environment

RATIO_LIMIT, SECONDS_LIMIT = 0.35, 1.0
REPEATS = 3
DOORS = {
    "help": "--help",
    "help of a stage": "prune --help",
    "help of surgery on files": "prune-hf --help",
    "an unknown key": "prune recipe=quickstart prune.targett=1",
    "the composed config": "prune recipe=quickstart --cfg job",
    "a report": "report recipe=quickstart run_dir=run report.output=report-{turn}",
    "a chain's scripts": "submit recipe=quickstart submit.dry_run=true run_dir=chain-{turn}",
}
IMPORTED_NEMO = ("an unknown key", "the composed config", "a report", "a chain's scripts")
ANSWER_AT_ONCE = ("help", "help of a stage", "help of surgery on files", "an unknown key")
RUN = """
import json
from pathlib import Path
from minitron_nemo.artifact import writing
from minitron_nemo.shape import ModelShape
shape = ModelShape("llama", 3, 24, 40, 6, 2, 8, padded_vocab_size=64, seq_length=32)
with writing(Path("run/teacher"), stage="import-hf", config={}) as draft:
    (draft.path / "shape.json").write_text(json.dumps(shape.to_dict()))
    draft.metrics["parameters"] = shape.num_parameters
"""
"""Makes what the report reports."""


def seconds_of(command: str, tree: Path, place: Path) -> tuple[float, int]:
    """Of the version in `tree`, and its exit code."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "minitron_nemo.cli", *command.split()],
        cwd=place,
        env=environment(tree),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin, done.returncode


def measure(door: str, trees: dict[str, Path], places: dict[str, Path], repeats: int) -> dict[str, Any]:
    """One row of the table. Raises: SystemExit: the versions do not answer alike."""
    seconds: dict[str, list[float]] = {side: [] for side in trees}
    for turn in range(repeats + 1):
        codes = []
        for side, tree in trees.items():
            taken, code = seconds_of(DOORS[door].format(turn=turn), tree, places[side])
            codes.append(code)
            if turn > 0:  # the first brings files into the page cache, and compiles them
                seconds[side].append(taken)
        if len(set(codes)) > 1 or codes[0] not in (0, 2):
            raise SystemExit(f"minitron {DOORS[door]}: exit codes {codes} of {', '.join(map(str, trees.values()))}")
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    row: dict[str, Any] = {"door": door, "command": f"minitron {DOORS[door]}"}
    for side, taken in seconds.items():
        row[f"{side}_seconds_20_50_80"] = percentiles(taken)
    row["ratio_20_50_80"] = percentiles(ratios)
    row["passes"] = (door not in IMPORTED_NEMO or row["ratio_20_50_80"][1] <= RATIO_LIMIT) and (
        door not in ANSWER_AT_ONCE or row["after_seconds_20_50_80"][1] <= SECONDS_LIMIT
    )
    low, middle, high = row["ratio_20_50_80"]
    print(
        f"{door:26}{row['before_seconds_20_50_80'][1]:7.2f} s{row['after_seconds_20_50_80'][1]:7.2f} s   "
        f"{middle:.2f}x [{low:.2f}, {high:.2f}]   {'ok' if row['passes'] else 'FALLS SHORT'}",
        flush=True,
    )
    return row


def percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [round(ordered[int(q * (len(ordered) - 1))], 3) for q in (0.2, 0.5, 0.8)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a folder or a revision")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        trees = {"before": stack.enter_context(checkout(options.before)), "after": ROOT}
        places = {side: Path(stack.enter_context(TemporaryDirectory())) for side in trees}
        for side, tree in trees.items():
            subprocess.run([sys.executable, "-c", RUN], cwd=places[side], env=environment(tree), check=True)
        print(f"{'':26}{'before':>9}{'after':>9}   after / before")
        rows = [measure(door, trees, places, options.repeats) for door in DOORS]
    if options.save:
        result = {
            "command": "make bench-start, with --save",
            "before": Path(options.before).name,
            "date": date.today().isoformat(),
            "device": machine.processor() or "CPU",
            "cores": os.cpu_count(),
            "load": [round(load, 1) for load in os.getloadavg()],
            "versions": {"python": sys.version.split()[0], "torch": version("torch"), "nemo": version("nemo-toolkit")},
            "limits": {"ratio": RATIO_LIMIT, "seconds": SECONDS_LIMIT},
            "rows": rows,
        }
        path = ROOT / "benchmarks" / "results" / "start.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(row["passes"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
