"""What does this machine's accelerator say to the limits that a CPU cannot measure?

    importance_1b, importance_8b   importance pass / forward pass (1.05), and seconds of surgery on the device
    divergence                     fused linear KL: time of Model-Optimizer's over ours (1.5) and of Liger's (1.0),
                                   where they are installed; extra memory in bf16 logits tensors (0.25), beyond what
                                   the weight's gradient is summed up in
    step_1b, step_8b               a distillation step: MFU (0.45), time over that of student forward + backward +
                                   teacher forward (1.05), and the kernels that take it
    calibration                    calibrated solves of a layer of an 8B model
    offload                        peak of a teacher on the host over two layers and what stays on the device (1.1)

Each part is a process with a time of its own, writes benchmarks/results/gpu_check/<part>.json when it is measured, and
fails alone; together they are made to take 8 minutes on one H100. Weights are random, nothing is read from a network;
torch, Megatron-core and what pyproject.toml names beside NeMo are enough. `--only` runs some of the parts. `--tiny` is
the same with small shapes, for a CPU: it shows that each part runs, claims no limit, and writes to a temporary folder
unless `--folder` says where. Exit status 1: a part failed, or (but for tiny) a limit was missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform as machine
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from surgery import random_plan

import divergence as heads
from importance import QUICKSTART, forward, importance, seconds_of, setup, start_alone
from minitron_nemo import platform
from minitron_nemo.distillation.offload import keep_on_host
from minitron_nemo.distillation.teacher import LiveTeacher
from minitron_nemo.distillation.teacher_student import TeacherStudent
from minitron_nemo.parallel import Groups
from minitron_nemo.platform.peak import peak_tflops_here
from minitron_nemo.pruning.surgery import prune_into
from minitron_nemo.shape import ModelShape
from support.megatron import bare_model

FOLDER = Path(__file__).parent / "results" / "gpu_check"
_LLAMA: dict[str, Any] = {"family": "llama", "num_query_groups": 8, "padded_vocab_size": 128256, "seq_length": 4096}
LLAMA_1B = ModelShape(
    num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, kv_channels=64, **_LLAMA
)
LLAMA_8B = ModelShape(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, kv_channels=128, **_LLAMA
)
HALF_OF_1B = {"hidden_size": 1536, "ffn_hidden_size": 5120}
A_4B = {"hidden_size": 3072, "ffn_hidden_size": 9216}
TINY = dataclasses.replace(QUICKSTART, num_layers=2, hidden_size=64, ffn_hidden_size=96, padded_vocab_size=128)
HALF_OF_TINY = {"hidden_size": 48, "ffn_hidden_size": 64}
REPEATS = 5

Limits = dict[str, tuple[float, str, float]]
"""What was measured, how it has to stand to the limit, and the limit."""


@dataclasses.dataclass(frozen=True)
class Part:
    run: Callable[[bool], tuple[dict[str, Any], Limits]]
    seconds: int
    """Of its process."""


# ---- the parts: (tiny) -> what was measured, and its limits ----------------------------------------------------------


@torch.no_grad()
def importance_and_surgery(shape: ModelShape, target: dict[str, int], tiny: bool) -> tuple[dict[str, Any], Limits]:
    dtype, length, passes = (torch.float32, 16, 1) if tiny else (torch.bfloat16, shape.seq_length, 4)
    case = setup(shape, dtype, length, 1)
    importance(case, 1), forward(case, 1)
    ratios = sorted(
        seconds_of(lambda: importance(case, passes)) / seconds_of(lambda: forward(case, passes))
        for _ in range(1 if tiny else REPEATS)
    )
    plan = random_plan(shape, target)
    student = bare_model(plan.target, dtype=dtype).to(platform.device())
    cutting = seconds_of(lambda: prune_into(case["model"], student, plan, Groups()))
    ratio = statistics.median(ratios)
    answer = {"importance_over_forward": [round(each, 3) for each in ratios], "surgery_seconds": round(cutting, 3)}
    return answer, {"importance / forward": (ratio, "at most", 1.05)}


def liger(case: dict[str, Any]) -> list[Any]:
    """Forward KL is its generalised Jensen-Shannon divergence with beta 0, the mean over tokens."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    (hidden, weight), (of_teacher, teacher_weight) = case["student"], case["teacher"]
    loss = liger_fused_linear_jsd(hidden.flatten(0, 1), weight, of_teacher.flatten(0, 1), teacher_weight, jsd_beta=0.0)
    return [loss.detach(), *torch.autograd.grad(loss, case["student"])]


CONTENDERS = {
    "modelopt": (heads.modelopt, "modelopt", 1.5),
    "liger": (liger, "liger_kernel", 1.0),
}
"""Ours must be so many times as fast."""


def divergences(tiny: bool) -> tuple[dict[str, Any], Limits]:
    heads.H_STUDENT, heads.H_TEACHER = (24, 32) if tiny else (3072, 4096)
    grid = [(96, 10)] if tiny else [(vocab, tokens) for vocab in (32768, 131072) for tokens in (4096, 8192)]
    rows: list[dict[str, Any]] = []
    limits: Limits = {}
    for vocab, tokens in grid:
        case = heads.setup(vocab, tokens, "float32" if tiny else "bfloat16")
        case["weights"] = torch.full_like(case["weights"], 1 / tokens)
        row: dict[str, Any] = {"vocab": vocab, "tokens": tokens}
        extra, ours = heads.extra_memory(heads.fused, case)
        summed_up = 0 if tiny else 4 * vocab * heads.H_STUDENT
        row["extra_memory"] = round((extra - summed_up) / (2 * vocab * tokens), 3)
        row["extra_memory_with_the_weights_gradient"] = round(extra / (2 * vocab * tokens), 3)
        row["seconds"] = {"fused": median_seconds(lambda case=case: heads.fused(case), tiny)}
        for name, (contender, package, limit) in CONTENDERS.items():
            row["seconds"][name] = seconds_of_contender(contender, package, case, ours, tiny)
            if isinstance(row["seconds"][name], float):
                ratio = row["seconds"][name] / row["seconds"]["fused"]
                limits[f"{name} / fused, {vocab} x {tokens}"] = (ratio, "at least", limit)
        if (vocab, tokens) == heads.MEMORY_CASE:
            limits["extra memory"] = (row["extra_memory"], "at most", heads.MEMORY_LIMIT)
        rows.append(row)
    return {"hidden_size": [heads.H_STUDENT, heads.H_TEACHER], "rows": rows}, limits


def seconds_of_contender(
    contender: Callable[..., list[Any]], package: str, case: dict[str, Any], ours: list[Any], tiny: bool
) -> float | str:
    """Or why there are none."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    if package == "liger_kernel" and not platform.has_accelerator():
        return "needs an accelerator"
    try:
        theirs = contender(case)
        for own, other in zip(ours, theirs, strict=True):
            difference = float((own.float() - other.float()).norm() / other.float().norm())
            assert difference < 2e-2, f"differs by {difference:.1e}"
        del theirs
        return median_seconds(lambda: contender(case), tiny)
    except Exception as error:  # another's library: what it cannot do is part of the answer
        return f"{type(error).__name__}: {str(error)[:300]}"


def median_seconds(run: Callable[[], Any], tiny: bool) -> float:
    run()
    return statistics.median(seconds_of(run) for _ in range(1 if tiny else REPEATS))


def distillation_step(shape: ModelShape, target: dict[str, int], tiny: bool) -> tuple[dict[str, Any], Limits]:
    """Forward and backward of one micro-batch, without an optimizer, which is the same for all."""
    dtype, length = (torch.float32, 16) if tiny else (torch.bfloat16, shape.seq_length)
    case = setup(shape, dtype, length, 1)
    student = bare_model(shape.pruned_to(**target), dtype=dtype).to(platform.device()).train()
    both, batch = TeacherStudent(student, LiveTeacher(case["model"])), case["input"]
    questions = {name: value for name, value in batch.items() if name != "labels"}

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        student.zero_grad(set_to_none=True)

    def step() -> None:
        backward(both(**batch, loss_mask=case["mask"]).sum)
        both.end_step()

    def teach() -> None:
        with torch.no_grad():
            case["model"](**questions)

    seconds = {
        "step": median_seconds(step, tiny),
        "student": median_seconds(lambda: backward(student(**batch).sum()), tiny),
        "teacher": median_seconds(teach, tiny),
    }
    flops = shape.flops_per_token(length) + student_flops(shape, target, length)
    achieved, peak = flops * length / seconds["step"] / 1e12, peak_tflops_here()
    answer = {"seconds": seconds, "tflops": round(achieved, 3), "kernels": kernels_of(step)}
    limits: Limits = {
        "step / (student + teacher)": (seconds["step"] / (seconds["student"] + seconds["teacher"]), "at most", 1.05)
    }
    if peak is not None:
        limits["MFU"] = (achieved / peak, "at least", 0.45)
    return answer, limits


def student_flops(shape: ModelShape, target: dict[str, int], length: int) -> int:
    return shape.pruned_to(**target).flops_per_token(length, training=True)


def kernels_of(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The twenty that take most of the time, and how often each was launched."""
    from torch.profiler import ProfilerActivity, profile

    on_device = platform.has_accelerator()
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as profiler:
        run()
        if on_device:
            torch.cuda.synchronize()

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=spent, reverse=True)[:20]
    return [{"name": each.key[:120], "launches": each.count, "ms": round(spent(each) / 1e3, 3)} for each in events]


@torch.no_grad()
def calibration(tiny: bool) -> tuple[dict[str, Any], Limits]:
    from calibration_cost import LINEARS, compensated

    linears = {"linear_proj": (32, 48, 4, 3, 3), "linear_fc2": (32, 64, 1, 1, 40)} if tiny else LINEARS
    return {name: compensated(*sizes) for name, sizes in linears.items()}, {}


@torch.no_grad()
def offload(tiny: bool) -> tuple[dict[str, Any], Limits]:
    shape = TINY if tiny else dataclasses.replace(LLAMA_8B, num_layers=8)
    dtype, length = (torch.float32, 16) if tiny else (torch.bfloat16, 512)
    case = setup(shape, dtype, length, 1)
    model = case["model"]
    one_layer = sum(weight.nbytes for weight in model.decoder.layers[0].parameters())
    expected = forward(case, 1)
    on_device = seconds_of(lambda: forward(case, 1))
    keep_on_host(model.decoder.layers, device=platform.device())
    stays = sum(weight.nbytes for weight in model.parameters())
    torch.testing.assert_close(forward(case, 1), expected, rtol=0, atol=0)
    answer: dict[str, Any] = {
        "bytes_of_a_layer": one_layer,
        "bytes_that_stay": stays,
        "seconds": {"on the device": on_device, "on the host": seconds_of(lambda: forward(case, 1))},
    }
    if not platform.has_accelerator():
        return answer, {}
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        hidden = torch.zeros(length, 1, shape.hidden_size, dtype=dtype, device=platform.device())
        model.decoder(hidden_states=hidden, attention_mask=case["input"]["attention_mask"])
    answer["peak_bytes"] = torch.cuda.max_memory_allocated()
    return answer, {
        "peak / (what stays + two layers)": (answer["peak_bytes"] / (stays + 2 * one_layer), "at most", 1.1)
    }


def _at(part: Callable[..., Any], shape: ModelShape, target: dict[str, int]) -> Callable[[bool], Any]:
    return lambda tiny: part(*((TINY, HALF_OF_TINY) if tiny else (shape, target)), tiny)


PARTS = {
    "importance_1b": Part(_at(importance_and_surgery, LLAMA_1B, HALF_OF_1B), 50),
    "importance_8b": Part(_at(importance_and_surgery, LLAMA_8B, A_4B), 80),
    "divergence": Part(divergences, 90),
    "step_1b": Part(_at(distillation_step, LLAMA_1B, HALF_OF_1B), 50),
    "step_8b": Part(_at(distillation_step, LLAMA_8B, A_4B), 90),
    "calibration": Part(calibration, 70),
    "offload": Part(offload, 50),
}

# ---- one part, and all of them ---------------------------------------------------------------------------------------


def measure(name: str, tiny: bool) -> dict[str, Any]:
    """The part's answer, or how it failed."""
    began = time.monotonic()
    result: dict[str, Any] = {"part": name, "tiny": tiny} | surroundings()
    try:
        answer, limits = PARTS[name].run(tiny)
    except Exception as error:  # out of memory, too: the other parts go on
        traceback.print_exc()
        return result | {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    result |= {"seconds": round(time.monotonic() - began, 1), "answer": answer}
    if tiny:
        return result
    return result | {"limits": {what: judged(*limit) for what, limit in limits.items()}}


def judged(value: float, relation: str, limit: float) -> dict[str, Any]:
    held = value <= limit if relation == "at most" else value >= limit
    return {"measured": round(value, 4), relation: limit, "held": held}


def surroundings() -> dict[str, Any]:
    return {
        "command": "python benchmarks/gpu_check.py",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if platform.has_accelerator() else machine.processor() or "CPU",
        "versions": {"python": sys.version.split()[0]}
        | {name: version_of(name) for name in ("torch", "triton", "megatron-core", "transformers", "nemo-toolkit")}
        | {name: version_of(name) for name in ("nvidia-modelopt", "liger-kernel")},
        "triton_kernels": os.environ.get("MINITRON_TRITON") == "1",
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def in_own_process(name: str, folder: Path) -> dict[str, Any]:
    """A part that hangs or takes the process with it ends alone."""
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    (folder / f"{name}.json").unlink(missing_ok=True)
    try:
        status = subprocess.run(command, timeout=PARTS[name].seconds).returncode
        why = f"its process ended with status {status}"
    except subprocess.TimeoutExpired:
        why = f"it took longer than its {PARTS[name].seconds} seconds"
    if (folder / f"{name}.json").is_file():
        done: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        return done
    return keep(folder, {"part": name, "tiny": False, "failed": why})


def keep(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['part']}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", choices=PARTS, help="this one, in this process")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("No accelerator here. make gpu-check-tiny runs the same with small shapes on a CPU.", file=sys.stderr)
        return 1
    folder = options.folder or (Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.tiny else FOLDER)
    if options.tiny or options.part:
        start_alone()
    results = []
    for name in [options.part] if options.part else options.only:
        in_this = options.tiny or options.part
        result = keep(folder, measure(name, options.tiny)) if in_this else in_own_process(name, folder)
        results.append(result)
        if not options.part:
            print(f"{name:16}{result.get('failed') or json.dumps(result.get('limits', 'ran; no limit claimed'))}")
    print(f"written to {folder}")
    missed = [limit for result in results for limit in result.get("limits", {}).values() if not limit["held"]]
    return 1 if missed or any("failed" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
