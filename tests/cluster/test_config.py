"""What cannot work on a cluster is said before anything is submitted."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from minitron_nemo.config.slurm import SlurmConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": 0}, r"slurm\.nodes=0 must be at least 1"),
        ({"gpus_per_node": 4, "processes_per_node": 8}, r"processes_per_node=8 is more than slurm\.gpus_per_node=4"),
        ({"time": "4 hours"}, r"slurm\.time=4 hours is not a time limit\. Write minutes \(90\)"),
        ({"memory": "64GB"}, r"slurm\.memory=64GB is not an amount of memory.*e\.g\. 64G"),
        ({"seconds_before_end": 70000}, r"slurm\.seconds_before_end=70000 must be at least 0 and at most 65535"),
        ({"time": "2"}, r"slurm\.seconds_before_end=120 is not below slurm\.time=2 \(120 s\)"),
        ({"time": "1:00", "seconds_before_end": 60}, r"seconds_before_end=60 is not below slurm\.time=1:00 \(60 s\)"),
        ({"container_mounts": ["/data:/data"]}, r"Set slurm\.container_image, or leave the mounts out"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, r"slurm\.partition=.* holds a line break"),
        ({"directives": {"exclude": "a\nb"}}, r"slurm\.directives=.* holds a line break"),
        ({"directives": {"--exclude": "a"}}, r"'--exclude' is no long option of sbatch\. Write exclude"),
        ({"directives": {"qos": "long"}}, r"slurm\.directives\.qos has a key of its own: set slurm\.qos"),
        ({"directives": {"mem": "4G"}}, r"set slurm\.memory"),
        ({"directives": {"output": "log"}}, r"slurm\.directives\.output is what the script itself says"),
        ({"environment": {"NCCL DEBUG": "1"}}, r"'NCCL DEBUG' cannot name a variable"),
        ({"container_runtime": "docker"}, r"slurm\.container_runtime=docker is not known; use pyxis or apptainer"),
        ({"requeues": -1}, r"slurm\.requeues=-1 must be at least 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_mend(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlurmConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("time", ["90", "04:00:00", "1-00:00:00", "2-12"])
def test_every_way_slurm_writes_a_time_limit_is_accepted(time: str) -> None:
    assert SlurmConfig(time=time).time == time


def test_the_dataclass_is_a_hydra_schema() -> None:
    schema = OmegaConf.structured(SlurmConfig)
    config = OmegaConf.to_object(OmegaConf.merge(schema, {"nodes": 4, "gpus_per_node": 8, "setup": ["module load x"]}))
    assert config == SlurmConfig(nodes=4, gpus_per_node=8, setup=["module load x"])
