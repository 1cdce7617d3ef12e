"""The sbatch scripts a chain becomes; what they do when they run is in test_submit.py."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_nemo.cluster import StageJob, render_chain
from minitron_nemo.config.slurm import SlurmConfig

CHAIN = [
    StageJob("prune", ("recipe=quickstart", "target.hidden_size=24")),
    StageJob("pretrain", ("recipe=quickstart",), name="from_scratch"),
    StageJob("distill", ("recipe=quickstart",)),
]
EVERYTHING = SlurmConfig(
    nodes=2,
    processes_per_node=8,
    gpus_per_node=8,
    cpus_per_task=96,
    memory="900G",
    time="1-00:00:00",
    partition="gpu",
    account="language models",
    container_image="nemo image.sqsh",
    container_mounts=["/data:/data:ro", "/runs:/runs"],
    setup=["module load cuda", "export NCCL_DEBUG=WARN"],
    python="python",
)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_there_is_one_script_per_job_numbered_in_order(tmp_path: Path) -> None:
    scripts = render_chain(tmp_path / "run", CHAIN, SlurmConfig())
    names = ["01-prune.sbatch", "02-from_scratch.sbatch", "03-distill.sbatch"]
    assert [script.path.name for script in scripts] == names
    assert sorted(path.name for path in (tmp_path / "run" / "slurm").iterdir()) == names
    assert "-m minitron_nemo.cli pretrain recipe=quickstart &\n" in scripts[1].path.read_text()


def test_rendering_again_leaves_no_script_of_the_longer_chain_before(tmp_path: Path) -> None:
    render_chain(tmp_path, CHAIN, SlurmConfig())
    render_chain(tmp_path, CHAIN[:1], SlurmConfig())
    assert [path.name for path in (tmp_path / "slurm").iterdir()] == ["01-prune.sbatch"]


def test_what_is_not_set_is_not_asked_for(tmp_path: Path) -> None:
    (script,) = render_chain(tmp_path, CHAIN[:1], SlurmConfig(seconds_before_end=0))
    asked = {line.split("=")[0] for line in directives(script.path.read_text())}
    assert asked == {"--job-name", "--nodes", "--ntasks-per-node", "--time", "--output", "--open-mode"}
    assert "--container" not in script.path.read_text()


def test_what_is_set_is_asked_for_as_written(tmp_path: Path) -> None:
    (script,) = render_chain(tmp_path, CHAIN[:1], EVERYTHING)
    text = script.path.read_text()
    assert directives(text) == [
        "--job-name=minitron-prune",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=96",
        "--gpus-per-node=8",
        "--mem=900G",
        "--time=1-00:00:00",
        "--partition=gpu",
        '--account="language models"',
        f"--output={tmp_path}/slurm/01-prune-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@120",
    ]
    assert "\nmodule load cuda\nexport NCCL_DEBUG=WARN\n" in text
    assert "--container-image='nemo image.sqsh'" in text
    assert "--container-mounts=/data:/data:ro,/runs:/runs" in text
    assert "--nproc-per-node=8" in text


def test_a_search_is_an_array_of_as_many_jobs_as_asked_for(tmp_path: Path) -> None:
    chain = [StageJob("estimate-importance"), StageJob("search", name="search_4b")]
    importance, search = render_chain(tmp_path, chain, replace(EVERYTHING, jobs_of_search=4))
    assert "--array=0-3" in directives(search.path.read_text())
    assert "--array" not in importance.path.read_text()


def test_a_job_of_one_process_takes_one_node_and_no_gpu(tmp_path: Path) -> None:
    job = StageJob("report", ("recipe=quickstart",), one_process=True)
    for slurm, asked in (
        (EVERYTHING, {"--nodes=1", "--cpus-per-task=96", "--partition=gpu"}),
        (
            replace(EVERYTHING, gpus_of_one_process=1, partition_of_one_process="cpu"),
            {"--nodes=1", "--gpus-per-node=1", "--partition=cpu"},
        ),
    ):
        (script,) = render_chain(tmp_path, [job], slurm)
        found = directives(script.path.read_text())
        assert asked <= set(found)
        assert slurm.gpus_of_one_process or not [line for line in found if line.startswith("--gpus")]
        assert "--nproc-per-node=1 " in script.path.read_text()


@pytest.mark.parametrize("slurm", [SlurmConfig(), EVERYTHING], ids=["defaults", "everything"])
def test_every_script_is_whole_bash(tmp_path: Path, slurm: SlurmConfig) -> None:
    for script in render_chain(tmp_path / "a run", CHAIN, slurm):
        subprocess.run(["bash", "-n", script.path], check=True)
        assert "{{" not in script.path.read_text().split("set -euo pipefail")[1]


def test_a_name_that_cannot_be_a_files_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\.\./prune' cannot name a job: use letters, digits"):
        StageJob("../prune")


def test_an_empty_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to submit.*compress\.steps"):
        render_chain(tmp_path, [], SlurmConfig())
