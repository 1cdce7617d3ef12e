"""What does the divergence cost from hidden states, chunk by chunk, beside whole logits: how much memory and time?

Forward KL at temperature 1 from both models' last hidden states and output weights to the loss and the gradients of
student hidden and weight, forward and backward, of three contenders on the same inputs:

    fused     `fused_linear_loss`
    naive     both logits, log_softmax, F.kl_div, as in a textbook
    modelopt  both logits, Model-Optimizer's LogitsKLLoss (nvidia-modelopt, modelopt.torch.distill.plugins.megatron)

Each case has a process of its own. Memory comes first, contender after contender, the fused one in a fresh heap: the
highest resident size while it runs, less the inputs and the gradients it returns (on CUDA, the allocator's), beside one
bf16 tensor of logits. Losses and gradients must agree before any clock starts; then contenders run alternately, on a
CPU by the process's CPU time. The loss part, on logits that are there already, is timed by itself: with small hidden
states, as here, it is most of the work on a GPU, and with large ones the matrix products are the same for all. With
TP=2 two processes hold half of the vocabulary each and talk over gloo (on a CPU only); memory is then one rank's,
beside its half of the logits.

Falls short, with exit status 1, where the fused contender needs more than 0.25 of one whole bf16 logits tensor at 128k
x 8k tokens, or where the loss part is less than 3 times as fast as modelopt's on a CPU, 1.5 times end to end on a GPU.
What does not fit into the memory set aside is named and skipped. `--save` keeps the answer in benchmarks/results/,
`--only` measures some of the rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform as machine
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
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


def setup(vocab: int, tokens: int, dtype: str, tp_group: Any = None) -> dict[str, Any]:
    """Inputs of this rank: hidden states and weights of the tokens are every rank's, of the vocabulary its part."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks, rank = (dist.get_world_size(tp_group), dist.get_rank(tp_group)) if tp_group else (1, 0)
    shared, own = (torch.Generator(device).manual_seed(seed) for seed in (0, 1 + rank))

    def normal(*shape: int, scale: float = 1.0, of: torch.Generator = shared) -> torch.Tensor:
        values = torch.empty(*shape, dtype=getattr(torch, dtype), device=device)
        return values.normal_(0, scale, generator=of)

    return {
        "student": [
            normal(tokens, 1, H_STUDENT).requires_grad_(),
            normal(vocab // ranks, H_STUDENT, scale=0.3, of=own).requires_grad_(),
        ],
        "teacher": [normal(tokens, 1, H_TEACHER), normal(vocab // ranks, H_TEACHER, scale=0.3, of=own)],
        "weights": torch.rand(tokens, 1, generator=shared, device=device) / tokens,
        "tp_group": tp_group,
    }


# ---- the contenders: loss and gradients ------------------------------------------------------------------------------


def fused(case: dict[str, Any]) -> list[Any]:
    import torch

    from minitron_nemo.config.distillation import DivergenceConfig
    from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_loss

    heads = OutputHead(*case["student"]), OutputHead(*case["teacher"])
    loss = fused_linear_loss(*heads, DivergenceConfig(), case["weights"], tp_group=case["tp_group"]).total
    return [loss.detach(), *torch.autograd.grad(loss, case["student"])]


def naive(case: dict[str, Any]) -> list[Any]:
    return of_logits(case, naive_loss)


def modelopt(case: dict[str, Any]) -> list[Any]:
    return of_logits(case, modelopt_loss)


def of_logits(case: dict[str, Any], loss_of: Callable[..., Any]) -> list[Any]:
    import torch
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    tp_group, (hidden, weight) = case["tp_group"], case["student"]
    whole = hidden if tp_group is None else copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    loss = (loss_of(whole @ weight.t(), case["teacher"][0] @ case["teacher"][1].t(), tp_group) * case["weights"]).sum()
    gradients = torch.autograd.grad(loss, case["student"])
    loss = loss.detach()
    if tp_group is not None:  # each rank has the sum over its part of the vocabulary
        torch.distributed.all_reduce(loss, group=tp_group)
    return [loss, *gradients]


def naive_loss(student: Any, teacher: Any, tp_group: None) -> Any:
    """[s, b] from logits [s, b, v]. Of a vocabulary in one piece: a textbook knows no ranks."""
    import torch.nn.functional as F

    log_p_student, log_p_teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)


def modelopt_loss(student: Any, teacher: Any, tp_group: Any) -> Any:
    """[s, b] from logits [s, b, v/tp]; with ranks its part of the sum."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    ranks = 1 if tp_group is None else tp_group.size()
    config = SimpleNamespace(tensor_model_parallel_size=ranks, sequence_parallel=False)
    per_token, _, _ = LogitsKLLoss(config)(student, teacher)
    return per_token.transpose(0, 1)


def own_loss_part(student: Any, teacher: Any, weights: Any, tp_group: Any) -> Any:
    """The gradient of the weighted sum with respect to logits, as the fused contender forms it in a chunk."""
    from minitron_nemo.config.distillation import DivergenceConfig
    from minitron_nemo.divergence.streamed import row_losses
    from minitron_nemo.divergence.token_rows import Rows
    from minitron_nemo.divergence.vocabulary import Vocabulary

    rows, vocab = student.detach().flatten(0, 1), student.shape[-1]
    out = rows.new_empty(rows.shape)
    vocabulary = Vocabulary.split(vocab, None, tp_group)
    row_losses(Rows(rows, teacher.flatten(0, 1), None, weights.t(), out), DivergenceConfig(), vocabulary)
    return out.view_as(student)


def modelopt_loss_part(student: Any, teacher: Any, weights: Any, tp_group: Any) -> Any:
    import torch

    return torch.autograd.grad((modelopt_loss(student, teacher, tp_group) * weights).sum(), student)[0]


# ---- memory and time, in a process of its own for each case ----------------------------------------------------------


def measured(vocab: int, tokens: int, dtype: str, contenders: list[str], tp_group: Any) -> dict[str, Any]:
    """Extra bytes of each contender, the fused one first, and how many times as fast that one is as the others."""
    for contender in contenders:
        globals()[contender](setup(64, 32, dtype, tp_group))  # what libraries allocate once
    case = setup(vocab, tokens, dtype, tp_group)
    row, ours = {}, None
    for contender in contenders:
        row[f"extra_memory_{contender}"], results = extra_memory(globals()[contender], case)
        ours = ours or results
        for own, other in zip(ours, results, strict=True):
            difference = (own.float() - other.float()).norm() / other.float().norm()
            tolerance = 1e-4 if dtype == "float32" else 2e-2
            assert difference < tolerance, f"{contender} differs by {difference:.1e} at {vocab} x {tokens} {dtype}"
    del ours, results
    return row | times_over_fused(case, contenders[1:])


def extra_memory(run: Callable[..., Any], case: dict[str, Any]) -> tuple[int, list[Any]]:
    """Bytes beyond inputs and returned gradients at the highest; and what it returned."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run(case)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from the present one
        before = resident("VmRSS")
        results = run(case)
        peak = resident("VmHWM")
    return peak - before - sum(gradient.numel() * gradient.element_size() for gradient in results[1:]), results


def resident(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_own_process(*arguments: str, ranks: int = 1) -> dict[str, Any]:
    """What the first of `ranks` processes answers."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), str(ranks), f"{folder}/store", *arguments],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        answers = [process.communicate()[0] for process in processes]
    for process in processes:
        assert process.returncode == 0, f"{' '.join(arguments)} on {ranks} ranks ended with {process.returncode}"
    return json.loads(answers[0].splitlines()[-1])


def join(rank: str, ranks: str, store: str) -> Any:
    """The tensor-parallel group of these processes; None for a single one."""
    if ranks == "1":
        return None
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(store, int(ranks)), rank=int(rank), world_size=int(ranks))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=int(ranks))
    return parallel_state.get_tensor_model_parallel_group()


def seconds_of(run: Callable[[], Any]) -> float:
    """On a CPU of this process, which others on the machine hardly change; on CUDA by the clock."""
    import torch

    if not torch.cuda.is_available():
        begin = time.process_time()
        run()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratios(ours: Callable[[], Any], theirs: Callable[[], Any]) -> list[float]:
    """20, 50 and 80 percentiles of theirs / ours, over pairs of runs one after the other."""
    pairs = sorted(seconds_of(theirs) / seconds_of(ours) for _ in range(REPEATS))
    return [round(pairs[int(q * (REPEATS - 1))], 2) for q in (0.2, 0.5, 0.8)]


def times_over_fused(case: dict[str, Any], peers: list[str]) -> dict[str, list[float]]:
    found = {
        f"end_to_end_{peer}_over_fused": ratios(lambda: fused(case), lambda peer=peer: globals()[peer](case))
        for peer in peers
    }
    if "modelopt" in peers:
        student = (case["student"][0] @ case["student"][1].t()).detach().requires_grad_()
        logits = student, case["teacher"][0] @ case["teacher"][1].t(), case["weights"], case["tp_group"]
        found["loss_part_modelopt_over_fused"] = ratios(
            lambda: own_loss_part(*logits), lambda: modelopt_loss_part(*logits)
        )
    return found


# ---- the table -------------------------------------------------------------------------------------------------------

CASES = [  # vocabulary, tokens, tensor-parallel ranks: what all can do in little memory, and what the fused one can
    (32768, 2048, 1),
    (32768, 16384, 1),
    (131072, 1024, 1),
    (131072, 8192, 1),
    (262144, 512, 1),
    (262144, 4096, 1),
    (32768, 2048, 2),
    (131072, 8192, 2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--only", default="", metavar="PART", help="of a row's name, such as 'tp=2 float32'")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        vocab, tokens, dtype, *contenders = options.case
        print(json.dumps(measured(int(vocab), int(tokens), dtype, contenders, join(*options.rank))))
        return 0

    if options.save and options.only:
        parser.error("--save keeps every row; leave out --only.")

    import torch

    on_gpu = torch.cuda.is_available()
    rows = []
    for vocab, tokens, ranks in CASES:
        for dtype in ("float32", "bfloat16"):
            row = {"vocab": vocab, "tokens": tokens, "tp": ranks, "dtype": dtype}
            if (ranks == 1 or not on_gpu) and options.only in case_of(row):
                rows.append(row | measure(vocab, tokens, ranks, dtype))
                show(rows[-1])
    if options.save:
        save(rows, on_gpu)
    misses = shortfalls(rows, on_gpu)
    print("\n".join(misses) if misses else "No limit is missed.")
    return 1 if misses else 0


def measure(vocab: int, tokens: int, ranks: int, dtype: str) -> dict[str, Any]:
    import torch

    budget = 0.8 * torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else CPU_BUDGET
    logits = 2 * vocab * tokens  # bytes in bf16, of all ranks
    installed = [c for c in CONTENDERS if c != "modelopt" or importlib.util.find_spec("modelopt") is not None]
    able = [c for c in installed if c != "naive" or ranks == 1]
    fitting = [c for c in able if 2 * logits * LOGITS_TENSORS[c] < budget]
    found = in_own_process("--case", str(vocab), str(tokens), dtype, *fitting, ranks=ranks)
    for contender in fitting:
        found[f"extra_memory_{contender}"] = round(found[f"extra_memory_{contender}"] * ranks / logits, 3)
    return found | {"does_not_fit": [c for c in able if c not in fitting]}


def save(rows: list[dict[str, Any]], on_gpu: bool) -> None:
    import torch

    result = {
        "command": "python benchmarks/divergence.py --save",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else machine.processor() or machine.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "nvidia-modelopt": version("nvidia-modelopt") if importlib.util.find_spec("modelopt") else None,
        },
        "hidden_size": {"student": H_STUDENT, "teacher": H_TEACHER},
        "extra_memory": "highest, beyond inputs and returned gradients, in bf16 logits tensors of vocab/tp x tokens",
        "ratios": "20, 50 and 80 percentiles of paired runs, "
        + ("by the clock" if on_gpu else "CPU time of a process"),
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "divergence.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def show(row: dict[str, Any]) -> None:
    memory = "  ".join(f"{c} {row[f'extra_memory_{c}']:.2f}x" for c in CONTENDERS if f"extra_memory_{c}" in row)
    times = "  ".join(
        f"{name.removesuffix('_over_fused').replace('_', ' ')} {middle:.2f}x [{low:.2f}, {high:.2f}]"
        for name, (low, middle, high) in ((n, v) for n, v in row.items() if n.endswith("_over_fused"))
    )
    case = case_of(row)
    print(f"{case:40}memory {memory}" + (f"   time over fused: {times}" if times else ""), flush=True)
    if row["does_not_fit"]:
        print(f"{'':40}skipped, does not fit: {', '.join(row['does_not_fit'])}", flush=True)


def case_of(row: dict[str, Any]) -> str:
    return f"v={row['vocab']} tokens={row['tokens']} tp={row['tp']} {row['dtype']}"


def shortfalls(rows: list[dict[str, Any]], on_gpu: bool) -> list[str]:
    misses = []
    name, limit = (
        ("end_to_end_modelopt_over_fused", END_TO_END_LIMIT)
        if on_gpu
        else ("loss_part_modelopt_over_fused", LOSS_PART_LIMIT)
    )
    for row in rows:
        case = case_of(row)
        of_whole = row["extra_memory_fused"] / row["tp"]
        if (row["vocab"], row["tokens"]) == MEMORY_CASE and of_whole > MEMORY_LIMIT:
            misses.append(f"{case}: extra memory {of_whole:.3f}x is above {MEMORY_LIMIT}x.")
        if name in row and row[name][1] < limit:
            misses.append(f"{case}: {name} is {row[name][1]}x, below {limit}x.")
    return misses


if __name__ == "__main__":
    sys.exit(main())
