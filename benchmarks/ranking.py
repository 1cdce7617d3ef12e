"""Do importance scores choose better than weight magnitude and chance, and which of them best?

On the teacher that the package brings along: for each target (hidden channels, neurons, heads, all of them together,
layers) the held-out loss right after pruning to the same dims, nothing retrained, by every metric and aggregation,
by weight magnitude and by chance (5 seeds); and by calibrated surgery (docs/surgery.md), which chooses neurons and
heads by what refitting could least make up for, and refits. Losses are of two held-out sets that share no sample. Exits
non-zero where neither the metric that the docs recommend for a target (`RECOMMENDED`, named here before anything is
measured) nor calibrated surgery beats magnitude and every chance on both sets; prints by how much each does, with the
standard error of the difference.
`make bench-ranking`, or `python benchmarks/ranking.py`; the table goes to benchmarks/results/ranking.json.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from minitron_nemo import engine
from minitron_nemo.aggregation import Aggregation
from minitron_nemo.cli import set_up_environment
from minitron_nemo.config.importance import DepthConfig, GreedyConfig, ImportanceConfig
from minitron_nemo.config.pruning import CompensationConfig, DepthChoice, SurgeryConfig
from minitron_nemo.config.trainer import Layout, TrainerConfig
from minitron_nemo.hf.checkpoint import load_hf
from minitron_nemo.hf.folder import shape_from_hf
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import kept_layers, plan_from_importance, prune_into
from minitron_nemo.pruning.compensation import compensate
from minitron_nemo.pruning.composition import split
from minitron_nemo.pruning.iterative import plan_in_rounds, targets_of_rounds
from minitron_nemo.quiet import hush
from minitron_nemo.runtime.depth_sweep import estimate_depth
from minitron_nemo.runtime.forward import estimate_importance, loss_sums, run_forward
from minitron_nemo.runtime.layout import use_layout
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages import prepare_data
from minitron_nemo.stages.import_hf import embedded_teacher
from minitron_nemo.text.blend import split_prefixes
from minitron_nemo.text.corpus import TRAIN, VALIDATION
from minitron_nemo.text.windows import batches

SAMPLES, HELD_OUT, SEEDS = 256, 64, 5
TRAINER = TrainerConfig(precision="fp32", seq_length=256, micro_batch_size=8, tensorboard=False)
DTYPE = torch.float32
TARGETS = {
    "hidden -1/3": {"hidden_size": 144},
    "ffn -50%": {"ffn_hidden_size": 320},
    "heads -25%": {"num_attention_heads": 6},
    "heads -50%": {"num_attention_heads": 4},
    "all together": {"hidden_size": 160, "ffn_hidden_size": 384, "num_attention_heads": 4},
}
METRICS = ("activations", "contributions")
LAYERS_DROPPED = 2
DEPTH = f"layers -{LAYERS_DROPPED}"
DEPTH_METRICS = ["block_influence", "loss", "kl", "squared_error"]
RECOMMENDED = dict.fromkeys(TARGETS, "contributions l2,l2") | {DEPTH: "greedy by squared_error"}
CALIBRATED = "calibrated"
BASELINES = ("random", "weight_magnitude")
ROUNDS = 2
RESULT = Path(__file__).parent / "results" / "ranking.json"

Row = dict[str, torch.Tensor]
"""Ranking -> loss of each held-out micro-batch, both sets after each other, [2 * micro-batches of a set] float64."""


class Bench:
    """The teacher, its data, and the loss of what a plan keeps of it."""

    def __init__(self, folder: Path) -> None:
        teacher = embedded_teacher()
        self.shape = shape_from_hf(teacher)
        use_layout(Layout(), seed=0)
        self.core = engine.new_core(self.shape, TRAINER, DTYPE)
        load_hf(self.core, teacher, self.shape, Groups.from_megatron())
        config = prepare_data.PrepareDataConfig(corpus="stdlib", tokenizer=str(teacher), output=str(folder / "data"))
        self.data = prepare_data.run(config)
        self.held_out = self.batches(VALIDATION, 2 * HELD_OUT, seed=1)
        self._losses: dict[str, torch.Tensor] = {}

    def batches(self, split: str, num_samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
        return list(
            batches(
                list(split_prefixes(self.data, split)),
                TRAINER.seq_length,
                TRAINER.micro_batch_size,
                num_samples,
                seed=seed,
            )
        )

    def importance(
        self, metric: str, seed: int = 0, core: GPTModel | None = None, shape: ModelShape | None = None
    ) -> Importance:
        """Width scores of the teacher, or of a student of it."""
        samples = self.batches(TRAIN, SAMPLES, seed=0)
        config = ImportanceConfig(num_samples=SAMPLES, metric=metric, stream="normalised" if core is None else "none")
        core, shape = core or self.core, shape or self.shape
        return estimate_importance(core, shape, samples, config, total=len(samples), seed=seed)

    def depth(self, greedy: str | None = None) -> Importance:
        samples = self.batches(TRAIN, SAMPLES // 4, seed=0)
        config = DepthConfig(
            metrics=[] if greedy else DEPTH_METRICS,
            block_sizes=[1, LAYERS_DROPPED],
            greedy=GreedyConfig(metric=greedy, drop=LAYERS_DROPPED),
            num_samples=SAMPLES // 4,
        )
        scores = estimate_depth(self.core, self.shape, samples, config, total=len(samples))
        return Importance(self.shape, {}, SAMPLES // 4, depth=scores)

    def student(self, plan: PruningPlan) -> GPTModel:
        core = engine.new_core(plan.target, TRAINER, DTYPE)
        prune_into(self.core, core, plan, Groups.from_megatron())
        return core

    def calibrated(self, importance: Importance, wanted: ModelShape) -> torch.Tensor:
        """Losses of the calibrated cut, neurons and heads refitted on the samples of the importance."""
        surgery = SurgeryConfig(CALIBRATED, refit="none")
        options = {"batch_aggregation": "l2", "sequence_aggregation": "l2", "surgery": surgery}
        of_stream, of_blocks = split(plan_from_importance(importance, self.shape, wanted, **options))
        between, samples = self.student(of_stream), self.batches(TRAIN, SAMPLES, seed=0)

        def run(before: Any) -> None:
            run_forward(between, samples, before=before, label="compensation", total=len(samples))

        config = CompensationConfig(layers_at_once=0)
        if surgery.compensates(self.shape, wanted):
            of_blocks = compensate(between, of_blocks, Groups.from_megatron(), run, config).plan
        core = engine.new_core(wanted, TRAINER, DTYPE)
        prune_into(between, core, of_blocks, Groups.from_megatron())
        return self.measured(core)

    def measured(self, core: GPTModel) -> torch.Tensor:
        sums = torch.stack(
            loss_sums(core, self.held_out, self.shape.padded_vocab_size, label="loss", total=len(self.held_out))
        )
        return sums[:, 0] / sums[:, 1]

    def losses(self, plan: PruningPlan | None = None) -> torch.Tensor:
        """Of each held-out micro-batch; a plan that was measured already is not measured again."""
        kept = plan and {axis: getattr(plan, axis) for axis in ("hidden", "ffn", "head", "layer", "head_partner")}
        key = repr(kept and {axis: entry if entry is None else entry.tolist() for axis, entry in kept.items()})
        if key not in self._losses:
            self._losses[key] = self.measured(self.core if plan is None else self.student(plan))
        return self._losses[key]


def width_table(bench: Bench) -> dict[str, Row]:
    """target -> ranking -> losses."""
    measured = {metric: bench.importance(metric=metric) for metric in METRICS}
    magnitude = bench.importance(metric="weight_magnitude")
    table: dict[str, Row] = {}
    for target, dims in TARGETS.items():
        row: Row = {}
        wanted = bench.shape.pruned_to(**dims)
        for metric, importance in measured.items():
            for batch in Aggregation:
                for sequence in Aggregation:
                    plan = plan_from_importance(
                        importance,
                        bench.shape,
                        wanted,
                        batch_aggregation=batch.value,
                        sequence_aggregation=sequence.value,
                    )
                    row[f"{metric} {batch.value},{sequence.value}"] = bench.losses(plan)
            if "num_attention_heads" in dims:
                plan = plan_from_importance(importance, bench.shape, wanted, merge_heads=True)
                row[f"{metric} l2,mean, heads merged"] = bench.losses(plan)
        row[f"{RECOMMENDED[target]}, {ROUNDS} rounds"] = bench.losses(
            in_rounds(bench, RECOMMENDED[target], measured, wanted)
        )
        row[CALIBRATED] = bench.calibrated(measured["contributions"], wanted)
        row["weight_magnitude"] = bench.losses(plan_from_importance(magnitude, bench.shape, wanted))
        for seed in range(SEEDS):
            chance = bench.importance(metric="random", seed=seed)
            row[f"random {seed}"] = bench.losses(plan_from_importance(chance, bench.shape, wanted))
        table[target] = row
        show(target, row)
    return table


def in_rounds(bench: Bench, ranking: str, measured: dict[str, Importance], wanted: ModelShape) -> PruningPlan:
    metric, aggregations = ranking.split()
    batch, sequence = aggregations.split(",")

    def score(plan: PruningPlan) -> Importance:
        return bench.importance(metric, core=bench.student(plan), shape=plan.target)

    return plan_in_rounds(
        measured[metric],
        targets_of_rounds(bench.shape, wanted, ROUNDS),
        score,
        layers=range(bench.shape.num_layers),
        batch_aggregation=batch,
        sequence_aggregation=sequence,
    )


def depth_row(bench: Bench) -> Row:
    """Losses without two layers, by how they were chosen; and of every other pair, to know what was possible."""
    scores, full = bench.depth(), bench.shape.num_layers
    keep = full - LAYERS_DROPPED
    chosen = {}
    for metric in DEPTH_METRICS:
        for contiguous in (False, True):
            choice = DepthChoice(metric=metric, contiguous=contiguous)
            name = f"{metric}{', contiguous' if contiguous else ''}"
            chosen[name] = kept_layers(scores, bench.shape, keep, depth=choice)
        order = bench.depth(greedy=metric)
        chosen[f"greedy by {metric}"] = kept_layers(order, bench.shape, keep, depth=DepthChoice(metric="greedy"))
    chosen["weight_magnitude"] = kept_layers(
        Importance(bench.shape, {}, 1, depth={"magnitude": {1: layer_magnitudes(bench)}}),
        bench.shape,
        keep,
        depth=DepthChoice(metric="magnitude"),
    )
    for seed in range(SEEDS):
        order = torch.randperm(full, generator=torch.Generator().manual_seed(seed))
        chosen[f"random {seed}"] = sorted(order[:keep].tolist())
    for kept in itertools.combinations(range(full), keep):
        chosen[f"all but {sorted(set(range(full)) - set(kept))}"] = list(kept)
    widths = bench.importance(metric="random")
    target = bench.shape.pruned_to(num_layers=keep)
    row = {
        name: bench.losses(plan_from_importance(widths, bench.shape, target, layers=layers))
        for name, layers in chosen.items()
    }
    show(DEPTH, row)
    return row


def layer_magnitudes(bench: Bench) -> torch.Tensor:
    return torch.stack(
        [sum(p.detach().double().square().sum() for p in layer.parameters()) for layer in bench.core.decoder.layers]
    ).float()


def of_sets(losses: torch.Tensor) -> list[float]:
    """Mean loss on each of the two held-out sets."""
    return [float(half.mean()) for half in losses.chunk(2)]


def show(target: str, row: Row) -> None:
    print(f"\n{target}")
    for name, losses in sorted(row.items(), key=lambda item: float(item[1].mean())):
        print("  {:7.3f} {:7.3f}  {}".format(*of_sets(losses), name), flush=True)


def margins(row: Row, offered: str) -> dict[str, dict[str, Any]]:
    """What each baseline loses beside what is offered, nats/token, and the difference's standard error."""
    found = {}
    for name in (name for name in row if name.startswith(BASELINES)):
        difference = row[name] - row[offered]  # the same micro-batches: their own difficulty cancels
        found[name] = {
            "loss": float(difference.mean()),
            "standard_error": float(difference.std() / len(difference) ** 0.5),
            "on_each_set": of_sets(difference),
        }
    return found


def is_better(margin: dict[str, dict[str, Any]]) -> bool:
    """Whether every baseline loses on both held-out sets, and by more than twice the standard error.

    One that made the very same choice does not count: of 15 pairs of layers, five draws hit the best one now and then.
    """
    others = [each for each in margin.values() if each["loss"] != 0]
    return all(min(each["on_each_set"]) > 0 and each["loss"] > 2 * each["standard_error"] for each in others)


def main() -> int:
    set_up_environment()
    hush()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        whole = bench.losses()
        print("teacher: {:.3f} and {:.3f} nats/token over two sets".format(*of_sets(whole)), end=" ")
        print(f"of {HELD_OUT} held-out samples of {TRAINER.seq_length} tokens")
        table = {DEPTH: depth_row(bench)} | width_table(bench)
    found = {
        target: {offered: margins(row, offered) for offered in (RECOMMENDED[target], CALIBRATED) if offered in row}
        for target, row in table.items()
    }
    result = {
        "command": "make bench-ranking",
        "date": date.today().isoformat(),
        "teacher": of_sets(whole),
        "calibration_samples": SAMPLES,
        "held_out_samples": [HELD_OUT, HELD_OUT],
        "torch": torch.__version__,
        "recommended": RECOMMENDED,
        "baselines_lose": found,
        "losses": {target: {name: of_sets(losses) for name, losses in row.items()} for target, row in table.items()},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print("\nwhat baselines lose beside what is offered, nats/token")
    for target, by_offer in found.items():
        for offered, margin in by_offer.items():
            name, least = min(margin.items(), key=lambda item: item[1]["loss"])
            margin_of_it = f"{least['loss']:+.4f} +- {least['standard_error']:.4f}"
            print(f"  {target:14} {offered:24} at least {margin_of_it} ({name})")
    by_ranking = [target for target in found if is_better(found[target][RECOMMENDED[target]])]
    short = [target for target in found if not any(is_better(margin) for margin in found[target].values())]
    print(f"\nthe recommended ranking beats magnitude and chance on {len(by_ranking)} of {len(table)} targets")
    print(f"it or calibrated surgery on {len(table) - len(short)}")
    if short:
        print(f"not on: {', '.join(short)}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
