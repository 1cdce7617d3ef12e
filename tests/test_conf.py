"""Everything under conf/ composes, and every section of it is what its stage takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig

from minitron_nemo.cli import DOORS, conf_dir, recipes
from minitron_nemo.config.stages import CompressConfig
from minitron_nemo.recipe import SECTIONS, register_schema, typed_section
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape


def compose(door: str, *overrides: str, directory: Path | None = None) -> DictConfig:
    register_schema()
    with hydra.initialize_config_dir(str(directory or conf_dir()), version_base="1.3"):
        return hydra.compose(door, list(overrides))


def test_every_file_is_a_door_a_recipe_or_the_wiring() -> None:
    files = {path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*") if path.is_file()}
    assert files == {"wiring.yaml", *(f"{door}.yaml" for door in DOORS), *(f"recipe/{name}.yaml" for name in recipes())}


@pytest.mark.parametrize("recipe", recipes())
@pytest.mark.parametrize("door", DOORS)
def test_every_door_composes_every_recipe(door: str, recipe: str) -> None:
    config = compose(door, f"recipe={recipe}")
    assert config.name == recipe
    for section in SECTIONS:
        values = typed_section(section, config)
        assert str(values.output).startswith(f"runs/{recipe}/"), section


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_names_steps_and_dims_that_exist(recipe: str) -> None:
    config = compose("compress", f"recipe={recipe}")
    assert set(config.compress.steps) <= SECTIONS.keys()
    assert set(config.prune.target) <= set(PRUNABLE_DIMS)
    if config.pretrain.shape is not None:
        assert ModelShape.from_dict(dict(config.pretrain.shape)).num_parameters > 0


@pytest.mark.parametrize("recipe", recipes())
def test_no_two_sections_write_to_one_place(recipe: str) -> None:
    config = compose("compress", f"recipe={recipe}")
    outputs = [str(typed_section(section, config).output) for section in SECTIONS]
    assert len(set(outputs)) == len(outputs)


def test_what_stands_at_the_top_reaches_every_section_that_has_it() -> None:
    config = compose("compress", "recipe=quickstart", "seed=7", "trainer.seq_length=128", "trust_checkpoint=true")
    distill, scores = typed_section("distill", config), typed_section("estimate_importance", config)
    assert distill.seed == scores.seed == distill.data.seed == 7 and distill.trust_checkpoint
    assert distill.trainer.seq_length == scores.trainer.seq_length == 128


def test_the_controls_train_as_the_distillation_they_are_measured_against() -> None:
    config = compose("compress", "recipe=quickstart", "distill.training.steps=77", "distill.training.optim.lr=0.5")
    for control in ("from_scratch", "pruned_ce"):
        assert typed_section(control, config).training == typed_section("distill", config).training


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("recipe/quickstart.yaml", "num_samples"),
        ("recipe/quickstart.yaml", "warmup_steps"),
        ("recipe/quickstart.yaml", "steps"),
        ("recipe/embedded_teacher.yaml", "decay_steps"),
        ("wiring.yaml", "like"),
        ("wiring.yaml", "prepared"),
    ],
)
def test_a_renamed_field_fails_while_composing(tmp_path: Path, file: str, field: str) -> None:
    conf = shutil.copytree(conf_dir(), tmp_path / "conf")
    text = (conf / file).read_text()
    assert f" {field}:" in text
    (conf / file).write_text(text.replace(f" {field}:", f" once_{field}:", 1))
    recipe = Path(file).stem if file.startswith("recipe/") else "quickstart"
    with pytest.raises(HydraException, match=f"once_{field}") as failure:
        compose("compress", f"recipe={recipe}", directory=conf)
    assert f"once_{field}" in str(failure.value)


def test_remaking_finished_artifacts_has_to_be_asked_for() -> None:
    assert not CompressConfig().overwrite
    assert not compose("compress", "recipe=quickstart").compress.overwrite
