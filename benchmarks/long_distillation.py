"""What is left of a better cut after a long distillation, and what does the same bill buy from random weights?

The embedded teacher at half its parameters, the `width 50%` of benchmarks/calibrated.py:

    papers, + selection, sequential    cut so, and distilled for --steps
    from scratch                       the same shape from random weights by cross-entropy, for as many steps as the
                                       whole bill of the sequential student pays for

A bill is FLOPs: of the distillation's steps, the teacher's forward passes in them included, and of the passes over the
calibration samples (importance, and of the refit one of the teacher to begin with, then one of the teacher and two of
the student in the teacher's shape). What the teacher's own training cost is in neither, as it was there.

`make bench-long-distillation` takes hours of a core; `--jobs` shares the runs, `--save` keeps the answer in
benchmarks/results/, `--run-dir` takes what stands there, that of benchmarks/calibrated.py as well.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from calibrated import ALL, PAPERS, SEQUENTIAL, Bench

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact, open_artifact
from stages import begin, curve, in_parts

TARGET, SEED = "width 50%", 1234
SCRATCH = "from scratch"
ROWS = (SEQUENTIAL, PAPERS, ALL, SCRATCH)
"""In the order they are made."""
SEQ_LENGTH, BATCH, CALIBRATION = 256, 16, 256
"""Tokens of a sample; samples of a step, of a calibration pass (the quickstart's)."""


class Long(Bench):
    kind = "long_"

    def __init__(self, run_dir: Path, steps: int) -> None:
        super().__init__(run_dir, steps, seeds=1)
        self.steps = steps

    def from_scratch(self) -> Artifact:
        """Shorter or longer than `steps`: what the sequential student's bill pays for."""
        steps = self.bill()["from_scratch_steps"]
        values = [f"seed={SEED}", f"from_scratch.like={self.cut((TARGET, PAPERS)).path}"]
        values += [f"distill.training.steps={steps}", f"distill.training.validation_every={steps // 10}"]
        return self.stage("from_scratch", *values, output="long_from_scratch")

    def bill(self) -> dict[str, float]:
        """PFLOPs by what they were spent on, and the steps of cross-entropy that all of them would be."""
        models = self.run_dir / "teacher", self.cut((TARGET, SEQUENTIAL)).path
        teacher, student = (engine.open_model(path, key="model").shape.flops_per_token(SEQ_LENGTH) for path in models)
        spent = {
            "student": self.steps * BATCH * SEQ_LENGTH * 3 * student,
            "teacher": self.steps * BATCH * SEQ_LENGTH * teacher,
            "calibration": CALIBRATION * SEQ_LENGTH * 5 * teacher,
        }
        steps = sum(spent.values()) // (BATCH * SEQ_LENGTH * 3 * student)
        return {**{name: round(flops / 1e15, 3) for name, flops in spent.items()}, "from_scratch_steps": steps}

    def row(self, name: str) -> Artifact:
        return self.from_scratch() if name == SCRATCH else self.distilled((TARGET, name), SEED)

    def answer(self, name: str) -> dict[str, Any]:
        model = self.row(name)
        return {
            "held_out_not_retrained": None
            if name == SCRATCH
            else round(statistics.mean(self.held_out(self.cut((TARGET, name)))), 4),
            "held_out": round(statistics.mean(self.held_out(model)), 4),
            "tokens": model.metrics["tokens"],
            "validation": [[tokens, round(loss, 4)] for tokens, loss in curve(model)],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1280, help="of 16 x 256 tokens: 5.2M tokens")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the runs")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # i/n: of such a process
    parser.add_argument("--run-dir", type=Path, help="keeps the artifacts; taken where they stand")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    began = begin()
    with tempfile.TemporaryDirectory() as own:
        bench = Long((options.run_dir or Path(own)).resolve(), options.steps)
        if options.part is not None:
            part, parts = map(int, options.part.split("/"))
            for name in options.rows[part::parts]:
                bench.row(name)
            return 0
        bench.prepare()
        for way in (PAPERS, SEQUENTIAL):  # what rows of several processes need
            bench.cut((TARGET, way))
        command = [__file__, "--run-dir", str(bench.run_dir), "--steps", str(options.steps), "--rows", *options.rows]
        if not in_parts(command, options.jobs):
            return 1
        answers = {name: bench.answer(name) for name in options.rows}
        teacher = round(statistics.mean(bench.held_out(open_artifact(bench.run_dir / "teacher"))), 4)
        bill = bench.bill()
    for name, answer in answers.items():
        print(f"{name:14}{answer['tokens']:>12,}{answer['held_out_not_retrained'] or '':>8}{answer['held_out']:8.3f}")
    print(f"teacher {teacher}; bill in PFLOPs {bill}; took {(time.monotonic() - began) / 60:.0f} minutes")
    if options.save:
        result = {
            "command": "benchmarks/long_distillation.py --save --rows " + " ".join(options.rows),
            "date": date.today().isoformat(),
            "machine": f"{machine.machine()}, {bench.precision}",
            "torch": torch.__version__,
            "teacher": teacher,
            "bill_pflops": bill,
            "rows": answers,
        }
        path = Path(__file__).parent / "results" / "long_distillation.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
