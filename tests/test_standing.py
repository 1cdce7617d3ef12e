"""What already stands where a step would write."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from minitron_nemo.artifact import writing
from minitron_nemo.checks import Mistake
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.config.stages import DistillConfig, PrepareDataConfig
from minitron_nemo.recipe import OWN_STEPS
from minitron_nemo.standing import serves


def test_the_corrected_teacher_takes_the_place_of_nothing_else(tmp_path: Path) -> None:
    step, teacher = OWN_STEPS["distill"], tmp_path / "teacher"
    config = DistillConfig(
        distillation=DistillationConfig(teacher_lr=1e-5),
        corrected_teacher=str(teacher),
        output=str(tmp_path / "student"),
    )
    assert not serves(step, config)
    teacher.mkdir()
    (teacher / "notes.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(
            Mistake, match=r"is no artifact: distill would .* Set distill\.corrected_teacher to another"
        ):
            serves(step, config, overwrite=overwrite)
    for stage, made in (("import-hf", config), ("correct-teacher", dataclasses.replace(config, seed=7))):
        with writing(teacher, stage=stage, config=made):
            pass
        with pytest.raises(Mistake, match=r"distill\.corrected_teacher=.* was not made by this step"):
            serves(step, config)
        assert not serves(step, config, overwrite=True)
    with writing(teacher, stage="correct-teacher", config=config):  # by a run that was killed before its own output
        pass
    assert not serves(step, config)


def test_a_link_to_nothing_is_seen_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Mistake, match="is there and is no artifact"):
        serves(OWN_STEPS["prepare_data"], PrepareDataConfig(output=str(tmp_path / "data")))
