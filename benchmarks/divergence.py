"""What does the divergence cost from hidden states, chunk by chunk, beside whole logits: how much memory and time?

Forward KL at temperature 1 from both models' last hidden states and output weights to the loss and the gradients of
student hidden and weight, forward and backward, of three contenders on the same inputs:

    fused     `fused_linear_loss`
    naive     both logits, log_softmax, F.kl_div, as in a textbook
    modelopt  both logits, Model-Optimizer's LogitsKLLoss (nvidia-modelopt, modelopt.torch.distill.plugins.megatron)

Losses and gradients must agree before any clock starts. Contenders run alternately in one process. Memory is that of a
process of its own for each: the highest resident size while it runs, less the inputs and the gradients it returns (on
CUDA, the allocator's), beside one bf16 tensor of logits. The loss part, on logits that are there already, is timed by
itself: with small hidden states, as here, it is most of the work on a GPU, and with large ones the matrix products are
the same for all.

Falls short, with exit status 1, where the fused contender needs more than 0.25 of one bf16 logits tensor at 128k x 8k
tokens, or where the loss part is less than 3 times as fast as modelopt's on a CPU, 1.5 times end to end on a GPU. What
does not fit into the memory set aside is named and skipped. The answer is kept in benchmarks/results/divergence.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 2**30
H_STUDENT, H_TEACHER = 64, 96
"""Small: a CPU would spend minutes in the matrix products, which are the same for all."""
MEMORY_CASE = (131072, 8192)
MEMORY_LIMIT = 0.25
LOSS_PART_LIMIT = 3.0  # on a CPU
END_TO_END_LIMIT = 1.5  # on a GPU
CPU_BUDGET = 7 * GIB
CONTENDERS = ("fused", "naive", "modelopt")
LOGITS_TENSORS = {"fused": 0.25, "naive": 8, "modelopt": 9}
"""About how many logits tensors, in float32, a contender needs; what fits is decided by it."""
REPEATS = 5


def setup(vocab: int, tokens: int, dtype: str) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.empty(*shape, dtype=getattr(torch, dtype), device=device)
        return values.normal_(0, scale, generator=g)

    return {
        "student": [
            normal(tokens, 1, H_STUDENT).requires_grad_(),
            normal(vocab, H_STUDENT, scale=0.3).requires_grad_(),
        ],
        "teacher": [normal(tokens, 1, H_TEACHER), normal(vocab, H_TEACHER, scale=0.3)],
        "weights": torch.rand(tokens, 1, generator=g, device=device) / tokens,
    }


# ---- the contenders: loss and gradients ------------------------------------------------------------------------------


def fused(case: dict[str, Any]) -> list[Any]:
    import torch

    from minitron_nemo.distillation.divergence import DivergenceConfig
    from minitron_nemo.distillation.fused_linear import OutputHead, fused_linear_loss

    heads = OutputHead(*case["student"]), OutputHead(*case["teacher"])
    loss = fused_linear_loss(*heads, DivergenceConfig(), case["weights"], tp_group=None).total
    return [loss.detach(), *torch.autograd.grad(loss, case["student"])]


def naive(case: dict[str, Any]) -> list[Any]:
    return of_logits(case, naive_loss)


def modelopt(case: dict[str, Any]) -> list[Any]:
    return of_logits(case, modelopt_loss)


def of_logits(case: dict[str, Any], loss_of: Callable[..., Any]) -> list[Any]:
    import torch

    student, teacher = case["student"][0] @ case["student"][1].t(), case["teacher"][0] @ case["teacher"][1].t()
    loss = (loss_of(student, teacher) * case["weights"]).sum()
    return [loss.detach(), *torch.autograd.grad(loss, case["student"])]


def naive_loss(student: Any, teacher: Any) -> Any:
    """[s, b] from logits [s, b, v]."""
    import torch.nn.functional as F

    log_p_student, log_p_teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)


def modelopt_loss(student: Any, teacher: Any) -> Any:
    """[s, b] from logits [s, b, v]."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    per_token, _, _ = LogitsKLLoss(config)(student, teacher)
    return per_token.transpose(0, 1)


def own_loss_part(student: Any, teacher: Any, weights: Any) -> Any:
    """The gradient of the weighted sum with respect to logits, as the fused contender forms it in a chunk."""
    from minitron_nemo.distillation.divergence import DivergenceConfig, row_losses
    from minitron_nemo.distillation.kinds import Vocabulary

    rows, vocab = student.detach().flatten(0, 1), student.shape[-1]
    out = rows.new_empty(rows.shape)
    vocabulary = Vocabulary.split(vocab, None, None)
    row_losses(rows, teacher.flatten(0, 1), None, DivergenceConfig(), vocabulary, weights=weights.t(), out=out)
    return out.view_as(student)


def modelopt_loss_part(student: Any, teacher: Any, weights: Any) -> Any:
    import torch

    return torch.autograd.grad((modelopt_loss(student, teacher) * weights).sum(), student)[0]


# ---- memory, in a process of its own ---------------------------------------------------------------------------------


def extra_memory(contender: str, vocab: int, tokens: int, dtype: str) -> dict[str, Any]:
    """Bytes beyond inputs and returned gradients at the highest, and the seconds of that one run."""
    import resource

    import torch

    run = globals()[contender]
    run(setup(64, 32, dtype))  # what libraries allocate once
    case = setup(vocab, tokens, dtype)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = pages * os.sysconf("SC_PAGE_SIZE")
    begin = time.perf_counter()
    gradients = run(case)[1:]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - begin
    returned = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return {"bytes": peak - before - returned, "seconds": seconds}


def in_own_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- time, alternately in one process --------------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratios(ours: Callable[[], Any], theirs: Callable[[], Any]) -> list[float]:
    """20, 50 and 80 percentiles of theirs / ours, over pairs of runs one after the other."""
    pairs = sorted(seconds_of(theirs) / seconds_of(ours) for _ in range(REPEATS))
    return [round(pairs[int(q * (REPEATS - 1))], 2) for q in (0.2, 0.5, 0.8)]


def compare(vocab: int, tokens: int, dtype: str, peers: list[str]) -> dict[str, Any]:
    """How many times as fast the fused contender is, after the results were found equal."""
    case = setup(vocab, tokens, dtype)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    ours = fused(case)
    for peer in peers:
        for own, other in zip(ours, globals()[peer](case), strict=True):
            difference = (own.float() - other.float()).norm() / other.float().norm()
            assert difference < tolerance, f"{peer} and fused differ by {difference:.1e} at {vocab} x {tokens} {dtype}"
    row: dict[str, Any] = {
        f"end_to_end_{peer}_over_fused": ratios(lambda: fused(case), lambda peer=peer: globals()[peer](case))
        for peer in peers
    }
    if "modelopt" in peers:
        student = (case["student"][0] @ case["student"][1].t()).detach().requires_grad_()
        logits = student, case["teacher"][0] @ case["teacher"][1].t(), case["weights"]
        row["loss_part_modelopt_over_fused"] = ratios(
            lambda: own_loss_part(*logits), lambda: modelopt_loss_part(*logits)
        )
    return row


# ---- the table -------------------------------------------------------------------------------------------------------

CASES = [  # vocabulary, tokens: the first of each vocabulary is for contenders that hold whole logits in small memory
    (32768, 2048),
    (32768, 4096),
    (32768, 16384),
    (131072, 1024),
    (131072, 8192),
    (262144, 512),
    (262144, 4096),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        contender, vocab, tokens, dtype = options.memory
        print(json.dumps(extra_memory(contender, int(vocab), int(tokens), dtype)))
        return 0
    if options.compare:
        vocab, tokens, dtype, *peers = options.compare
        print(json.dumps(compare(int(vocab), int(tokens), dtype, peers)))
        return 0

    import importlib.util

    import torch

    on_gpu = torch.cuda.is_available()
    budget = 0.8 * torch.cuda.get_device_properties(0).total_memory if on_gpu else CPU_BUDGET
    installed = [c for c in CONTENDERS if c != "modelopt" or importlib.util.find_spec("modelopt") is not None]
    rows = []
    for vocab, tokens in CASES:
        for dtype in ("float32", "bfloat16"):
            logits = 2 * vocab * tokens  # bytes in bf16
            fitting = [c for c in installed if 2 * logits * LOGITS_TENSORS[c] < budget]
            row: dict[str, Any] = {"vocab": vocab, "tokens": tokens, "dtype": dtype}
            for contender in fitting:
                used = in_own_process("--memory", contender, str(vocab), str(tokens), dtype)
                row[f"extra_memory_{contender}"] = round(used["bytes"] / logits, 3)
            peers = [c for c in fitting if c != "fused"]
            if peers:
                row |= in_own_process("--compare", str(vocab), str(tokens), dtype, *peers)
            rows.append(row)
            show(row, [c for c in installed if c not in fitting])
    result = {
        "command": "python benchmarks/divergence.py",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else machine.processor() or machine.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "hidden_size": {"student": H_STUDENT, "teacher": H_TEACHER},
        "extra_memory": "highest, beyond inputs and returned gradients, in bf16 logits tensors of vocab x tokens",
        "ratios": "20, 50 and 80 percentiles of paired runs",
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "divergence.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    misses = shortfalls(rows, on_gpu)
    print("\n".join(misses) if misses else "No limit is missed.")
    return 1 if misses else 0


def show(row: dict[str, Any], skipped: list[str]) -> None:
    memory = "  ".join(f"{c} {row[f'extra_memory_{c}']:.2f}x" for c in CONTENDERS if f"extra_memory_{c}" in row)
    times = "  ".join(
        f"{name.removesuffix('_over_fused').replace('_', ' ')} {middle:.2f}x [{low:.2f}, {high:.2f}]"
        for name, (low, middle, high) in ((n, v) for n, v in row.items() if n.endswith("_over_fused"))
    )
    case = f"v={row['vocab']} tokens={row['tokens']} {row['dtype']}"
    print(f"{case:34}memory {memory}" + (f"   time over fused: {times}" if times else ""), flush=True)
    if skipped:
        print(f"{'':34}skipped, does not fit: {', '.join(skipped)}", flush=True)


def shortfalls(rows: list[dict[str, Any]], on_gpu: bool) -> list[str]:
    misses = []
    name, limit = (
        ("end_to_end_modelopt_over_fused", END_TO_END_LIMIT)
        if on_gpu
        else ("loss_part_modelopt_over_fused", LOSS_PART_LIMIT)
    )
    for row in rows:
        case = f"v={row['vocab']} tokens={row['tokens']} {row['dtype']}"
        if (row["vocab"], row["tokens"]) == MEMORY_CASE and row["extra_memory_fused"] > MEMORY_LIMIT:
            misses.append(f"{case}: extra memory {row['extra_memory_fused']}x is above {MEMORY_LIMIT}x.")
        if name in row and row[name][1] < limit:
            misses.append(f"{case}: {name} is {row[name][1]}x, below {limit}x.")
    return misses


if __name__ == "__main__":
    sys.exit(main())
