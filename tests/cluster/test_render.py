"""The sbatch scripts a chain becomes; what they do when they run is in test_submit.py."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_nemo.cluster import StageJob, render_chain
from minitron_nemo.config.slurm import SlurmConfig
from support.door import Door

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
    qos="long",
    reservation="maintenance",
    constraint="h100&ib",
    comment="8B to 4B",
    mail_user="me@example.org",
    mail_type="END,FAIL",
    directives={"exclude": "node7", "switches": "1@10:00"},
    container_image="nemo image.sqsh",
    container_mounts=["/data:/data:ro", "/runs:/runs"],
    modules=["cuda/12.8", "nccl"],
    environment={"NCCL_DEBUG": "WARN", "NOTE": "two words"},
    setup=["ulimit -n 65536"],
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
    assert asked == {"--job-name", "--nodes", "--ntasks-per-node", "--time", "--requeue", "--output", "--open-mode"}
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
        "--qos=long",
        "--reservation=maintenance",
        "--constraint=h100&ib",
        '--comment="8B to 4B"',
        "--mail-user=me@example.org",
        "--mail-type=END,FAIL",
        "--exclude=node7",
        "--switches=1@10:00",
        "--requeue",
        f"--output={tmp_path}/slurm/01-prune-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@120",
    ]
    set_up = "module load cuda/12.8 nccl", "export NCCL_DEBUG=WARN", "export NOTE='two words'", "ulimit -n 65536"
    assert "\n" + "\n".join(set_up) + "\n" in text
    assert "--container-image='nemo image.sqsh'" in text
    assert "--container-mounts=/data:/data:ro,/runs:/runs" in text
    assert "--nproc-per-node=8" in text


def test_values_of_single_steps_may_be_of_steps_that_are_not_submitted(tmp_path: Path) -> None:
    slurm = replace(EVERYTHING, steps={"correct_teacher": {"nodes": 16}, "distill": {"nodes": 3}})
    with pytest.raises(ValueError, match=r"slurm\.steps\.correct_teacher is no step of this chain"):
        render_chain(tmp_path, [StageJob("distill")], slurm)
    (script,) = render_chain(tmp_path, [StageJob("distill")], slurm, of_chain=["correct_teacher", "prune"])
    assert "--nodes=3" in directives(script.path.read_text())


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


def test_apptainer_runs_python_where_pyxis_is_not(tmp_path: Path) -> None:
    (script,) = render_chain(tmp_path, CHAIN[:1], replace(EVERYTHING, container_runtime="apptainer"))
    text = script.path.read_text()
    bound = "apptainer exec --nv --bind /data:/data:ro,/runs:/runs 'nemo image.sqsh'"
    assert f"    {bound} \\\n    python -m torch.distributed.run" in text
    assert "--container" not in text


def test_the_papers_distillation_on_32_nodes_is_this_script(door: Door, tmp_path: Path) -> None:
    """The whole of it, as a person reads it; written again by hand where the template changes."""
    values = ["partition=gpu", "account=llm", "cpus_per_task=96", "container_image=/shared/nemo-26.02.sqsh"]
    values += ["container_mounts=['/shared:/shared']", "python=python"]
    recipe = ["recipe=llama31_8b_to_4b_width", f"run_dir={tmp_path}"]
    slurm = [f"slurm.{value}" for value in values]
    done = door("submit", *recipe, *slurm, "+slurm.environment={NCCL_DEBUG: WARN}", "submit.dry_run=true")
    assert done.code == 0, done.err
    golden = Path(__file__).with_name("llama31_8b_to_4b_width.sbatch").read_text()
    assert (tmp_path / "slurm" / "06-distill.sbatch").read_text() == golden.replace("/shared/runs/4b", str(tmp_path))


def test_a_step_has_what_slurm_steps_gives_it(tmp_path: Path) -> None:
    own = {"distill": {"nodes": 16, "time": "2-00:00:00", "environment": {"NCCL_DEBUG": "INFO"}}}
    prune, _, distill = (
        script.path.read_text() for script in render_chain(tmp_path, CHAIN, replace(EVERYTHING, steps=own))
    )
    assert {"--nodes=2", "--time=1-00:00:00"} <= set(directives(prune))
    assert {"--nodes=16", "--time=2-00:00:00", "--gpus-per-node=8"} <= set(directives(distill))
    assert "export NCCL_DEBUG=INFO\nexport NOTE='two words'\n" in distill


def test_a_step_of_one_process_can_be_given_another_partition(tmp_path: Path) -> None:
    slurm = replace(EVERYTHING, steps={"report": {"partition": "cpu", "memory": "4G"}})
    (script,) = render_chain(tmp_path, [StageJob("report", one_process=True)], slurm)
    assert {"--nodes=1", "--partition=cpu", "--mem=4G"} <= set(directives(script.path.read_text()))


@pytest.mark.parametrize("slurm", [SlurmConfig(), EVERYTHING], ids=["defaults", "everything"])
def test_every_script_is_whole_bash(tmp_path: Path, slurm: SlurmConfig) -> None:
    for script in render_chain(tmp_path / "a run", CHAIN, slurm):
        subprocess.run(["bash", "-n", script.path], check=True)
        assert "{{" not in script.path.read_text().split("set -euo pipefail")[1]


def test_a_name_that_cannot_be_a_files_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\.\./prune' cannot name a job: use letters, digits"):
        StageJob("../prune")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"distil": {"nodes": 2}}, r"slurm\.steps\.distil is no step of this chain; did you mean distill\?"),
        ({"distill": {"node": 2}}, r"slurm\.steps\.distill\.node is no key of slurm; did you mean nodes\?"),
        ({"distill": {"nodes": "many"}}, r"slurm\.steps\.distill: Value 'many'.*could not be converted to Integer"),
        ({"distill": {"nodes": 0}}, r"slurm\.steps\.distill: slurm\.nodes=0 must be at least 1"),
        ({"distill": 2}, r"slurm\.steps\.distill=2 is no group of keys"),
    ],
)
def test_a_step_that_cannot_have_what_it_is_given_is_named_and_nothing_is_written(
    tmp_path: Path, steps: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        render_chain(tmp_path / "run", CHAIN, replace(EVERYTHING, steps=steps))
    assert not (tmp_path / "run").exists()


def test_an_empty_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to submit.*compress\.steps"):
        render_chain(tmp_path, [], SlurmConfig())
