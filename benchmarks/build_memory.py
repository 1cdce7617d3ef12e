"""What memory does building a teacher and its student take, and what does keeping the teacher on the host save?

    built      both models as a distillation builds them (`DistillationGPTModel.build`), weights read from artifacts
    offloaded  the same with the teacher's layers kept in host memory (on a CPU that is the same memory)
    passed     and two forward passes of the teacher

Each in a process of its own. On a CPU memory is the process's peak resident set, less what it was after imports and
the same of tiny models; on a device it is torch's peak there. The answer leads with the peak over the bytes of both
models in the dtypes of their forward passes; the command fails where building takes more than 1.15. On a device the
offloaded teacher's layers do not count, but for two. `--tiny` has shapes for a test of the command
itself, and no limit; `--save` keeps the result in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

LIMIT = 1.15
CASES = {"built": False, "offloaded": True}
DTYPES = ("bf16", "fp32")


def shapes(tiny: bool) -> tuple[Any, Any]:
    """Teacher and student: a Llama of 160 million parameters with 16 layers, and a pruned one of 70 million."""
    from minitron_nemo.shape import ModelShape

    teacher = ModelShape(
        family="llama",
        num_layers=4 if tiny else 16,
        hidden_size=64 if tiny else 768,
        ffn_hidden_size=160 if tiny else 3072,
        num_attention_heads=8 if tiny else 12,
        num_query_groups=2 if tiny else 4,
        kv_channels=8 if tiny else 64,
        padded_vocab_size=512 if tiny else 16000,
        seq_length=128,
        init_method_std=0.02,
    )
    narrower = {"hidden_size": 48, "ffn_hidden_size": 96} if tiny else {"hidden_size": 512, "ffn_hidden_size": 1536}
    return teacher, replace(teacher, **narrower)


def write_models(directory: Path, tiny: bool) -> None:
    """Weights in bf16, as published models have them."""
    import torch

    from minitron_nemo import engine
    from minitron_nemo.config.trainer import Layout
    from minitron_nemo.runtime.distributed_checkpoint import save_weights
    from minitron_nemo.runtime.layout import prepare_layout

    for name, shape in zip(("teacher", "student"), shapes(tiny), strict=True):
        prepare_layout(Layout(), shape)
        save_weights(engine.new_core(shape, Layout(), torch.bfloat16), directory / name)


def build(directory: Path, tiny: bool, *, offload: bool, dtype: Any) -> Any:
    import torch

    from minitron_nemo.config.distillation import DistillationConfig
    from minitron_nemo.config.trainer import Layout
    from minitron_nemo.distillation.teacher import TeacherAtHand
    from minitron_nemo.nemo.distillation import DistillationGPTModel
    from minitron_nemo.runtime.layout import prepare_layout

    teacher, student = shapes(tiny)
    prepare_layout(Layout(), student)
    model = DistillationGPTModel(
        student,
        TeacherAtHand(teacher, directory / "teacher", offload),
        DistillationConfig(),
        student_weights=directory / "student",
        vocab_size=student.padded_vocab_size,
        # what NeMo's strategy and precision set before they have a model built
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    model.configure_model()
    return model


def measure(directory: Path, tiny: bool, offload: bool, precision: str) -> dict[str, float]:
    """In this process: bytes after imports and tiny models, of both models, and the peaks."""
    import torch

    from minitron_nemo import platform
    from minitron_nemo.platform.memory import peak_bytes, reset_peak

    platform.activate()
    dtype = platform.dtype_of(precision)
    with tempfile.TemporaryDirectory() as small:
        write_models(Path(small), tiny=True)
        built = build(Path(small), True, offload=offload, dtype=dtype)
        forward(built, dtype)
    del built
    reset_peak()
    before = peak_bytes()
    model = build(directory, tiny, offload=offload, dtype=dtype)
    both = sum(shape.num_parameters for shape in shapes(tiny)) * dtype.itemsize
    found = {"bytes": both, "built": peak_bytes() - before}
    with torch.no_grad():
        forward(model, dtype)
    return found | {"passed": peak_bytes() - before}


def forward(model: Any, dtype: Any) -> None:
    import torch

    from minitron_nemo import platform

    teacher = model.module.teacher
    tokens = torch.arange(8, device=platform.device())[None]
    with torch.no_grad():
        for _ in range(2):
            teacher.run((tokens, tokens, None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="shapes for a test of this command")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/build_memory.json")
    parser.add_argument("--in-this-process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        directory, case, precision = options.in_this_process
        if case == "write":
            from minitron_nemo import platform

            platform.activate()
            write_models(Path(directory), options.tiny)
        else:
            print(json.dumps(measure(Path(directory), options.tiny, CASES[case], precision)))
        return 0
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as directory:
        alone(directory, "write", "bf16", options.tiny)
        for precision in DTYPES:
            for case in CASES:
                found = json.loads(alone(directory, case, precision, options.tiny).splitlines()[-1])
                ratios = {name: round(found[name] / found["bytes"], 3) for name in ("built", "passed")}
                worst = max(worst, ratios["built"])
                times = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
                print(f"{precision} {case:9}  {times} of the models' {found['bytes'] / 1e6:,.0f} MB", flush=True)
                rows.append(
                    {"precision": precision, "teacher": case, "bytes": found["bytes"], "peak_over_bytes": ratios}
                )
    if options.save:
        save(rows)
    if worst > LIMIT and not options.tiny:
        print(f"Building takes {worst:.2f}x of what the models are, more than {LIMIT}x.")
        return 1
    return 0


def alone(directory: str, case: str, precision: str, tiny: bool) -> str:
    """What a process of its own prints."""
    command = [sys.executable, __file__, "--in-this-process", directory, case, precision, *["--tiny"] * tiny]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def save(rows: list[dict[str, Any]]) -> None:
    import torch

    result = {
        "command": "python benchmarks/build_memory.py --save",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"torch": torch.__version__, "python": machine.python_version()},
        "limit": LIMIT,
        "parameters": [shape.num_parameters for shape in shapes(tiny=False)],
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "build_memory.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
