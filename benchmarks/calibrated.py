"""What is calibrated surgery worth, before any retraining and in tokens of distillation?

The quickstart's teacher and recipe through the real stages. It is cut to three widths and two depths; each cut is made
in every way that is compared, at the same dims, and distilled on the same tokens:

    random, magnitude    channels, neurons and heads by chance or by the size of their weights
    papers               by activations (arXiv:2407.14679), nothing rescaled
    + norm scale         ... and gammas of the norms rescaled
    + rotation           ... and the principal axes of the residual stream instead of channels
    + compensation       ... and what reads neurons and heads refitted
    + selection          ... and which of these stay chosen by what refitting could least make up for
    without rotation     all but the rotation
    sequential           student beside teacher, all fitted layer by layer: prune.surgery.method=calibrated
    of depth             papers; + scale, + least squares: the layer before the gap corrected; sequential

Each distillation is measured on validation text as it goes, so a cut has a loss at every share of the token budget; and
a number of tokens after which it is where the papers' cut ends, read off between two measurements. The last loss is of
256 held-out samples. Seeds are orders of the data; a cut is the same for all of them, `random` one draw.

`make bench-calibrated`, about an hour on two cores; `--save` keeps the answer in benchmarks/results/ and draws its
curves into docs/calibrated.svg. With `--run-dir` artifacts that stand are taken: what was cut off goes on. It exits 1
where the calibrated cut does not end below the papers' in every target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from stages import HELD_OUT, Stages, begin, curve, in_parts

SEEDS = (1234, 4321, 777)
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
VALIDATION_BATCHES = 4
PAPERS, ALL, SEQUENTIAL = "papers", "+ selection", "sequential"
LADDER = (
    "random", "magnitude", PAPERS, "+ norm scale", "+ rotation", "+ compensation", ALL, "without rotation", SEQUENTIAL,
)  # fmt: skip
OF_DEPTH = (PAPERS, "+ scale", "+ least squares", SEQUENTIAL)
MEASURED_FULLY = (PAPERS, ALL, "+ least squares", SEQUENTIAL)
"""With every seed, whatever --seeds says."""


def dims(hidden_size: int, ffn_hidden_size: int, num_attention_heads: int) -> list[str]:
    return [
        f"prune.target.hidden_size={hidden_size}",
        f"prune.target.ffn_hidden_size={ffn_hidden_size}",
        f"prune.target.num_attention_heads={num_attention_heads}",
    ]


def layers(keep: int) -> list[str]:
    return [*dims(224, 640, 8), f"+prune.target.num_layers={keep}", "prune.depth.metric=greedy"]


TARGETS = {
    "width 75%": dims(192, 512, 6),
    "width 50%": dims(152, 352, 4),
    "width 30%": dims(112, 192, 4),
    "depth 4 of 6": layers(4),
    "depth 2 of 6": layers(2),
}
_SURGERY = "prune.surgery."
_ENERGY, _TURNED, _COMPENSATED = (
    f"{_SURGERY}norm_scale=energy",
    f"{_SURGERY}basis=rotation",
    f"{_SURGERY}compensate=true",
)
CUTS = {
    "random": ["prune.importance={run_dir}/importance_random"],
    "magnitude": ["prune.importance={run_dir}/importance_magnitude"],
    PAPERS: [],
    "+ norm scale": [_ENERGY],
    "+ rotation": [_ENERGY, _TURNED],
    "+ compensation": [_ENERGY, _TURNED, _COMPENSATED, f"{_SURGERY}compensation.selection=scores"],
    ALL: [_ENERGY, _TURNED, _COMPENSATED],
    "without rotation": [_ENERGY, _COMPENSATED],
    "+ scale": [f"{_SURGERY}correct_depth=true", f"{_SURGERY}depth_correction.method=scale"],
    "+ least squares": [f"{_SURGERY}correct_depth=true"],
    SEQUENTIAL: [f"{_SURGERY}method=calibrated"],
}
STYLES: dict[str, dict[str, Any]] = {
    "random": {"color": "0.75"},
    "magnitude": {"color": "0.5"},
    PAPERS: {"color": "#0072b2", "linewidth": 2.2},
    "+ norm scale": {"color": "#56b4e9"},
    "+ rotation": {"color": "#009e73"},
    "+ compensation": {"color": "#e69f00"},
    ALL: {"color": "#d55e00", "linewidth": 2.2},
    "without rotation": {"color": "#cc79a7"},
    SEQUENTIAL: {"color": "0.0", "linewidth": 2.2},
    "+ scale": {"color": "#e69f00", "linestyle": "--"},
    "+ least squares": {"color": "#d55e00", "linestyle": "--", "linewidth": 2.2},
}
"""Of a way's curve."""
Cut = tuple[str, str]
"""Target, way."""


class Bench(Stages):
    kind = ""
    """Of distillation, at the beginning of its folders."""

    def __init__(self, run_dir: Path, steps: int, seeds: int) -> None:
        shared = [
            f"distill.training.steps={steps}",
            f"distill.training.validation_every={max(1, steps // 10)}",
            f"distill.training.validation_batches={VALIDATION_BATCHES}",
            "trainer.tensorboard=false",
            "estimate_importance.depth.greedy.metric=squared_error",
            "estimate_importance.depth.greedy.drop=4",
            "estimate_importance.depth.num_samples=64",
            "estimate_importance.model=${import_hf.output}",
            "distill.teacher=${import_hf.output}",
            f"{_SURGERY}compensation.layers_at_once=0",
        ]
        super().__init__(run_dir, shared)
        self._seeds = seeds

    def seeds(self, cut: Cut) -> tuple[int, ...]:
        return SEEDS if cut[1] in MEASURED_FULLY else SEEDS[: self._seeds]

    def prepare(self) -> None:
        """What all runs share; the second moments of the stream come with the importance."""
        self.stage("import_hf")
        self.stage("prepare_data")
        self.stage("estimate_importance")
        self.estimate_plain_importances()

    def cuts(self) -> list[Cut]:
        """Those first that the rest is measured against."""
        cuts = [(target, way) for target in TARGETS for way in (OF_DEPTH if target.startswith("depth") else LADDER)]
        return sorted(cuts, key=lambda cut: cut[1] not in MEASURED_FULLY)

    def cut(self, cut: Cut) -> Artifact:
        target, way = cut
        values = [value.format(run_dir=self.run_dir) for value in CUTS[way]]
        return self.stage("prune", *TARGETS[target], *values, output=folder(cut))

    def distilled(self, cut: Cut, seed: int) -> Artifact:
        student = self.cut(cut).path
        values = [f"seed={seed}", f"distill.student={student}", f"distill.plan={student}"]
        return self.stage("distill", *values, output=f"{self.kind}{folder(cut)}_{seed}")

    def start(self, cut: Cut, seed: int) -> float:
        """Loss of the cut on the validation text that this seed's distillation reads: of a step at no learning rate."""
        student, rate = self.cut(cut).path, "distill.training.optim."
        values = [f"seed={seed}", f"distill.student={student}", f"distill.plan={student}", f"{rate}warmup_steps=0"]
        values += ["distill.training.steps=1", f"{rate}lr=1.0e-12", f"{rate}min_lr=0.0"]
        values += ["distill.training.validation_every=1"]
        return curve(self.stage("distill", *values, output=f"{folder(cut)}_start_{seed}"))[-1][1]

    def run(self, cut: Cut) -> None:
        self.held_out(self.cut(cut))
        for seed in self.seeds(cut):
            self.start(cut, seed)
            self.held_out(self.distilled(cut, seed))

    def is_done(self, cut: Cut) -> bool:
        runs = [f"{folder(cut)}{start}_{seed}" for start in ("", "_start") for seed in self.seeds(cut)]
        return all(is_artifact(self.run_dir / name) for name in runs)

    def answer(self, cut: Cut) -> dict[str, Any]:
        """All numbers of one cut. Losses in nats per token; curves by (share of the budget, validation loss)."""
        students = [self.distilled(cut, seed) for seed in self.seeds(cut)]
        starts = [(0.0, self.start(cut, seed)) for seed in self.seeds(cut)]
        curves = [[start, *as_shares(curve(student))] for start, student in zip(starts, students, strict=True)]
        mean = [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves, strict=True)]
        return {
            "parameters": self.cut(cut).metrics["parameters"],
            "held_out_not_retrained": round(statistics.mean(self.held_out(self.cut(cut))), 4),
            "held_out_distilled": [round(statistics.mean(self.held_out(student)), 4) for student in students],
            "validation": [[share, round(loss, 4)] for share, loss in mean],
            "tokens": students[0].metrics["tokens"],
        }


def folder(cut: Cut) -> str:
    return "_".join(cut).replace("%", "").replace("+ ", "and_").replace(" ", "_")


def as_shares(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    return [(tokens / points[-1][0], loss) for tokens, loss in points]


def at(points: list[list[float]], share: float) -> float:
    """The loss at a share of the budget, on the line between two measurements."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= share <= x1 + 1e-9:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    raise ValueError(share)


def share_to_reach(points: list[list[float]], loss: float) -> float | None:
    """The share of the budget after which a curve is first at `loss`; None: not within it."""
    if points[0][1] <= loss:
        return 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= loss:
            return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None


# ---- the answer ------------------------------------------------------------------------------------------------------


def show(answers: dict[str, dict[str, Any]], teacher: float) -> bool:
    """The table; whether the calibrated cut ends below the papers' in every target."""
    print(f"\nteacher {teacher:.3f}. Validation loss, nats per token, after shares of the budget; held-out at the end,")
    print("mean and spread over seeds; share of the budget after which a cut is where the papers' ends")
    header = "".join(f"{share:>8.0%}" for share in SHARES)
    print(f"{'':32}{header}{'held out':>18}{'to reach':>10}")
    below = True
    for target, ways in answers.items():
        for way, answer in ways.items():
            final = answer["held_out_distilled"]
            cells = "".join(f"{at(answer['validation'], share):8.3f}" for share in SHARES)
            spread = max(final) - min(final)
            reach = answer["share_to_reach_papers"]
            reached = "-" if reach is None else f"{reach:.0%}"
            print(f"{target:14}{way:18}{cells}{statistics.mean(final):11.3f} ~{spread:.3f}{reached:>10}")
        best = ALL if ALL in ways else "+ least squares"
        below &= best in ways and max(ways[best]["held_out_distilled"]) < min(ways[PAPERS]["held_out_distilled"])
    return below


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of 16 x 256 tokens, for every distillation")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1), help="of other ways")
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the runs")
    parser.add_argument("--minutes", type=float, help="after so many no further cut is begun; the answer is of those")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # i/n: of such a process
    parser.add_argument("--run-dir", type=Path, help="keeps the artifacts; taken where they stand")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    began = begin()
    with tempfile.TemporaryDirectory() as folder_of_run:
        run_dir = (options.run_dir or Path(folder_of_run)).resolve()
        bench = Bench(run_dir, options.steps, options.seeds)
        if options.part is None:
            bench.prepare()
            if options.minutes != 0:
                command = [__file__, "--run-dir", str(run_dir), "--steps", str(options.steps)]
                command += ["--seeds", str(options.seeds)]
                command += ["--minutes", str(options.minutes)] if options.minutes else []
                in_parts(command, options.jobs)  # what one leaves out, this process makes
        part, parts = (0, 1) if options.part is None else map(int, options.part.split("/"))
        for number, cut in enumerate(bench.cuts()):
            in_time = options.minutes is None or time.monotonic() - began < 60 * options.minutes
            if number % parts == part and (in_time or bench.is_done(cut)):
                bench.run(cut)
                print(f"{time.monotonic() - began:6.0f} s  {', '.join(cut)}", flush=True)
        if options.part is not None:
            return 0
        answers: dict[str, dict[str, Any]] = {}
        for target, way in filter(bench.is_done, bench.cuts()):
            answers.setdefault(target, {})[way] = bench.answer((target, way))
        answers = {target: ways for target, ways in answers.items() if PAPERS in ways}
        for ways in answers.values():
            goal = ways[PAPERS]["validation"][-1][1]
            for answer in ways.values():
                answer["share_to_reach_papers"] = share_to_reach(answer["validation"], goal)
        teacher = statistics.mean(bench.held_out(open_artifact(run_dir / "teacher")))
    below = show(answers, teacher)
    print(f"took {(time.monotonic() - began) / 60:.0f} minutes")
    if options.save:
        save(options, answers, teacher)
    return 0 if below else 1


def save(options: Any, answers: dict[str, Any], teacher: float) -> None:
    import torch

    result = {
        "command": "make bench-calibrated, with --save",
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "teacher_held_out": round(teacher, 4),
        "steps": options.steps,
        "tokens": options.steps * 16 * 256,
        "seeds": {"papers and calibrated": list(SEEDS), "others": list(SEEDS[: options.seeds])},
        "held_out_tokens": HELD_OUT * 256,
        "validation_tokens": VALIDATION_BATCHES * 16 * 256,
        "cuts": answers,
        "not_run": [
            list(cut)
            for cut in Bench(Path(), options.steps, options.seeds).cuts()
            if cut[1] not in answers.get(cut[0], {})
        ],
    }
    here = Path(__file__).parent
    (here / "results" / "calibrated.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(answers, here.parent / "docs" / "calibrated.svg")


def draw(answers: dict[str, dict[str, Any]], file: Path) -> None:
    """Validation loss over the token budget, a panel for each target."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": file.stem}
    with rc_context({**text, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        *panels, legend = figure.subplots(2, 3).flat
        lines: dict[str, Any] = {}
        for axes, (target, ways) in zip(panels, answers.items(), strict=False):
            for way in filter(ways.get, STYLES):
                shares, losses = zip(*ways[way]["validation"], strict=True)
                tokens = [share * ways[way]["tokens"] / 1e6 for share in shares]
                (line,) = axes.plot(tokens, losses, **STYLES[way])
                lines.setdefault(way, line)
            axes.set_title(target)
            axes.set_xlabel("million tokens")
        figure.supylabel("validation loss, nats per token")
        legend.axis("off")
        legend.legend(lines.values(), lines, loc="center")
        figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
