"""One line of progress per job, on rank 0, and the history that reports draw.

`history.jsonl` holds one object a line, losses in nats per token:

    a training step          step, tokens, loss, lr, grad_norm; parts: of a distillation those of its loss
                             (`TeacherStudent.step_losses`), of a mixture whose routers are balanced
                             load_balancing_loss (`LoadBalancing`), which is minimised beside the loss
    one that was skipped     step, tokens, skipped: true
    either of them           seconds, tokens_per_second, tflops_per_device (of the model's arithmetic, `ModelShape`),
                             mfu (its share of the device's peak, where that is known)
    a validation             step, tokens, validation_loss (cross-entropy); of a distillation validation_divergence and
                             validation_agreement; where the held-out text is of several sources, the same of each:
                             validation_loss/<source>, ...
    an evaluation of a task  step, tokens, downstream_accuracy

The trainer's loggers (TensorBoard, Weights & Biases) get the same numbers under the same names, `parts/divergence` and
so on for those of the parts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from minitron_nemo import run_record
from minitron_nemo.checks import require
from minitron_nemo.distillation.teacher_student import teacher_student_in
from minitron_nemo.nemo.load_balancing import LOAD_BALANCING, LoadBalancing
from minitron_nemo.nemo.source_losses import SourceLosses
from minitron_nemo.progress import Reporter


class History(pl.Callback):
    """Writes the history, hands it to the loggers and shows progress with time left; works on rank 0 only."""

    def __init__(
        self,
        path: Path,
        *,
        label: str,
        steps: int,
        tokens_per_step: int,
        flops_per_step: int,
        peak_tflops: float | None = None,
        balancing: LoadBalancing | None = None,
        by_source: SourceLosses | None = None,
    ) -> None:
        """
        Args:
            flops_per_step: over all devices.
            peak_tflops: of one device; None: not known.
            balancing: comes before this one among the callbacks; None: there are no routers to balance.
            by_source: comes before this one too; None: the held-out text is of one source.
        """
        self.path, self.label, self.steps, self.tokens_per_step = path, label, steps, tokens_per_step
        self.flops_per_step, self.peak_tflops = flops_per_step, peak_tflops
        self.balancing, self.by_source = balancing, by_source
        self.records: list[dict[str, Any]] = []
        self.reporter: Reporter | None = None
        self.step_started = 0.0
        self.lr = 0.0

    def kept(self, step: int) -> list[dict[str, Any]]:
        """What an earlier process wrote, up to the step that this one resumes at; less a last line that was cut off.

        Raises: Mistake: another line cannot be read.
        """
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError:
                require(
                    number == len(lines),
                    f"{self.path} cannot be read at line {number} of {len(lines)}. Mend that line, or take it out.",
                )
                said = f"The last line of {self.path} was cut off when the run ended, and is left out."
                print(said, file=sys.stderr, flush=True)
        return [record for record in records if record["step"] <= step]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.records = self.kept(trainer.global_step)
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.reporter = Reporter(self.label, self.steps)
        self.reporter.__enter__()

    def validated(self, step: int) -> bool:
        """Whether the validation after this step has been written; on rank 0, once training has started."""
        return any(record["step"] == step and "validation_loss" in record for record in self.records)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step_started = time.monotonic()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the step's end it is already the next one's

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.reporter is None:
            return
        step, metrics = trainer.global_step, trainer.callback_metrics
        record = {"step": step, "tokens": step * self.tokens_per_step}
        if pl_module.optim.skipped:  # neither is a number, which JSON has no word for
            record["skipped"], note = True, "skipped"
        else:
            loss, grad_norm = float(metrics["reduced_train_loss"]), metrics.get("grad_norm")
            record |= {"loss": loss, "lr": self.lr, "grad_norm": None if grad_norm is None else float(grad_norm)}
            note = f"loss {loss:.4f}"
            parts = {}
            if distillation := teacher_student_in(pl_module.module):
                parts = {name: float(value) for name, value in distillation.step_losses().items()}
                note += f"  agreement {parts['agreement']:.1%}"
            if self.balancing is not None:
                parts[LOAD_BALANCING] = self.balancing.of_last_step
            record |= {"parts": parts} if parts else {}
        speed = self._speed(time.monotonic() - self.step_started, trainer.world_size)  # reading the loss has waited
        self._write(trainer, record | speed)
        note += f"  {speed['tokens_per_second']:,.0f} tokens/s  {speed['tflops_per_device']:g} TFLOP/s"
        self.reporter.update(step, note + (f" ({speed['mfu']:.1%} of peak)" if "mfu" in speed else ""))

    def _speed(self, seconds: float, devices: int) -> dict[str, float]:
        tflops = self.flops_per_step / max(seconds, 1e-9) / devices / 1e12
        speed = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens_per_step / max(seconds, 1e-9), 1),
            "tflops_per_device": float(f"{tflops:.4g}"),
        }
        return speed if self.peak_tflops is None else speed | {"mfu": float(f"{tflops / self.peak_tflops:.4g}")}

    def on_validation_batch_end(self, *_: Any) -> None:
        run_record.is_at_work()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.reporter is not None and "val_loss" in trainer.callback_metrics:
            step = trainer.global_step
            record = {"step": step, "tokens": step * self.tokens_per_step}
            record["validation_loss"] = float(trainer.callback_metrics["val_loss"])
            if distillation := teacher_student_in(pl_module.module):
                found = distillation.validation_losses()
                record |= {f"validation_{name}": float(value) for name, value in found.items()}
            if self.by_source is not None:
                record |= self.by_source.of_last_validation
            self._write(trainer, record)

    def add(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        """A line of other values after the step that has just ended."""
        if self.reporter is not None:
            step = trainer.global_step
            self._write(trainer, {"step": step, "tokens": step * self.tokens_per_step} | values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _write(self, trainer: pl.Trainer, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        metrics = {name: value for name, value in record.items() if name not in ("step", "parts") and value is not None}
        metrics |= {f"parts/{name}": value for name, value in record.get("parts", {}).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=record["step"])

    def _close(self) -> None:
        if self.reporter is not None:
            self.reporter.__exit__()
            self.reporter = None
