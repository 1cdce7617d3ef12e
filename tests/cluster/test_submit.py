"""A chain on a real SLURM: the jobs run one after the other, on ranks that have met, and stop where one fails."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from minitron_nemo.cluster import StageJob, render_chain, submit_chain
from minitron_nemo.cluster.submit import require_image, run
from minitron_nemo.config.slurm import SlurmConfig
from support.door import Door
from support.slurm import ENDED, SingleNodeSlurm

# What torchrun runs in these tests in the place of minitron_nemo.cli: every rank adds 1 to a sum over all ranks.
TOY_STAGE = """
import json, os, sys, time
import torch
import torch.distributed as dist

stage, *overrides = sys.argv[1:]
started = time.time()
dist.init_process_group("gloo")
ranks = torch.ones(1)
dist.all_reduce(ranks)
if "fail=true" in overrides and dist.get_rank() == 1:
    raise SystemExit("this stage was told to fail")
task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
if "long=true" in overrides and "SLURM_RESTART_COUNT" not in os.environ and task != "0":
    open(os.path.join(os.environ["MINITRON_RUN_DIR"], "waiting"), "w").close()
    while not os.path.exists(os.environ["MINITRON_STOP_FILE"]):
        time.sleep(0.1)
    raise SystemExit(75)
dist.barrier()
if dist.get_rank() == 0:
    report = {"stage": stage, "overrides": overrides, "ranks": int(ranks), "started": started, "ended": time.time(),
              "restarts": os.environ.get("SLURM_RESTART_COUNT"),
              "environment": [os.environ["MINITRON_STAGE"], os.environ["MINITRON_RUN_DIR"]]}
    with open(os.path.join(os.environ["MINITRON_RUN_DIR"], stage + task + ".json"), "w") as file:
        json.dump(report, file)
dist.destroy_process_group()
"""


@pytest.fixture
def toy_slurm(tmp_path: Path) -> SlurmConfig:
    """A SLURM config whose jobs find the module `toy_stage`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "toy_stage.py").write_text(TOY_STAGE)
    return SlurmConfig(
        processes_per_node=2,
        cpus_per_task=2,
        time="60",  # two ranks import torch in about 5 s; the rest is for a busy machine
        setup=[f"export PYTHONPATH={tmp_path / 'modules'}", "export OMP_NUM_THREADS=1"],
    )


@pytest.mark.slurm
def test_a_chain_runs_in_order_with_every_rank(
    slurm_cluster: SingleNodeSlurm, toy_slurm: SlurmConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "a run"
    awkward = ("recipe=quickstart", """note=it's "two" $words""")
    chain = [StageJob("first", awkward), StageJob("second"), StageJob("third")]
    said: list[str] = []
    jobs = submit_chain(render_chain(run_dir, chain, toy_slurm, module="toy_stage"), say=said.append)
    ids = [job.job_id for job in jobs]

    assert slurm_cluster.wait_for_jobs(ids) == dict.fromkeys(ids, "COMPLETED"), logs(run_dir)

    reports = [json.loads((run_dir / f"{job.stage}.json").read_text()) for job in chain]
    assert [report["ranks"] for report in reports] == [2, 2, 2]
    assert reports[0]["overrides"] == list(awkward)
    assert reports[1]["environment"] == ["second", str(run_dir)]
    assert all(before["ended"] < after["started"] for before, after in pairwise(reports))
    assert [job.after for job in jobs] == [None, *ids[:2]]
    recorded = json.loads((run_dir / "slurm" / "jobs.json").read_text())
    assert [(job["name"], job["job_id"]) for job in recorded] == list(
        zip(["first", "second", "third"], ids, strict=True)
    )
    assert said[1].startswith(f"job {ids[1]}: second, after job {ids[0]} (")


@pytest.mark.slurm
@pytest.mark.parametrize("tasks", [1, 2], ids=["alone", "of an array"])
def test_a_job_whose_time_runs_out_queues_itself_again_and_the_chain_goes_on(
    slurm_cluster: SingleNodeSlurm, toy_slurm: SlurmConfig, tmp_path: Path, tasks: int
) -> None:
    run_dir = tmp_path / "run"
    chain = [StageJob("search", ("long=true",)), StageJob("next")]
    slurm = replace(toy_slurm, jobs_of_search=tasks)
    ids = [job.job_id for job in submit_chain(render_chain(run_dir, chain, slurm, module="toy_stage"))]
    while not (run_dir / "waiting").exists():
        assert slurm_cluster.states(ids).get(ids[0]) not in ENDED, logs(run_dir)
        time.sleep(0.2)
    told = str(ids[0]) if tasks == 1 else f"{ids[0]}_{tasks - 1}"
    subprocess.run(["scancel", "--batch", "--signal=USR1", told], check=True)  # as --signal in the script asks
    assert slurm_cluster.wait_for_jobs(ids) == dict.fromkeys(ids, "COMPLETED"), logs(run_dir)
    *first, second = (json.loads(path.read_text()) for path in [*run_dir.glob("search*.json"), run_dir / "next.json"])
    assert [each["restarts"] for each in first].count("1") == 1 and len(first) == tasks, "the others are left alone"
    assert max(each["ended"] for each in first) < second["started"]
    assert not list((run_dir / "slurm").glob("*.stop*"))


@pytest.mark.slurm
def test_a_failing_job_stops_the_rest(slurm_cluster: SingleNodeSlurm, toy_slurm: SlurmConfig, tmp_path: Path) -> None:
    chain = [StageJob("first", ("fail=true",)), StageJob("second"), StageJob("third")]
    jobs = submit_chain(render_chain(tmp_path, chain, toy_slurm, module="toy_stage"))
    states = slurm_cluster.wait_for_jobs([job.job_id for job in jobs])
    assert [states[job.job_id] for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"], logs(tmp_path)
    assert "this stage was told to fail" in logs(tmp_path)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.slurm
def test_a_refused_job_takes_back_the_accepted_ones(
    slurm_cluster: SingleNodeSlurm, toy_slurm: SlurmConfig, tmp_path: Path
) -> None:
    scripts = render_chain(tmp_path, [StageJob("first"), StageJob("second")], toy_slurm, module="toy_stage")
    second = scripts[1].path
    second.write_text(second.read_text().replace("#SBATCH --nodes=1", "#SBATCH --nodes=1\n#SBATCH --partition=nowhere"))
    said: list[str] = []
    with pytest.raises(ChildProcessError, match=r"SLURM refused second: .*invalid partition.*cancelled: \d+\. Correct"):
        submit_chain(scripts, say=said.append)
    (accepted,) = said
    job_id = int(accepted.removeprefix("job ").split(":")[0])
    assert slurm_cluster.wait_for_jobs([job_id]) == {job_id: "CANCELLED"}
    assert not (tmp_path / "slurm" / "jobs.json").exists()


def test_without_sbatch_the_error_says_how_to_render_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = render_chain(tmp_path, [StageJob("first")], SlurmConfig())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"sbatch was not found.*launcher=local.*submit\.dry_run=true"):
        submit_chain(scripts)


def test_without_sbatch_a_submission_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create({"run_dir": str(tmp_path / "run"), "submit": {"dry_run": False}})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sbatch was not found"):
        run(config, [StageJob("prune")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("image", "is_missing"), [("images/nemo.sqsh", True), ("nvcr.io#nvidia/nemo:26.02", False)])
def test_an_image_that_is_not_there_is_said_before_anything_is_submitted(
    tmp_path: Path, image: str, is_missing: bool
) -> None:
    slurm = SlurmConfig(steps={"distill": {"container_image": image}})
    if is_missing:
        with pytest.raises(
            FileNotFoundError, match=r"container_image=images/nemo\.sqsh is not there, as distill would"
        ):
            require_image(slurm, ["prune", "distill"])
    else:
        require_image(slurm, ["prune", "distill"])  # pyxis finds it


def test_a_dry_run_renders_every_step_with_the_overrides_of_the_command_line(door: Door, tmp_path: Path) -> None:
    overrides = ["recipe=quickstart", f"run_dir={tmp_path}", "slurm.nodes=2", "submit.dry_run=true", "seed=7"]
    done = door("submit", *overrides, "compress.steps=[prune,from_scratch,report]")
    assert done.code == 0, done.err
    first, second, third = (path.read_text() for path in sorted((tmp_path / "slurm").glob("*.sbatch")))
    of_both = f"recipe=quickstart run_dir={tmp_path} seed=7 'compress.steps=[prune,from_scratch,report]'"
    assert f"-m minitron_nemo.cli prune {of_both} &\n" in first
    assert f"-m minitron_nemo.cli pretrain section=from_scratch {of_both} &\n" in second
    assert "#SBATCH --nodes=2\n" in first
    assert "#SBATCH --nodes=1\n" in third  # one process makes the report
    assert "Nothing was submitted" in done.out


def test_an_unknown_step_names_the_nearest_section(door: Door, tmp_path: Path) -> None:
    done = door("submit", "recipe=quickstart", f"run_dir={tmp_path}", "compress.steps=[distil]", "submit.dry_run=true")
    assert "distil is not a section of a recipe; did you mean distill?" in done.mistake
    assert not (tmp_path / "slurm").exists()


def logs(run_dir: Path) -> str:
    """What the jobs printed, for the message of a failing test."""
    return "\n".join(f"-- {log.name}\n{log.read_text()}" for log in sorted((run_dir / "slurm").glob("*.log")))
