"""`launcher=slurm` on a real SLURM: any door is a submission."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from support.slurm import SingleNodeSlurm
from support.tiny import TinyChain

JOB_MINUTES = 30


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(4 * JOB_MINUTES * 60)
def test_a_swept_stage_is_a_job_for_each_value(
    slurm_cluster: SingleNodeSlurm, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    values = [value for value in tiny_chain.overrides if not value.startswith(("run_dir=", "prune.target.hidden"))]
    values += [f"{key}.output={tiny_chain.run_dir / name}" for key, name in INPUTS.items()]
    values += ["prune.target.hidden_size=24,16", f"run_dir={tmp_path}/run_${{prune.target.hidden_size}}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    values += ["launcher=slurm", f"slurm.time={JOB_MINUTES}", f"hydra.sweep.dir={tmp_path}"]
    command = [sys.executable, "-m", "minitron_nemo.cli", "prune", *values, "--multirun"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    jobs = {}
    for size in (24, 16):
        [job] = json.loads((tmp_path / f"run_{size}" / "slurm" / "jobs.json").read_text())
        assert job["name"] == "prune"
        jobs[size] = job["job_id"]
    ended = slurm_cluster.wait_for_jobs(list(jobs.values()))
    assert ended == dict.fromkeys(jobs.values(), "COMPLETED"), [log.read_text() for log in tmp_path.rglob("*.log")]
    for size in jobs:
        student = open_artifact(tmp_path / f"run_{size}" / "student_pruned")
        assert student.manifest["config"]["target"]["hidden_size"] == size


INPUTS = {"correct_teacher": "corrected_teacher", "estimate_importance": "importance"}
