"""What do import-hf and export-hf need beside copying the same folder: how much longer, and how much memory?

The Llama-shaped model of benchmarks/surgery.py, 1.2 billion parameters in bf16 with a tokenizer: imported from its HF
folder, and exported to one. Copies of the folder, imports and exports alternate, each in a process of its own, with the
source in the page cache and everything written before flushed; seconds are those of the whole stage, manifest and
digests included, after Python's imports; the export without its last look, which loads the model in transformers. Falls
short, with exit status 1, where the median time is over 2x that of the copy, or the peak resident memory of the process
(Python, torch and NeMo included) over twice the largest tensor + 1 GiB.

`python benchmarks/bridge.py` keeps its table in benchmarks/results/bridge.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from surgery import FREE_DISK, GIB, SHAPE, TIME_LIMIT, copy

# Nothing heavy is imported here: a child's peak memory counts that of the process it was started from.

WAYS = ("import", "export")
REPEATS = 3


def make(folder: Path) -> dict[str, Any]:
    """The model at folder/hf, imported at folder/artifact."""
    import surgery

    from minitron_nemo.stages.import_hf import embedded_teacher
    from minitron_nemo.text.tokenizer_files import copy_tokenizer

    made = surgery.make(folder)
    copy_tokenizer(embedded_teacher(), folder / "hf")
    shutil.rmtree(folder / "artifact")
    run("import", folder, folder / "artifact")
    return made


def run(way: str, folder: Path, output: Path) -> None:
    from minitron_nemo.config.stages import ExportHfConfig, ImportHfConfig
    from minitron_nemo.stages import export_hf, import_hf

    if way == "import":
        import_hf.run(ImportHfConfig(model=str(folder / "hf"), output=str(output)))
    else:
        export_hf.run(ExportHfConfig(model=str(folder / "artifact"), verify=False, output=str(output)))


def run_one(what: str, folder: Path) -> dict[str, Any]:
    """Seconds, and this process's peak memory in bytes."""
    # the copy's process too: how fast pages are written depends on how long ago others were given back to the machine
    import transformers.tokenization_utils_fast  # noqa: F401

    import minitron_nemo.nemo.implementation
    import minitron_nemo.stages.export_hf
    import minitron_nemo.stages.import_hf  # noqa: F401

    output = folder / "output"
    begin = time.perf_counter()
    if what == "copy":
        copy(folder / "hf", output)
    else:
        run(what, folder, output)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_own_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in ("copy", *WAYS)}
    for repeat in range(REPEATS + 1):
        for what, results in runs.items():
            shutil.rmtree(folder / "output", ignore_errors=True)
            os.sync()
            result = in_own_process("--run", what, "--folder", str(folder))
            if repeat > 0:  # the first round brings the source into the page cache
                results.append(result)
    return runs


def row(way: str, runs: dict[str, list[dict[str, Any]]], limit: int) -> dict[str, Any]:
    ratios = sorted(ours["seconds"] / copied["seconds"] for ours, copied in zip(runs[way], runs["copy"], strict=True))
    low, middle, high = (round(ratios[int(q * (len(ratios) - 1))], 2) for q in (0.2, 0.5, 0.8))
    peak = max(each["peak_bytes"] for each in runs[way])
    passes = middle <= TIME_LIMIT and peak <= limit
    print(
        f"{way:7} time {middle:.2f}x [{low:.2f}, {high:.2f}] of copying (limit {TIME_LIMIT:.0f}x)   "
        f"peak {peak / GIB:.2f} GiB (limit {limit / GIB:.2f})   {'ok' if passes else 'FALLS SHORT'}"
    )
    return {
        "way": way,
        "time_ratio_20_50_80": [low, middle, high],
        "copy_median_seconds": round(statistics.median(each["seconds"] for each in runs["copy"]), 2),
        "peak_bytes": peak,
        "peak_limit_bytes": limit,
        "passes": passes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tmp", help="where the models are made and removed; default: the system's")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make or options.run:
        print(json.dumps(make(options.folder) if options.make else run_one(options.run, options.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.tmp, prefix="bridge-") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < FREE_DISK:
            print(f"{folder} needs {FREE_DISK / GIB:.0f} GiB free. Name a larger disk with --tmp.")
            return 1
        model = in_own_process("--make", "--folder", name)
        runs = measure(folder)
        rows = [row(way, runs, 2 * model["largest_tensor_bytes"] + GIB) for way in WAYS]
    result = {
        "command": "python benchmarks/bridge.py",
        "date": date.today().isoformat(),
        "device": machine.processor() or machine.machine(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "shape": SHAPE,
        **model,
        "rows": rows,
    }
    (Path(__file__).parent / "results" / "bridge.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(each["passes"] for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
