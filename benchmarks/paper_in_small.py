"""Which findings of the papers show on the teacher that ships with the package, at equal tokens, and which do not?

The quickstart's teacher and recipe through the real stages, in one process: two students of it, one cut in every width
(the quickstart's), one that lost half its layers (greedily by squared error, what benchmarks/ranking.py recommends),
each retrained on the same tokens in every way that the papers compare: cross-entropy alone, each divergence, hidden
states, the teacher corrected or not, pruned by importance or by chance, from random weights. All of it with two seeds
(order of the data, random weights). The answer is the loss on held-out text, and of every finding a verdict made from
numbers: the difference of two such losses, its standard error over the held-out micro-batches, and what it was with
each seed. A difference counts where it has the same sign with every seed and is above twice its standard error.

Teacher correction is about data that differ from the teacher's, so that part is also done on other text: the C++
headers that come with torch, of which the teacher, trained on Python, has seen none.

`make bench-paper-in-small`, about an hour on one core; `--save` keeps the answer in benchmarks/results/. With
`--run-dir` artifacts that stand are taken: what was cut off goes on, and more seeds add to it.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from stages import HELD_OUT, Stages, begin

SEEDS = (1234, 4321)
ONCE = 0  # the seed of what has none
WIDTH, DEPTH = "width", "depth"
LAYERS_KEPT, LAYERS = 3, 6
STUDENTS = {
    WIDTH: [],  # the quickstart's
    DEPTH: [
        "prune.target.hidden_size=224",
        "prune.target.ffn_hidden_size=640",
        "prune.target.num_attention_heads=8",
        f"+prune.target.num_layers={LAYERS_KEPT}",
        "prune.depth.metric=greedy",
    ],
}
HIDDEN = "distill.distillation.hidden_states."
CROSS_ENTROPY = "distill.distillation.cross_entropy_weight=1.0"
DIVERGENCE = "distill.distillation.divergence."
PRUNED = "pruned, not retrained"
CE, KL, SCRATCH, SCRATCH_KL = "cross-entropy", "forward KL", "from scratch, cross-entropy", "from scratch, forward KL"
RANDOM_KL, CORRECTED = "pruned by chance, forward KL", "forward KL, teacher corrected"
REVERSE, COSINE, MSE = "reverse KL", "cosine of logits", "MSE of logits"
BUCKET, RENORMALISED = "top 64, tail as one bucket", "top 64, renormalised"
KL_CE, KL_HIDDEN = "forward KL + cross-entropy", "forward KL + hidden states"
KL_HIDDEN_PLAN = "forward KL + hidden states, each layer to itself"
OBJECTIVES = {
    KL: [],
    KL_CE: [CROSS_ENTROPY],
    KL_HIDDEN: [f"{HIDDEN}enabled=true"],
    KL_HIDDEN_PLAN: [f"{HIDDEN}enabled=true", f"{HIDDEN}mapping=plan"],
    BUCKET: [f"{DIVERGENCE}kind=top_k", f"{DIVERGENCE}k=64"],
    RENORMALISED: [f"{DIVERGENCE}kind=top_k", f"{DIVERGENCE}k=64", f"{DIVERGENCE}tail=renormalised"],
    REVERSE: [f"{DIVERGENCE}kind=reverse_kl"],
    COSINE: [f"{DIVERGENCE}kind=cosine"],
    MSE: [f"{DIVERGENCE}kind=mse"],
    "symmetric KL": [f"{DIVERGENCE}kind=symmetric_kl"],
    "Jensen-Shannon": [f"{DIVERGENCE}kind=jensen_shannon"],
    "forward KL + hidden states + cross-entropy": [f"{HIDDEN}enabled=true", CROSS_ENTROPY],
}
"""What a pruned student is distilled with."""
OTHER_DATA, OTHER_KL, OTHER_CORRECTED = "other", "other text, forward KL", "other text, forward KL, teacher corrected"
ONLY_WIDTH = (CORRECTED, OTHER_KL, OTHER_CORRECTED, RANDOM_KL, SCRATCH_KL)
ONLY_DEPTH = (KL_HIDDEN_PLAN,)  # with as many layers as the teacher the default's one pair is such a one
NAMES = [CE, *OBJECTIVES, SCRATCH, *ONLY_WIDTH]
Run = tuple[str, str, int]
"""Student, name, seed."""


# ---- the runs --------------------------------------------------------------------------------------------------------


class Bench(Stages):
    """Every run of the comparison, and its losses."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        shared = [
            f"distill.training.steps={steps}",
            "distill.training.validation_every=0",
            "correct_teacher.training.steps=30",
            "correct_teacher.training.optim.warmup_steps=5",
            "trainer.tensorboard=false",
            "estimate_importance.depth.greedy.metric=squared_error",
            f"estimate_importance.depth.greedy.drop={LAYERS - LAYERS_KEPT}",
            "estimate_importance.depth.num_samples=64",
            "estimate_importance.model=${import_hf.output}",  # both kinds of teacher teach the same students
            "distill.teacher=${import_hf.output}",
        ]
        super().__init__(run_dir, shared)
        self.losses: dict[Run, list[float]] = {}
        """Of each held-out micro-batch, nats per token."""
        self.parameters: dict[str, int] = {}

    def prepare(self) -> None:
        """What all runs share: teachers, data, one importance pass, the students as they were cut."""
        teacher = self.stage("import_hf")
        self.stage("prepare_data")
        self.stage("prepare_data", *other_corpus(), output=OTHER_DATA)
        self.stage("correct_teacher")
        self.stage("correct_teacher", self.data(OTHER_DATA), output="other_corrected_teacher")
        self.stage("estimate_importance")
        self.stage("estimate_importance", "estimate_importance.importance.metric=random", output="importance_random")
        self.measure(("teacher", "as it came", ONCE), teacher)
        self.measure(("teacher", "as it came, other text", ONCE), teacher, OTHER_DATA)
        self.measure(("teacher", "corrected", ONCE), open_artifact(self.run_dir / "corrected_teacher"))
        other = open_artifact(self.run_dir / "other_corrected_teacher")
        self.measure(("teacher", "corrected on other text, other text", ONCE), other, OTHER_DATA)
        for student, cut in STUDENTS.items():
            pruned = self.stage("prune", *cut, output=f"{student}_pruned")
            self.measure((student, PRUNED, ONCE), pruned)
        by_chance = f"prune.importance={self.run_dir / 'importance_random'}"
        pruned = self.stage("prune", by_chance, output="width_pruned_random")
        self.measure((WIDTH, "pruned by chance, not retrained", ONCE), pruned)

    def retrain(self, run: Run) -> None:
        student, name, seed = run
        pruned, distil = self.run_dir / f"{student}_pruned", partial(self.distil, run)
        if name == CE:
            self.control(run, "pruned_ce", f"pruned_ce.initial={pruned}")
        elif name == SCRATCH:
            self.control(run, "from_scratch", f"from_scratch.like={pruned}")
        elif name in OBJECTIVES:
            distil(pruned, *OBJECTIVES[name])
        elif name == CORRECTED:
            distil(pruned, "distill.teacher=${correct_teacher.output}")
        elif name == RANDOM_KL:
            distil(self.run_dir / "width_pruned_random")
        elif name == SCRATCH_KL:
            distil(self.random_weights(pruned, seed))
        elif name == OTHER_KL:
            distil(pruned, self.data(OTHER_DATA), data=OTHER_DATA)
        elif name == OTHER_CORRECTED:
            corrected = f"distill.teacher={self.run_dir / 'other_corrected_teacher'}"
            distil(pruned, self.data(OTHER_DATA), corrected, data=OTHER_DATA)

    def data(self, name: str) -> str:
        return f"data.prepared={self.run_dir / name}"

    def random_weights(self, like: Path, seed: int) -> Path:
        """A model of this shape as it is initialised: a stage writes models it trained, so one step at no rate."""
        rate = "distill.training.optim."  # the control's too
        nothing = ["distill.training.steps=1", f"{rate}lr=1.0e-12", f"{rate}min_lr=0.0", f"{rate}warmup_steps=0"]
        values = [f"from_scratch.like={like}", f"seed={seed}", *nothing]
        return self.stage("from_scratch", *values, output=f"random_{seed}").path

    def control(self, run: Run, section: str, *overrides: str) -> None:
        self.measure(run, self.stage(section, f"seed={run[2]}", *overrides, output=folder(run)))

    def distil(self, run: Run, student: Path, *overrides: str, data: str = "data") -> None:
        plan = "null" if run[1] == SCRATCH_KL else student
        values = [f"seed={run[2]}", f"distill.student={student}", f"distill.plan={plan}", *overrides]
        self.measure(run, self.stage("distill", *values, output=folder(run)), data)

    def measure(self, run: Run, model: Artifact, data: str = "data") -> None:
        self.losses[run] = self.held_out(model, data)
        self.parameters[run[0]] = model.metrics["parameters"]
        print(f"{statistics.mean(self.losses[run]):8.4f}  {', '.join(map(str, run))}", flush=True)


def runs(seeds: int) -> list[Run]:
    """In the order they are made. After the first seed those alone that findings rest on."""
    return [
        (student, name, seed)
        for seed in SEEDS[:seeds]
        for name in NAMES
        for student in STUDENTS
        if name not in (ONLY_DEPTH if student == WIDTH else ONLY_WIDTH)
        if seed == SEEDS[0] or (student, name) in compared()
    ]


def folder(run: Run) -> str:
    return "_".join(str(part) for part in run).replace(",", "").replace("+", "and").replace(" ", "_")


def other_corpus() -> list[str]:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    headers = Path(spec.origin).parent / "include" / "torch" / "csrc"
    return [f"prepare_data.corpus={{path: {headers}, glob: '*.h'}}", "prepare_data.validation_fraction=0.1"]


# ---- the findings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """`better` ends at a lower loss than `worse`; or, where `no_gain`, it does not."""

    says: str
    source: str
    student: str
    better: str
    worse: str
    worse_student: str | None = None
    no_gain: bool = False


A, B = "arXiv:2407.14679", "arXiv:2408.11796"
FINDINGS = [
    finding
    for student in STUDENTS
    for finding in (
        Finding("distillation beats cross-entropy", f"{A} T14", student, KL, CE),
        Finding("KL alone beats KL with cross-entropy", f"{A} T15", student, KL, KL_CE),
        Finding("forward KL beats reverse KL", f"{A} T15, T16", student, KL, REVERSE),
        Finding("forward KL beats cosine", f"{A} T15", student, KL, COSINE),
        Finding("forward KL beats MSE", f"{A} T15", student, KL, MSE),
        Finding("top k up to 100 hurts (renormalised)", f"{A} A.5", student, KL, RENORMALISED),
        Finding("top k up to 100 hurts (tail as a bucket)", f"{A} A.5", student, KL, BUCKET),
        Finding("pruned beats from scratch, cross-entropy", f"{A} T14", student, CE, SCRATCH),
    )
] + [
    Finding("hidden states help where depth is cut a lot", f"{A} T17", DEPTH, KL_HIDDEN, KL),
    Finding("so they do with each layer mapped to itself", "no paper", DEPTH, KL_HIDDEN_PLAN, KL),
    Finding("hidden states do not help where width is cut", f"{A} T18", WIDTH, KL_HIDDEN, KL, no_gain=True),
    Finding("distillation beats cross-entropy from scratch", f"{B} Fig 6", WIDTH, SCRATCH_KL, SCRATCH),
    Finding("pruned by chance beats from scratch, distilled", f"{B} Fig 6", WIDTH, RANDOM_KL, SCRATCH_KL),
    Finding("pruned by importance beats by chance, distilled", f"{B} Fig 6", WIDTH, KL, RANDOM_KL),
    Finding("width beats depth, not retrained", f"{A} T1", WIDTH, PRUNED, PRUNED, worse_student=DEPTH),
    Finding("width beats depth, distilled", f"{A} T1, {B} Fig 7", WIDTH, KL, KL, worse_student=DEPTH),
    Finding("a teacher corrected to the data teaches better", f"{B} Fig 4", WIDTH, OTHER_CORRECTED, OTHER_KL),
    Finding("on its own data correction gives nothing", f"{B} s2", WIDTH, CORRECTED, KL, no_gain=True),
]


def compared() -> set[tuple[str, str]]:
    """(student, name) of the runs that a finding rests on."""
    better = {(each.student, each.better) for each in FINDINGS}
    return better | {(each.worse_student or each.student, each.worse) for each in FINDINGS}


def judged(finding: Finding, losses: dict[Run, list[float]]) -> dict[str, Any] | None:
    """The finding's difference worse - better and whether it shows; None where a run is missing."""
    by_seed = []
    for seed in (ONCE, *SEEDS):
        better = losses.get((finding.student, finding.better, seed))
        worse = losses.get((finding.worse_student or finding.student, finding.worse, seed))
        if better and worse:  # the same micro-batches: their own difficulty cancels
            by_seed.append([w - b for b, w in zip(better, worse, strict=True)])
    if not by_seed:
        return None
    differences = [statistics.mean(each) for each in by_seed]
    of_batches = [statistics.mean(each) for each in zip(*by_seed, strict=True)]
    mean, error = statistics.mean(of_batches), statistics.stdev(of_batches) / len(of_batches) ** 0.5
    sure = abs(mean) > 2 * error and len({difference > 0 for difference in differences}) == 1
    if finding.no_gain:
        verdict = "does not show" if sure and mean > 0 else "shows"
    else:
        verdict = "undecided" if not sure else "shows" if mean > 0 else "the opposite shows"
    return {
        "finding": finding.says,
        "source": finding.source,
        "student": finding.student,
        "difference": f"[{finding.worse}] - [{finding.better}]",
        "nats_per_token": round(mean, 4),
        "standard_error": round(error, 4),
        "by_seed": [round(difference, 4) for difference in differences],
        "verdict": verdict,
    }


# ---- the answer ------------------------------------------------------------------------------------------------------


def table(losses: dict[Run, list[float]]) -> dict[str, dict[str, list[float]]]:
    """Name -> student -> loss with each seed."""
    rows: dict[str, dict[str, list[float]]] = {}
    for (student, name, _), of_batches in losses.items():
        rows.setdefault(name, {}).setdefault(student, []).append(round(statistics.mean(of_batches), 4))
    return rows


def show(rows: dict[str, dict[str, list[float]]], findings: list[dict[str, Any]]) -> None:
    print(f"\nheld-out loss, nats per token, by seed\n{'':52}{WIDTH:20}{DEPTH}")
    for name, by_student in rows.items():
        if "teacher" in by_student:
            print(f"teacher {name:44}{by_student['teacher'][0]:.4f}")
            continue
        cells = ("  ".join(f"{loss:.4f}" for loss in by_student.get(student, [])) for student in STUDENTS)
        print(f"{name:52}" + "".join(f"{cell:20}" for cell in cells))
    print("\nfindings: what the other ends at more, nats per token, +- its standard error, and with each seed")
    for each in findings:
        number = f"{each['nats_per_token']:+.4f} +- {each['standard_error']:.4f}"
        seeds = " ".join(f"{difference:+.4f}" for difference in each["by_seed"])
        print(f"{each['student']:6}{each['finding']:50}{number:20}[{seeds}]  {each['verdict']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of 16 x 256 tokens, for every run")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--minutes", type=float, help="after so many no further run is begun; the answer is of those")
    parser.add_argument("--run-dir", type=Path, help="keeps the artifacts; taken where they stand")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    began = begin()
    with tempfile.TemporaryDirectory() as folder_of_run:
        bench = Bench((options.run_dir or Path(folder_of_run)).resolve(), options.steps)
        bench.prepare()
        for run in runs(options.seeds):
            in_time = options.minutes is None or time.monotonic() - began < 60 * options.minutes
            if in_time or is_artifact(bench.run_dir / folder(run)):
                bench.retrain(run)
    rows = table(bench.losses)
    findings = [found for finding in FINDINGS if (found := judged(finding, bench.losses))]
    show(rows, findings)
    print(f"took {(time.monotonic() - began) / 60:.0f} minutes")
    if options.save:
        save(options, bench, rows, findings)
    return 0


def save(options: Any, bench: Bench, rows: dict[str, Any], findings: list[dict[str, Any]]) -> None:
    import torch

    result = {
        "command": "make bench-paper-in-small, with --save",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else machine.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "steps": options.steps,
        "tokens": options.steps * 16 * 256,
        "seeds": list(SEEDS[: options.seeds]),
        "held_out_tokens": HELD_OUT * 256,
        "parameters": bench.parameters,
        "held_out_loss_by_seed": rows,
        "findings": findings,
    }
    path = Path(__file__).parent / "results" / "paper_in_small.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
