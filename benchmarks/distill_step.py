"""What does a distillation step cost beside its parts, the student's training step and the teacher's forward pass?

    step       `TeacherStudent` under Megatron's DDP and schedule, as it is trained: both models, forward KL, backward
    student    the student alone under the same: cross-entropy, backward
    teacher    its forward pass to logits

The three run alternately in one process, on the same tokens; on a CPU the process's CPU time is what counts. The
answer leads with step / (student + teacher), paired runs, without the optimizer and, as a second number, with its step
(clipping, Adam, float32 master weights) on both sides. It should stay below 1.15, and the command fails where one of
the two does not. A step can cost less than its parts: it reads the student's logits once for loss and gradient, and
never makes the teacher's whole. The divergence must equal that of whole logits before any clock starts. `--save` keeps
the result in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from importance import QUICKSTART, WIDE, synchronise  # this folder's; it also makes tests/support importable
from minitron_nemo import platform
from minitron_nemo.distillation.loss import LOSS, Loss
from minitron_nemo.distillation.teacher import LiveTeacher
from minitron_nemo.distillation.teacher_student import TeacherStudent, adjust_tensor_shapes_fn, teacher_student_in
from minitron_nemo.shape import ModelShape
from support.megatron import bare_model, causal_mask, start_alone

CASES = [  # name, teacher, student's dims, seq_length, micro_batch, micro-batches a step
    ("quickstart", QUICKSTART, {"hidden_size": 160, "ffn_hidden_size": 384, "num_attention_heads": 4}, 256, 8, 2),
    ("wide", WIDE, {"hidden_size": 1024, "ffn_hidden_size": 2560, "num_attention_heads": 8}, 512, 2, 1),
]
REPEATS = 11
LIMIT = 1.15


class Contender:
    """A model under Megatron's DDP, schedule and optimizer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=platform.supports_distributed_optimizer()
            ),
            model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-5,
                bf16=model.config.bf16,
                clip_grad=1.0,
                use_distributed_optimizer=platform.supports_distributed_optimizer(),
            ),
            [self.model],
        )
        self.told_mask = isinstance(model, TeacherStudent)

    def forward_backward(self, batches: list[dict[str, Tensor]]) -> None:
        rows, length = batches[0]["input_ids"].shape
        self.model.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
            adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(self.model),
        )

    def _forward_step(self, batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        mask = batch["loss_mask"]
        told = batch if self.told_mask else {name: value for name, value in batch.items() if name != "loss_mask"}

        def total(losses: Tensor | Loss) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            if isinstance(losses, Loss):
                return losses.sum, losses.count.int(), {}
            return (losses.float() * mask).sum(), mask.sum().int(), {}

        return model(**told), total

    def step(self) -> None:
        self.optimizer.step()
        if inner := teacher_student_in(self.model):
            inner.end_step()


def setup(teacher: ModelShape, dims: dict[str, int], dtype: torch.dtype, length: int, rows: int, number: int) -> Any:
    """The three contenders' models, and the micro-batches of a step."""
    torch.manual_seed(0)
    device = platform.device()

    def model(shape: ModelShape) -> Any:
        options = {"calculate_per_token_loss": True, "finalize_model_grads_func": finalize_model_grads}
        return bare_model(shape, dtype=dtype, **options).to(device)

    student = teacher.pruned_to(**dims)
    teaching = model(teacher).eval().requires_grad_(False)
    tokens = torch.randint(teacher.padded_vocab_size, (number, rows, length + 1), device=device)
    batches = [
        {
            "input_ids": row[:, :-1],
            "position_ids": torch.arange(length, device=device).expand(rows, length),
            "attention_mask": causal_mask(length).to(device),
            "labels": row[:, 1:].contiguous(),
            "loss_mask": torch.ones(rows, length, device=device),
        }
        for row in tokens
    ]
    distilled = TeacherStudent(model(student).train(), LiveTeacher(teaching))
    return Contender(distilled), Contender(model(student).train()), teaching, batches


@torch.no_grad()
def teach(teacher: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    for batch in batches:
        logits = teacher(batch["input_ids"], batch["position_ids"], batch["attention_mask"])
    return logits


def require_equal_divergence(step: Contender, teacher: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    both = teacher_student_in(step.model)
    assert both is not None
    of_step = both(**batch)
    log_p, log_q = (
        model(batch["input_ids"], batch["position_ids"], batch["attention_mask"]).float().log_softmax(-1)
        for model in (teacher, both.student)
    )
    of_logits = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(of_step.report[LOSS], of_logits.detach(), rtol=2e-2, atol=1e-4)
    both.end_step()


def measure(name: str, teacher: ModelShape, dims: dict[str, int], *sizes: int, dtype: torch.dtype) -> dict[str, Any]:
    step, student, teaching, batches = setup(teacher, dims, dtype, *sizes)
    require_equal_divergence(step, teaching, batches[0])
    parts: dict[str, Callable[[], Any]] = {
        "step": lambda: step.forward_backward(batches),
        "step_optimizer": step.step,
        "student": lambda: student.forward_backward(batches),
        "student_optimizer": student.step,
        "teacher": lambda: teach(teaching, batches),
    }
    for run in parts.values():
        run()
    seconds = [{part: seconds_of(run) for part, run in parts.items()} for _ in range(REPEATS)]
    without = [each["step"] / (each["student"] + each["teacher"]) for each in seconds]
    with_it = [
        (each["step"] + each["step_optimizer"]) / (each["student"] + each["student_optimizer"] + each["teacher"])
        for each in seconds
    ]
    return {
        "case": name,
        "s, b, micro-batches": list(sizes),
        "teacher_parameters": teacher.num_parameters,
        "student_parameters": teacher.pruned_to(**dims).num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "ratio_20_50_80": percentiles(without),
        "ratio_with_optimizer_20_50_80": percentiles(with_it),
        "median_ms": {part: round(1e3 * statistics.median(each[part] for each in seconds), 1) for part in parts},
    }


def seconds_of(run: Callable[[], Any]) -> float:
    """On a CPU of this process, which others on the machine hardly change; on an accelerator by the clock."""
    now = time.perf_counter if platform.has_accelerator() else time.process_time
    synchronise()
    begin = now()
    run()
    synchronise()
    return now() - begin


def percentiles(values: list[float]) -> list[float]:
    return [round(sorted(values)[int(q * (len(values) - 1))], 3) for q in (0.2, 0.5, 0.8)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    save = parser.parse_args().save
    start_alone()
    rows = []
    for name, teacher, dims, *sizes in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            row = measure(name, teacher, dims, *sizes, dtype=dtype)
            rows.append(row)
            answers = (
                "{1:.3f}x [{0:.3f}, {2:.3f}]".format(*row[key])
                for key in ("ratio_20_50_80", "ratio_with_optimizer_20_50_80")
            )
            times = "  ".join(f"{part} {value}" for part, value in row["median_ms"].items())
            print(f"{name:12}{row['dtype']:10}" + "   with optimizer ".join(answers) + f"   ms: {times}", flush=True)
    if save:
        result = {
            "command": "python benchmarks/distill_step.py --save",
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if platform.has_accelerator() else machine.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "limit": LIMIT,
            "time": "by the clock" if platform.has_accelerator() else "CPU time of the process",
            "ratio": "step / (student + teacher), 20, 50 and 80 percentiles of paired runs",
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / "distill_step.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    short = [row for row in rows if max(row["ratio_20_50_80"][1], row["ratio_with_optimizer_20_50_80"][1]) > LIMIT]
    for row in short:
        print(f"{row['case']} {row['dtype']}: above the limit of {LIMIT}.")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
