"""The quickstart, in miniature, as a user of a cluster runs it: `minitron submit` and then SLURM alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from support.artifacts import listing
from support.door import minitron
from support.slurm import ENDED, SingleNodeSlurm
from support.tiny import TinyChain, quickstart_overrides, write_corpus, write_teacher

ROOT = Path(__file__).parents[2]
STEPS = [  # the recipe's, less controls and measurements: each job starts two processes that import NeMo
    "import_hf",
    "prepare_data",
    "correct_teacher",
    "estimate_importance",
    "prune",
    "distill",
    "export_hf",
    "report",
]
JOB_MINUTES = 30  # by SLURM's clock; about 25 s each on two idle cores


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(len(STEPS) * JOB_MINUTES * 60)
def test_a_submitted_quickstart_leaves_a_model_that_transformers_loads(
    slurm_cluster: SingleNodeSlurm, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    teacher = write_teacher(tmp_path / "hf", corpus)
    run_dir = tmp_path / "run"
    overrides = [
        *quickstart_overrides(tmp_path, teacher, corpus),
        f"compress.steps=[{','.join(STEPS)}]",
        "trainer.tensor_model_parallel_size=2",
        "slurm.processes_per_node=2",
        "slurm.cpus_per_task=2",
        f"slurm.time={JOB_MINUTES}",
    ]
    said = submit(*overrides)

    jobs = json.loads((run_dir / "slurm" / "jobs.json").read_text())
    ids = [job["job_id"] for job in jobs]
    assert [job["name"] for job in jobs] == STEPS
    assert [job["after"] for job in jobs] == [None, *ids[:-1]]
    assert f"job {ids[1]}: prepare_data, after job {ids[0]} (" in said
    assert slurm_cluster.wait_for_jobs(ids) == dict.fromkeys(ids, "COMPLETED"), logs(run_dir)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert model.config.hidden_size == 24
    assert open_artifact(run_dir / "distilled").manifest["config"]["trainer"]["tensor_model_parallel_size"] == 2
    assert model.num_parameters() == open_artifact(run_dir / "distilled").metrics["parameters"]
    assert (run_dir / "report" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(4 * JOB_MINUTES * 60)
def test_a_chain_submitted_again_starts_where_it_failed_and_a_stage_told_to_stop_goes_on(
    slurm_cluster: SingleNodeSlurm, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    before, output = listing(tiny_chain.directory), tmp_path / "importance"
    steps = (tiny_chain.run_dir / "steps.json").read_text()
    fails = '[ "$SLURM_JOB_NAME" != minitron-estimate_importance ] || exit 1'
    begun = f'touch {tmp_path}/"$SLURM_JOB_NAME"'  # once the script hears the signal
    submitted = [
        *tiny_chain.overrides,
        "compress.steps=[import_hf,estimate_importance]",
        f"estimate_importance.output={output}",
        f"slurm.time={JOB_MINUTES}",
    ]
    try:
        submit(*submitted, f"slurm.setup=['{fails}']")
        ids = [job["job_id"] for job in json.loads((tiny_chain.run_dir / "slurm" / "jobs.json").read_text())]
        states = slurm_cluster.wait_for_jobs(ids)
        assert [states[job] for job in ids] == ["COMPLETED", "FAILED"], logs(tiny_chain.run_dir)

        submit(*submitted, f"slurm.setup=['{begun}']")
        ids = [job["job_id"] for job in json.loads((tiny_chain.run_dir / "slurm" / "jobs.json").read_text())]
        while not (tmp_path / "minitron-estimate_importance").exists():
            assert slurm_cluster.states(ids).get(ids[1]) not in ENDED, logs(tiny_chain.run_dir)
            time.sleep(0.2)
        again = minitron("submit", *submitted)
        assert again.returncode == 2, again.stdout
        assert f"estimate_importance ({ids[1]}) of an earlier submission waits or runs there" in again.stderr
        subprocess.run(["scancel", "--batch", "--signal=USR1", str(ids[1])], check=True)
        assert slurm_cluster.wait_for_jobs(ids) == dict.fromkeys(ids, "COMPLETED"), logs(tiny_chain.run_dir)

        said = logs(tiny_chain.run_dir)
        assert said.count(f"complete: {tiny_chain.run_dir / 'teacher'}") == 2, said
        assert said.count("as it was asked to; it is kept in ") == said.count("goes on where it was stopped") == 1, said
    finally:
        shutil.rmtree(tiny_chain.run_dir / "slurm", ignore_errors=True)
        (tiny_chain.run_dir / "steps.json").write_text(steps)
    assert open_artifact(output).digest == open_artifact(tiny_chain.run_dir / "importance").digest
    came_and_went = ("run", "run/steps.json")  # slurm/ too
    assert {name: made for name, made in listing(tiny_chain.directory).items() if name not in came_and_went} == {
        name: made for name, made in before.items() if name not in came_and_went
    }


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(4 * JOB_MINUTES * 60)
def test_a_rank_that_is_killed_costs_its_job_only_what_came_after_the_last_checkpoint(
    slurm_cluster: SingleNodeSlurm, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    """Beside one that nothing disturbs."""
    chain = tmp_path / "run"
    shutil.copytree(tiny_chain.run_dir, chain, ignore=shutil.ignore_patterns("slurm"))
    outputs = {name: tmp_path / name for name in ("undisturbed", "killed")}
    values = [
        *tiny_chain.overrides,
        f"run_dir={chain}",
        "distill.training.steps=40",
        "distill.training.checkpoint_every=1",
        "trainer.tensor_model_parallel_size=2",
        "slurm.processes_per_node=2",
        "slurm.cpus_per_task=2",
        f"slurm.time={JOB_MINUTES}",
        "compress.steps=[distill]",
    ]
    ids = {}
    for name, output in outputs.items():  # one after the other, as both are the step `distill` of one run
        if ids:
            slurm_cluster.wait_for_jobs(list(ids.values()))
        submit(*values, f"distill.output={output}")
        (job,) = json.loads((chain / "slurm" / "jobs.json").read_text())
        ids[name] = job["job_id"]
    while not list(tmp_path.glob("killed.training/checkpoints/step-*")):
        assert slurm_cluster.states(list(ids.values())).get(ids["killed"]) not in ENDED, logs(chain)
        time.sleep(0.02)
    os.kill(ranks_of(outputs["killed"])[0], signal.SIGKILL)
    assert slurm_cluster.wait_for_jobs(list(ids.values())) == dict.fromkeys(ids.values(), "COMPLETED"), logs(chain)
    assert logs(chain).count("the ranks died without a word, for the 1. time of at most 3") == 1, logs(chain)
    undisturbed, killed = (open_artifact(output) for output in outputs.values())
    assert killed.digest == undisturbed.digest


def submit(*values: str) -> str:
    """What it prints."""
    done = minitron("submit", *values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ranks_of(output: Path) -> list[int]:
    """The processes that write to `output`: ranks, not the torchrun that started them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if f"distill.output={output}" in words and "torch.distributed.run" not in words and "srun" not in words[0]:
            found.append(int(process.name))
    return found


def logs(run_dir: Path) -> str:
    """What the jobs printed, for the message of a failing test."""
    return "\n".join(f"-- {log.name}\n{log.read_text()[-3000:]}" for log in sorted((run_dir / "slurm").glob("*.log")))
