"""`launcher=slurm` on a real SLURM: any door is a submission."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from support.door import minitron
from support.slurm import SingleNodeSlurm
from support.tiny import TinyChain, search_command

JOB_MINUTES = 30
INPUTS = {"correct_teacher": "corrected_teacher", "estimate_importance": "importance"}


def submit(directory: Path, door: str, *values: str) -> None:
    done = minitron(door, "launcher=slurm", f"slurm.time={JOB_MINUTES}", *values, cwd=directory)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(4 * JOB_MINUTES * 60)
def test_a_swept_stage_is_a_job_for_each_value(
    slurm_cluster: SingleNodeSlurm, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    values = [value for value in tiny_chain.overrides if not value.startswith(("run_dir=", "prune.target.hidden"))]
    values += [f"{key}.output={tiny_chain.run_dir / name}" for key, name in INPUTS.items()]
    values += ["prune.target.hidden_size=24,16", f"run_dir={tmp_path}/run_${{prune.target.hidden_size}}"]
    submit(tmp_path, "prune", *values, "--multirun")
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


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(4 * JOB_MINUTES * 60)
def test_an_array_makes_one_search(slurm_cluster: SingleNodeSlurm, tiny_chain: TinyChain, tmp_path: Path) -> None:
    output, run_dir = tmp_path / "search", tmp_path / "run"
    inputs = {**INPUTS, "import_hf": "teacher", "prepare_data": "data"}
    places = [f"{section}.output={tiny_chain.run_dir / name}" for section, name in inputs.items()]
    submit(tmp_path, *search_command(tiny_chain, output), *places, f"run_dir={run_dir}", "slurm.jobs_of_search=2")
    [job] = json.loads((run_dir / "slurm" / "jobs.json").read_text())
    ended = slurm_cluster.wait_for_jobs([job["job_id"]])
    said = [log.read_text() for log in sorted((run_dir / "slurm").glob("*.log"))]
    assert ended == {job["job_id"]: "COMPLETED"} and len(said) == 2, said
    found = json.loads((output / "search.json").read_text())
    assert found["counts"]["distilled"] == 3 and [each["rung"] for each in found["candidates"][:3]] == [2, 2, 1]
    makers = {lock.read_text().rpartition(", job ")[2] for lock in Path(f"{output}.search").rglob("locks/*")}
    assert makers <= {f"{job['job_id']}_{task}" for task in range(2)} and makers, makers
