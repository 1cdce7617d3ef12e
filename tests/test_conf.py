"""Everything under conf/ composes, and every section of it is what its stage takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException

from minitron_nemo.conf_tree import conf_dir, recipes
from minitron_nemo.config.identity import as_dict, differences
from minitron_nemo.config.launcher import LOCAL, SLURM, TORCHRUN
from minitron_nemo.recipe import chain_of, compose, config_of, steps_of
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape

FOLLOWING = {"child": "prune", "grandchild": "child", "whole": "prune"}
"""Step -> that which it takes its values from."""


def typed(name: str, *overrides: str) -> Any:
    """A step's config as its stage gets it."""
    config, steps = compose(overrides)
    return config_of(steps[name], config)


def test_every_file_is_a_recipe_a_launcher_or_the_wiring() -> None:
    files = {path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*") if path.is_file()}
    launchers = {f"launcher/{name}.yaml" for name in (LOCAL, TORCHRUN, SLURM)}
    assert files == {"wiring.yaml", *launchers, *(f"recipe/{name}.yaml" for name in recipes())}


@pytest.mark.parametrize("recipe", recipes())
def test_every_step_of_every_recipe_is_what_its_stage_takes_and_writes_to_a_place_of_its_own(recipe: str) -> None:
    config, steps = compose([f"recipe={recipe}"])
    assert config.name == recipe
    outputs = [str(config_of(step, config).output) for step in steps.values()]
    assert all(output.startswith(f"runs/{recipe}/") for output in outputs)
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_names_steps_and_dims_that_exist(recipe: str) -> None:
    config, steps = compose([f"recipe={recipe}"])
    assert set(chain_of(config)) <= steps.keys()
    assert set(config.prune.target) <= set(PRUNABLE_DIMS)
    if config.pretrain.shape:
        assert ModelShape.from_dict(dict(config.pretrain.shape)).num_parameters > 0


def test_what_stands_at_the_top_reaches_every_section_that_has_it() -> None:
    top = ("recipe=quickstart", "seed=7", "trainer.seq_length=128")
    distill, scores = typed("distill", *top), typed("estimate_importance", *top)
    assert distill.seed == scores.seed == distill.data.seed == 7
    assert distill.trainer.seq_length == scores.trainer.seq_length == 128


def test_a_stage_keeps_of_the_top_what_it_reads_and_no_more() -> None:
    kept = {name: as_dict(typed(name, "recipe=quickstart")) for name in ("import_hf", "prune", "evaluate", "distill")}
    assert "seq_length" not in kept["import_hf"]["trainer"] and "global_batch_size" not in kept["evaluate"]["trainer"]
    assert set(kept["evaluate"]["data"]) == {"prepared"} and "seed" not in kept["prune"]
    assert kept["distill"]["trainer"]["global_batch_size"] == 16


@pytest.mark.parametrize("step", ["import_hf", "prepare_data", "estimate_importance", "prune", "evaluate", "export_hf"])
def test_another_global_batch_remakes_no_step_that_does_not_train(step: str) -> None:
    before = as_dict(typed(step, "recipe=quickstart"))
    assert list(differences(before, typed(step, "recipe=quickstart", "trainer.global_batch_size=64"))) == []


def test_the_layout_remakes_nothing() -> None:
    layout = ("trainer.tensor_model_parallel_size=2", "trainer.sequence_parallel=true", "trainer.micro_batch_size=1")
    for step in steps_of(["recipe=quickstart"]):
        before = as_dict(typed(step, "recipe=quickstart"))
        assert list(differences(before, typed(step, "recipe=quickstart", *layout))) == [], step


def test_the_controls_train_as_the_distillation_they_are_measured_against() -> None:
    values = ("recipe=quickstart", "distill.training.steps=77", "distill.training.optim.lr=0.5")
    for control in ("from_scratch", "pruned_ce", "distill_calibrated"):
        assert typed(control, *values).training == typed("distill", *values).training
    alone = typed("from_scratch", *values, "from_scratch.training.steps=15")
    assert (alone.training.steps, alone.training.optim.lr) == (15, 0.5)


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("recipe/quickstart.yaml", "num_samples"),
        ("recipe/quickstart.yaml", "warmup_steps"),
        ("recipe/quickstart.yaml", "steps"),
        ("recipe/embedded_teacher.yaml", "decay_steps"),
        ("wiring.yaml", "student"),
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
        compose([f"recipe={recipe}"], directory=conf)
    assert f"once_{field}" in str(failure.value)


def test_the_shape_of_random_weights_can_be_typed() -> None:
    """OmegaConf 2.3.0 cannot merge into a dict that may be None, and is."""
    assert typed("pretrain", "recipe=quickstart", "+pretrain.shape={num_layers:3}").shape == {"num_layers": 3}
    assert typed("pretrain", "recipe=embedded_teacher", "pretrain.shape.num_layers=3").shape["num_layers"] == 3


def test_a_table_follows_the_bases_key_by_key_unless_it_is_another_ones_whole() -> None:
    steps = ",".join(f"{{stage:prune,name:{name},from:{base}}}" for name, base in FOLLOWING.items())
    typed = [f"compress.steps=[{steps}]", "prune.target.ffn_hidden_size=320", "+child.target.hidden_size=96"]
    typed += ["+grandchild.target.num_query_groups=1", "whole.target=${child.target}"]
    config, found = compose(["recipe=quickstart", *typed])
    targets = {name: config_of(found[name], config).target for name in ("prune", *FOLLOWING)}
    assert targets["prune"]["ffn_hidden_size"] == 320 and targets["prune"]["hidden_size"] != 96
    assert targets["child"] == targets["prune"] | {"hidden_size": 96}
    assert targets["grandchild"] == targets["child"] | {"num_query_groups": 1}
    assert targets["whole"] == targets["child"]


def test_remaking_finished_artifacts_has_to_be_asked_for() -> None:
    assert not compose(["recipe=quickstart"])[0].overwrite
