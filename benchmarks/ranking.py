"""Do importance scores choose better than weight magnitude and chance, and which of them best?

On the teacher that the package brings along: for each target (hidden channels, neurons, heads, all of them together,
layers) the held-out loss right after pruning to the same dims, nothing retrained, by every metric and aggregation,
by weight magnitude and by chance (5 seeds). Exits non-zero where neither importance metric beats both.
`make bench-ranking`, or `python benchmarks/ranking.py`; the table goes to benchmarks/results/ranking.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from minitron_nemo.cli import quieten
from minitron_nemo.doors import hush
from minitron_nemo.engine.data import TRAIN, VALIDATION, batches, split_prefixes
from minitron_nemo.engine.depth import estimate_depth
from minitron_nemo.engine.distributed import LayoutConfig, use_layout
from minitron_nemo.engine.forward import estimate_importance, mean_loss, new_core, run_forward
from minitron_nemo.engine.hf import load_hf, shape_from_hf
from minitron_nemo.engine.training import TrainerConfig
from minitron_nemo.importance import Aggregation, Importance, ImportanceConfig
from minitron_nemo.importance.depth import DepthConfig
from minitron_nemo.parallel import Groups
from minitron_nemo.pruning import PruningPlan, kept_layers, plan_from_importance, prune_into
from minitron_nemo.pruning.planning import DepthChoice
from minitron_nemo.stages import prepare_data
from minitron_nemo.stages.import_hf import embedded_teacher

SAMPLES, HELD_OUT, SEEDS = 256, 64, 5
TRAINER = TrainerConfig(precision="fp32", seq_length=256, micro_batch_size=8, tensorboard=False)
TARGETS = {
    "hidden -1/3": {"hidden_size": 144},
    "ffn -50%": {"ffn_hidden_size": 320},
    "heads -25%": {"num_attention_heads": 6},
    "heads -50%": {"num_attention_heads": 4},
    "all together": {"hidden_size": 160, "ffn_hidden_size": 384, "num_attention_heads": 4},
}
METRICS = ("activations", "contributions")
LAYERS_DROPPED = 2
DEPTH_METRICS = ["block_influence", "loss", "kl", "squared_error"]
RESULT = Path(__file__).parent / "results" / "ranking.json"


class Bench:
    """The teacher, its data, and the loss of what a plan keeps of it."""

    def __init__(self, folder: Path) -> None:
        teacher = embedded_teacher()
        self.shape = shape_from_hf(teacher)
        use_layout(LayoutConfig(), seed=0)
        self.core = new_core(self.shape, TRAINER)
        load_hf(self.core, teacher, self.shape, Groups.from_megatron())
        config = prepare_data.PrepareDataConfig(corpus="stdlib", tokenizer=str(teacher), output=str(folder / "data"))
        self.data = prepare_data.run(config)
        self.held_out = self._batches(VALIDATION, HELD_OUT, seed=1)

    def _batches(self, split: str, num_samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
        return list(
            batches(
                list(split_prefixes(self.data, split)),
                TRAINER.seq_length,
                TRAINER.micro_batch_size,
                num_samples,
                seed=seed,
            )
        )

    def importance(self, metric: str, seed: int = 0) -> Importance:
        samples = self._batches(TRAIN, SAMPLES, seed=0)
        config = ImportanceConfig(num_samples=SAMPLES, metric=metric)
        return estimate_importance(self.core, self.shape, samples, config, total=len(samples), seed=seed)

    def depth(self) -> Importance:
        samples = self._batches(TRAIN, SAMPLES // 4, seed=0)
        scores = estimate_depth(
            self.core,
            self.shape,
            samples,
            DepthConfig(metrics=DEPTH_METRICS, block_sizes=[1, LAYERS_DROPPED], num_samples=SAMPLES // 4),
            total=len(samples),
        )
        return Importance(self.shape, {}, SAMPLES // 4, depth=scores)

    def loss(self, plan: PruningPlan | None = None) -> float:
        core = self.core
        if plan is not None:
            core = new_core(plan.target, TRAINER)
            prune_into(self.core, core, plan, Groups.from_megatron())
        return mean_loss(run_forward(core, self.held_out, label="loss", total=len(self.held_out)))[0]


def width_table(bench: Bench) -> dict[str, dict[str, float]]:
    """target -> ranking -> loss."""
    measured = {metric: bench.importance(metric=metric) for metric in METRICS}
    magnitude = bench.importance(metric="weight_magnitude")
    table: dict[str, dict[str, float]] = {}
    for target, dims in TARGETS.items():
        row: dict[str, float] = {}
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
                    row[f"{metric} {batch.value},{sequence.value}"] = bench.loss(plan)
            if "num_attention_heads" in dims:
                plan = plan_from_importance(importance, bench.shape, wanted, merge_heads=True)
                row[f"{metric} l2,mean, heads merged"] = bench.loss(plan)
        row["weight_magnitude"] = bench.loss(plan_from_importance(magnitude, bench.shape, wanted))
        for seed in range(SEEDS):
            chance = bench.importance(metric="random", seed=seed)
            row[f"random {seed}"] = bench.loss(plan_from_importance(chance, bench.shape, wanted))
        table[target] = row
        show(target, row)
    return table


def depth_row(bench: Bench) -> dict[str, float]:
    """Losses without two layers, by how they were chosen."""
    scores, full = bench.depth(), bench.shape.num_layers
    keep = full - LAYERS_DROPPED
    chosen = {}
    for metric in DEPTH_METRICS:
        for contiguous in (False, True):
            choice = DepthChoice(metric=metric, contiguous=contiguous)
            name = f"{metric}{', contiguous' if contiguous else ''}"
            chosen[name] = kept_layers(scores, bench.shape, keep, depth=choice)
    chosen["weight_magnitude"] = kept_layers(
        Importance(bench.shape, {}, 1, depth={"magnitude": {1: layer_magnitudes(bench)}}),
        bench.shape,
        keep,
        depth=DepthChoice(metric="magnitude"),
    )
    for seed in range(SEEDS):
        order = torch.randperm(full, generator=torch.Generator().manual_seed(seed))
        chosen[f"random {seed}"] = sorted(order[:keep].tolist())
    widths = bench.importance(metric="random")
    target = bench.shape.pruned_to(num_layers=keep)
    row = {
        name: bench.loss(plan_from_importance(widths, bench.shape, target, layers=layers))
        for name, layers in chosen.items()
    }
    show("layers -2", row)
    return row


def layer_magnitudes(bench: Bench) -> torch.Tensor:
    return torch.stack(
        [sum(p.detach().double().square().sum() for p in layer.parameters()) for layer in bench.core.decoder.layers]
    ).float()


def show(target: str, row: dict[str, float]) -> None:
    print(f"\n{target}")
    for name, loss in sorted(row.items(), key=lambda item: item[1]):
        print(f"  {loss:7.3f}  {name}", flush=True)


def is_better(row: dict[str, float]) -> bool:
    """Whether some importance metric, by its best aggregation, beats magnitude and every random choice."""
    baselines = [loss for name, loss in row.items() if name.startswith(("random", "weight"))]
    return min(loss for name, loss in row.items() if not name.startswith(("random", "weight"))) < min(baselines)


def main() -> int:
    quieten()
    hush()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        whole = bench.loss()
        print(f"teacher: {whole:.3f} nats/token over {HELD_OUT} held-out samples of {TRAINER.seq_length} tokens")
        table = width_table(bench) | {"layers -2": depth_row(bench)}
    result = {
        "command": "make bench-ranking",
        "date": date.today().isoformat(),
        "teacher": whole,
        "calibration_samples": SAMPLES,
        "held_out_samples": HELD_OUT,
        "torch": torch.__version__,
        "losses": table,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    short = [target for target, row in table.items() if not is_better(row)]
    print(f"\nimportance beats magnitude and chance on {len(table) - len(short)} of {len(table)} targets")
    if short:
        print(f"not on: {', '.join(short)}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
