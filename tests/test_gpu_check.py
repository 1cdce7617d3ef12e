"""make gpu-check on a CPU: its parts run, without NeMo, and stand alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_NEMO_AND_WITH_A_FAULT = """
import sys
sys.modules["nemo"] = sys.modules["lightning"] = None  # importing one of them fails
sys.path.insert(0, "benchmarks")
import dataclasses, gpu_check

def out_of_memory(tiny):
    raise MemoryError("no room for 8B")

gpu_check.PARTS["calibration"] = dataclasses.replace(gpu_check.PARTS["calibration"], run=out_of_memory)
gpu_check.PARTS["solves"] = gpu_check.Part(gpu_check.calibration, 1)
sys.argv = ["gpu_check.py", "--tiny", "--folder", sys.argv[1]]
sys.exit(gpu_check.main())
"""


def test_every_part_of_gpu_check_runs_tiny_without_nemo_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NEMO_AND_WITH_A_FAULT, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    results = {file.stem: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert done.returncode == 1 and "no room for 8B" in results.pop("calibration")["failed"], done.stderr
    assert set(results) == {"importance_1b", "importance_8b", "divergence", "step_1b", "step_8b", "offload", "solves"}
    for part, result in results.items():
        assert "failed" not in result, (part, result["failed"])
        assert result["answer"] and result["tiny"] and "limits" not in result, part
        assert {"torch", "triton", "megatron-core", "transformers", "nemo-toolkit"} <= set(result["versions"]), part
    assert results["divergence"]["answer"]["rows"][0]["seconds"]["fused"] > 0
    assert results["step_8b"]["answer"]["kernels"]
    assert results["offload"]["answer"]["bytes_that_stay"] > 0
