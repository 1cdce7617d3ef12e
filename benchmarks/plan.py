"""Is the memory that `minitron plan` reckons what a step of training takes?

Three runs of two steps each, a process of its own: next-token cross-entropy, a distillation, and that with all layers
recomputed; models with random weights, bf16 on an accelerator and fp32 on a CPU. Reckoned is what the tensors of one
rank take at the fullest moment; measured is

    on an accelerator    what torch had allocated at most within the steps (max_memory_allocated)
    on a CPU             by how much the process grew from before the models until within the steps (VmHWM, which is set
                         back at the first), with an allocator that gives back what is freed (MALLOC_MMAP_THRESHOLD_);
                         what the same run of a model of next to no size takes beyond what is reckoned for it, code
                         and buffers of libraries, is taken off

`--save` keeps the answer in benchmarks/results/. Exits 1 where one is off by more than 10%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.recipe import OWN_STEPS, stage_module
from minitron_nemo.shape import ModelShape
from stages import Stages, begin

SEQ_LENGTH, MICRO_BATCH, STEPS, OFF_BY = 512, 4, 2, 0.1
TEACHER = ModelShape(
    family="llama",
    num_layers=12,
    hidden_size=640,
    ffn_hidden_size=1792,
    num_attention_heads=10,
    num_query_groups=5,
    kv_channels=64,
    padded_vocab_size=4096,
    seq_length=SEQ_LENGTH,
)
MODELS = {
    "teacher": TEACHER,
    "student": TEACHER.pruned_to(hidden_size=512, ffn_hidden_size=1280),
    "nothing": TEACHER.pruned_to(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=5),
}
CASES = {
    "cross-entropy": ("correct_teacher", "teacher", "teacher", []),
    "distilled": ("distill", "teacher", "student", []),
    "distilled, all recomputed": ("distill", "teacher", "student", ["trainer.recompute_granularity=full"]),
}
"""Step, model that is corrected or teaches, student, overrides."""
RETURNS_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def stages_of(run_dir: Path) -> Stages:
    shared = ["import_hf.model=embedded", f"trainer.seq_length={SEQ_LENGTH}", f"trainer.micro_batch_size={MICRO_BATCH}"]
    shared += [f"trainer.global_batch_size={MICRO_BATCH}", "trainer.tensorboard=false"]
    for section in ("correct_teacher", "distill", "pretrain"):
        training = f"{section}.training"
        shared += [f"{training}.steps={STEPS}", f"{training}.optim.warmup_steps=0", f"{training}.validation_every=0"]
    return Stages(run_dir, shared, precision="bf16" if torch.cuda.is_available() else "fp32")


def overrides_of(case: str, *, nothing: bool, run_dir: Path) -> tuple[str, list[str]]:
    section, teacher, student, extra = CASES[case]
    teacher, student = ("nothing", "nothing") if nothing else (teacher, student)
    models = {"model": teacher} if section == "correct_teacher" else {"teacher": teacher, "student": student}
    return section, [*(f"{section}.{key}={run_dir}/random_{name}" for key, name in models.items()), *extra]


# ---- in a process of its own ---------------------------------------------------------------------------------------


def measure(case: str, nothing: bool, run_dir: Path, output: Path) -> int:
    """Bytes, at most, within the steps, beyond what was there before the models."""
    from minitron_nemo.nemo import survival, trainer

    stages = stages_of(run_dir)
    section, overrides = overrides_of(case, nothing=nothing, run_dir=run_dir)
    stage_module(OWN_STEPS[section].stage)  # imported before the first look
    before, found = _resident(), 0

    class Watching(survival.StopWhenAsked):
        def on_train_start(self, *given: Any) -> None:
            super().on_train_start(*given)
            _forget_peak()

        def on_train_batch_end(self, *given: Any, **named: Any) -> None:
            nonlocal found
            found = max(found, _peak())
            super().on_train_batch_end(*given, **named)

    trainer.StopWhenAsked = Watching  # a callback of every training, which has no door for one more
    stages.stage(section, *overrides, output=str(output))
    return found - (0 if torch.cuda.is_available() else before)


def _status(key: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


# ---- what is reckoned, and the comparison --------------------------------------------------------------------------


def reckoned(case: str, run_dir: Path, *, nothing: bool = False) -> dict[str, int]:
    """Bytes by what they are for; one rank, and no transformer-engine where there is none."""
    from dataclasses import replace

    from minitron_nemo import platform
    from minitron_nemo.config.plan import PlanConfig
    from minitron_nemo.config.slurm import SlurmConfig
    from minitron_nemo.recipe import compose, config_of
    from minitron_nemo.sizing.machine import Machine
    from minitron_nemo.sizing.memory import memory_of
    from minitron_nemo.sizing.shapes import Shapes
    from minitron_nemo.sizing.steps import planned

    section, overrides = overrides_of(case, nothing=nothing, run_dir=run_dir)
    config, steps = compose([*stages_of(run_dir).shared, *overrides])
    plan = PlanConfig()
    job = planned(steps[section], config_of(steps[section], config), Shapes(), plan).job
    assert job is not None
    on_device = torch.cuda.is_available()
    machine = replace(
        Machine.of(plan, SlurmConfig()),
        ranks=1,
        ranks_per_node=1,
        fused=on_device and platform.has_transformer_engine(),
        distributed_optimizer=platform.supports_distributed_optimizer(),
    )
    return memory_of(job, machine).pieces


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--nothing", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    begin()
    if given.case:
        output = given.run_dir / f"made_{os.getpid()}"
        print(json.dumps(measure(given.case, given.nothing, given.run_dir, output)))
        return 0
    with tempfile.TemporaryDirectory() as own:
        run_dir = (given.run_dir or Path(own)).resolve()
        stages = stages_of(run_dir)
        for section in ("import_hf", "prepare_data"):
            stages.stage(section)
        for name, shape in MODELS.items():
            dims = ",".join(f"{dim}:{json.dumps(value)}" for dim, value in shape.to_dict().items() if value is not None)
            stages.stage("pretrain", f"+pretrain.shape={{{dims}}}", output=f"random_{name}")
        answers, off = {}, []
        print(f"{'':28}{'reckoned':>10}{'measured':>10}{'ratio':>8}   MB, by what they are for")
        for case in CASES:
            pieces = reckoned(case, run_dir)
            took, beside = _in_own_process(case, False, run_dir), 0
            if not torch.cuda.is_available():
                beside = _in_own_process(case, True, run_dir) - sum(reckoned(case, run_dir, nothing=True).values())
                took -= beside
            ratio = took / sum(pieces.values())
            answers[case] = {"reckoned": pieces, "measured": took, "beside": beside, "ratio": round(ratio, 3)}
            parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in pieces.items() if size)
            print(f"{case:28}{sum(pieces.values()) / 1e6:10.0f}{took / 1e6:10.0f}{ratio:8.2f}   {parts}", flush=True)
            if abs(ratio - 1) > OFF_BY:
                off.append(f"{case} took {ratio:.2f} of what is reckoned")
    if given.save:
        result = {"date": date.today().isoformat(), "torch": torch.__version__, "cases": answers}
        path = Path(__file__).parent / "results" / ("plan_gpu.json" if torch.cuda.is_available() else "plan.json")
        path.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(off) or f"all within {OFF_BY:.0%}")
    return 1 if off else 0


def _in_own_process(case: str, nothing: bool, run_dir: Path) -> int:
    command = [sys.executable, __file__, "--case", case, "--run-dir", str(run_dir), *(["--nothing"] if nothing else [])]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | RETURNS_WHAT_IS_FREED, check=True
    )
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
