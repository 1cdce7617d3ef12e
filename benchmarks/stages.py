"""What benchmarks of whole compressions share: stages of a recipe, and held-out losses of its models."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.cli import set_up_environment
from minitron_nemo.quiet import hush
from minitron_nemo.recipe import compose, config_of, stage_module
from minitron_nemo.standing import serves

HELD_OUT = 256
"""Samples of the validation split."""
PRECISION = "bf16"
"""Of every stage and loss unless a benchmark says otherwise: what `auto` is on an accelerator and on a CPU with AMX,
and on every other CPU is not."""


def begin() -> float:
    """Make this process ready for stages; returns the time by the monotonic clock."""
    set_up_environment()
    from minitron_nemo.config.trainer import Layout
    from minitron_nemo.runtime.layout import start

    hush()
    start(Layout())
    return time.monotonic()


def in_parts(command: list[str], jobs: int) -> bool:
    """Run so many processes of a benchmark, each told its --part i/n; whether all of them ended well."""
    processes = [subprocess.Popen([sys.executable, *command, "--part", f"{part}/{jobs}"]) for part in range(jobs)]
    ended = [process.wait() for process in processes]
    return not any(ended)


class Stages:
    """Stages of a recipe with other values; what stands in `run_dir` already is taken."""

    def __init__(
        self,
        run_dir: Path,
        shared: list[str],
        recipe: str = "quickstart",
        precision: str = PRECISION,
        seq_length: int | None = None,
        held_out: int = HELD_OUT,
    ) -> None:
        """
        Args:
            shared: overrides of every stage.
            seq_length: of held-out samples; None: the model's context.
            held_out: how many.
        """
        self.run_dir, self.precision = run_dir, precision
        self._seq_length, self._num_samples = seq_length, held_out
        self.shared = [f"recipe={recipe}", f"run_dir={run_dir}", f"trainer.precision={precision}", *shared]

    def stage(self, section: str, *overrides: str, output: str | None = None) -> Artifact:
        own = [] if output is None else [f"{section}.output={self.run_dir / output}"]
        config, steps = compose([*self.shared, *overrides, *own])
        step = steps[section]
        values = config_of(step, config)
        return open_artifact(values.output) if serves(step, values) else stage_module(step.stage).run(values)

    def estimate_plain_importances(self) -> None:
        """By chance and by the size of weights, as importance_random and importance_magnitude."""
        for metric, name in (("random", "random"), ("weight_magnitude", "magnitude")):
            values = [f"estimate_importance.importance.metric={metric}", "estimate_importance.importance.stream=none"]
            self.stage("estimate_importance", *values, output=f"importance_{name}")

    def held_out(self, model: Artifact, data: str = "data") -> list[float]:
        """Held-out loss of every micro-batch, nats per token, kept beside the model."""
        kept = model.path.with_name(f"{model.path.name}.on_{data}.json")
        if not kept.is_file():
            sizes = self._seq_length, self._num_samples
            kept.write_text(json.dumps(held_out_losses(model, self.run_dir / data, self.precision, *sizes)))
        losses: list[float] = json.loads(kept.read_text())
        return losses


def curve(student: Artifact) -> list[tuple[int, float]]:
    """(tokens, validation loss) of a distillation, in order."""
    records = [json.loads(line) for line in (student.path / "history.jsonl").read_text().splitlines()]
    return [(record["tokens"], record["validation_loss"]) for record in records if "validation_loss" in record]


def held_out_losses(
    model: Artifact, data: Path, precision: str, seq_length: int | None, num_samples: int
) -> list[float]:
    from minitron_nemo import engine, platform
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.runtime.forward import loss_sums
    from minitron_nemo.runtime.layout import prepare_layout
    from minitron_nemo.text.blend import split_prefixes
    from minitron_nemo.text.corpus import VALIDATION
    from minitron_nemo.text.windows import batches

    source = engine.open_model(model.path, key="model")
    seq_length = seq_length or source.shape.seq_length
    trainer = TrainerConfig(precision=precision, seq_length=seq_length, micro_batch_size=8)
    prepare_layout(trainer, source.shape)
    held_out = batches(split_prefixes(open_artifact(data), VALIDATION), trainer.seq_length, 8, num_samples, seed=0)
    core = engine.open_core(source, trainer, platform.dtype_of(trainer.precision))
    sums = loss_sums(core, held_out, source.vocab_size, label="held out", total=len(held_out))
    return [float(loss / tokens) for loss, tokens in sums]
