"""What does a step of `distill`, as NeMo trains it, cost beside the sum of its parts, and where does the rest go?

    step         the stage `distill` on the embedded teacher and the quickstart's student: what a step more costs it
                 (runs of SHORT and LONG steps), data, schedule, Lightning's loop, history and logging included
    parts        the teacher's forward pass, the student's forward and backward pass, the optimizer: of
                 benchmarks/distill_step.py, on the same sizes
    checkpoint   what each of a run's checkpoints costs beside it, and the share of the steps between two at the default
                 `checkpoint_every`

Everything runs by turns in one process; what counts is the CPU time of it and its children, which other work on the
machine hardly changes. step / parts should stay below 1.10, checkpoints below 2% at the default; the command fails
where they do not. Then a run under Python's profiler says where the time outside torch's kernels goes.
`make bench-overhead`; `--save` keeps the answer in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import resource
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from distill_step import QUICKSTART, setup, teach

from minitron_nemo.config.training import TrainingConfig
from stages import Stages, begin

DIMS = {"hidden_size": 160, "ffn_hidden_size": 384, "num_attention_heads": 4}
SEQ_LENGTH, ROWS, MICRO_BATCHES = 256, 8, 2
SHORT, LONG, REPEATS, CHECKPOINTS = 4, 20, 5, 4
LIMIT, CHECKPOINT_LIMIT = 1.10, 0.02
TEACHER = "{}=${{import_hf.output}}"
PACKAGES = ("lightning", "nemo", "megatron", "minitron_nemo", "torch", "numpy")


class Bench(Stages):
    runs = 0

    def prepare(self) -> None:
        for section in ("import_hf", "prepare_data"):
            self.stage(section)
        few = ["estimate_importance.importance.num_samples=8", "estimate_importance.importance.stream=none"]
        self.stage("estimate_importance", *few)
        self.stage("prune")

    def distil(self, steps: int, checkpoint_every: int = 0) -> None:
        self.runs += 1
        training = {"steps": steps, "validation_every": 0, "checkpoint_every": checkpoint_every}
        values = [f"distill.training.{key}={value}" for key, value in training.items()]
        self.stage("distill", *values, "distill.training.optim.warmup_steps=1", output=f"distilled_{self.runs}")


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Of this process and of those it waited for."""
    begin = _used()
    run()
    return _used() - begin


def _used() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in both)


def parts_of_a_step(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    _, student, teacher, batches = setup(QUICKSTART, DIMS, dtype, SEQ_LENGTH, ROWS, MICRO_BATCHES)
    return {
        "teacher": lambda: teach(teacher, batches),
        "student": lambda: student.forward_backward(batches),
        "optimizer": student.step,
    }


def where_the_time_goes(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Milliseconds a step inside Python's functions, by package, and of the dearest of them outside torch's kernels."""
    profile = cProfile.Profile()
    profile.runcall(run)
    by_package: Counter[str] = Counter()
    by_function: Counter[str] = Counter()
    for entry in profile.getstats():
        if isinstance(entry.code, str):
            by_package["built in"] += entry.inlinetime
            continue
        file = entry.code.co_filename
        package = next((name for name in PACKAGES if f"/{name}/" in file), "other")
        by_package[package] += entry.inlinetime
        by_function[f"{package}: {Path(file).name}:{entry.code.co_name}"] += entry.inlinetime
    return {
        "by_package_ms": {name: round(1e3 * own / steps, 2) for name, own in by_package.most_common()},
        "dearest_ms": {name: round(1e3 * own / steps, 2) for name, own in by_function.most_common(12)},
    }


def measure(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    parts = parts_of_a_step(dtype)
    for run in (*parts.values(), lambda: bench.distil(SHORT)):
        run()
    rounds = []
    for _ in range(REPEATS):
        seconds = {name: cpu_seconds(run) for name, run in parts.items()}
        short = cpu_seconds(lambda: bench.distil(SHORT))
        seconds["step"] = (cpu_seconds(lambda: bench.distil(LONG)) - short) / (LONG - SHORT)
        seconds |= {name: statistics.mean([seconds[name], cpu_seconds(run)]) for name, run in parts.items()}
        rounds.append(seconds)
    ratios = sorted(each["step"] / sum(each[name] for name in parts) for each in rounds)
    plain = statistics.median(cpu_seconds(lambda: bench.distil(LONG)) for _ in range(3))
    with_them = statistics.median(cpu_seconds(lambda: bench.distil(LONG, LONG // CHECKPOINTS)) for _ in range(3))
    step = statistics.median(each["step"] for each in rounds)
    checkpoint = (with_them - plain) / (CHECKPOINTS - 1)  # the last step's is not written: the run is over
    every = TrainingConfig().checkpoint_every
    return {
        "step_over_parts": {"median": round(statistics.median(ratios), 3), "all": [round(each, 3) for each in ratios]},
        "ms": {name: round(1e3 * statistics.median(each[name] for each in rounds), 1) for name in (*parts, "step")},
        "checkpoint_ms": round(1e3 * checkpoint),
        "checkpoint_every": every,
        "checkpoint_share": round(checkpoint / (every * step), 4),
        **where_the_time_goes(lambda: bench.distil(LONG), LONG),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    begin()
    with tempfile.TemporaryDirectory() as run_dir:
        bench = Bench(
            Path(run_dir),
            [TEACHER.format(key) for key in ("distill.teacher", "estimate_importance.model", "prune.model")],
            precision=given.precision,
        )
        bench.prepare()
        answer = measure(bench, {"fp32": torch.float32, "bf16": torch.bfloat16}[given.precision])
    print(json.dumps(answer, indent=2))
    if given.save:
        result = {
            "command": "benchmarks/overhead.py " + " ".join(sys.argv[1:]),
            "date": date.today().isoformat(),
            "machine": f"CPU, one thread, {given.precision}",
            "torch": torch.__version__,
            "limits": {"step_over_parts": LIMIT, "checkpoint_share": CHECKPOINT_LIMIT},
            **answer,
        }
        path = Path(__file__).parent / "results" / "overhead.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    ratio, share = answer["step_over_parts"]["median"], answer["checkpoint_share"]
    print(f"a step takes {ratio:.3f} of the sum of its parts (at most {LIMIT})")
    every = answer["checkpoint_every"]
    print(f"checkpoints every {every} steps take {share:.1%} of them (at most {CHECKPOINT_LIMIT:.0%})")
    return 1 if ratio > LIMIT or share > CHECKPOINT_LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
