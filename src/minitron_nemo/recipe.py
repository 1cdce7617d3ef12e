"""A recipe: everything one compression needs, one section a step, each section its stage's dataclass.

`conf/wiring.yaml` says which step's output is which step's input; a file under `conf/recipe/` gives the values.
Sections may outnumber stages: `from_scratch` and `pruned_ce` are both run by the stage `pretrain`.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.stages import CompressConfig, SubmitConfig

SECTIONS: dict[str, tuple[str, str]] = {
    "prepare_data": ("prepare-data", "PrepareDataConfig"),
    "pretrain": ("pretrain", "PretrainConfig"),
    "import_hf": ("import-hf", "ImportHfConfig"),
    "correct_teacher": ("correct-teacher", "CorrectTeacherConfig"),
    "estimate_importance": ("estimate-importance", "EstimateImportanceConfig"),
    "prune": ("prune", "PruneConfig"),
    "prune_calibrated": ("prune", "PruneConfig"),
    "prune_hf": ("prune-hf", "PruneHfConfig"),
    "teacher_logits": ("teacher-logits", "TeacherLogitsConfig"),
    "distill": ("distill", "DistillConfig"),
    "distill_calibrated": ("distill", "DistillConfig"),
    "from_scratch": ("pretrain", "PretrainConfig"),
    "pruned_ce": ("pretrain", "PretrainConfig"),
    "evaluate": ("evaluate", "EvaluateConfig"),
    "evaluate_teacher": ("evaluate", "EvaluateConfig"),
    "evaluate_corrected_teacher": ("evaluate", "EvaluateConfig"),
    "evaluate_pruned": ("evaluate", "EvaluateConfig"),
    "evaluate_pruned_calibrated": ("evaluate", "EvaluateConfig"),
    "evaluate_from_scratch": ("evaluate", "EvaluateConfig"),
    "evaluate_pruned_ce": ("evaluate", "EvaluateConfig"),
    "evaluate_distilled": ("evaluate", "EvaluateConfig"),
    "evaluate_distilled_calibrated": ("evaluate", "EvaluateConfig"),
    "export_hf": ("export-hf", "ExportHfConfig"),
    "report": ("report", "ReportConfig"),
}
"""Section -> (stage that runs it, name of the stage's config dataclass)."""

STAGES = tuple(dict.fromkeys(stage for stage, _ in SECTIONS.values()))

CONTROLS = {
    "from_scratch": ("training",),
    "pruned_ce": ("training",),
    "prune_calibrated": ("target", "keep", "budget", "multiple_of", "layers", "depth"),
    "distill_calibrated": ("training", "distillation"),
}
"""What a section takes from the one it is measured against."""

SHARED = ("seed", "trust_checkpoint", "trainer", "data")
"""Fields every section takes from the top of the recipe."""


def stage_module(stage: str) -> Any:
    """The module of a stage; imported only when asked for, since most bring NeMo with them."""
    require(stage in STAGES, f"{stage} is not a stage; {did_you_mean(stage, STAGES)}")
    return importlib.import_module(f"minitron_nemo.stages.{stage.replace('-', '_')}")


def section_schema(section: str) -> type:
    """The dataclass a section is checked against. Raises: ValueError: no such section."""
    require(section in SECTIONS, f"{section} is not a section of a recipe; {did_you_mean(section, SECTIONS)}")
    stage, name = SECTIONS[section]
    schema: type = getattr(stage_module(stage), name)
    return schema


def register_schema() -> None:
    """Give Hydra every section's dataclass, so that an unknown key or a wrong type fails while composing."""
    from minitron_nemo.config.data import DataConfig
    from minitron_nemo.config.slurm import SlurmConfig
    from minitron_nemo.config.trainer import TrainerConfig

    fields: list[tuple[str, Any, Any]] = [
        ("name", str, MISSING),
        ("run_dir", str, MISSING),
        ("section", str | None, None),
        ("trust_checkpoint", bool, False),
        ("seed", int, 1234),
        ("trainer", TrainerConfig, field(default_factory=TrainerConfig)),
        ("data", DataConfig, field(default_factory=DataConfig)),
        ("compress", CompressConfig, field(default_factory=CompressConfig)),
        ("submit", SubmitConfig, field(default_factory=SubmitConfig)),
        ("slurm", SlurmConfig, field(default_factory=SlurmConfig)),
    ]
    for name in SECTIONS:
        section = _without_shared(section_schema(name), loose=CONTROLS.get(name, ()))
        # a class as default: its fields are read, but no half-filled instance is made and checked
        fields.append((name, section, field(default=section)))
    ConfigStore.instance().store(name="schema", node=dataclasses.make_dataclass("Recipe", fields))


def _without_shared(schema: type, loose: Sequence[str]) -> type:
    """The dataclass less what stands at the top of a recipe, and without its checks, which run on the whole.

    Args:
        loose: fields that may be a reference to another section, which OmegaConf refuses for typed ones.
    """
    hints = typing.get_type_hints(schema)
    own = []
    for each in dataclasses.fields(schema):
        if each.name in SHARED:
            continue
        default: Any = each.default if each.default is not dataclasses.MISSING else MISSING
        if each.default_factory is not dataclasses.MISSING:
            default = field(default_factory=each.default_factory)
        own.append((each.name, Any, None) if each.name in loose else (each.name, hints[each.name], default))
    return dataclasses.make_dataclass(schema.__name__, own)


def typed_section(section: str, config: DictConfig) -> Any:
    """The section as its stage's dataclass, interpolations resolved and what all stages share added.

    Raises: ValueError, OmegaConf's errors: a value of the wrong type or range.
    """
    schema = section_schema(section)
    shared = {each.name for each in dataclasses.fields(schema)} & set(SHARED)
    values = OmegaConf.to_container(config[section], resolve=True)
    everything = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict) and isinstance(everything, dict)
    values |= {name: everything[name] for name in shared}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:  # its keys begin below the section, a user's do not
        key = str(error.full_key)
        key = key if key.split(".")[0] in shared else f"{section}.{key}"
        if isinstance(error, ConfigKeyError):
            raise ValueError(
                f"{key} is not a key of this recipe, and a plus (+{key}=...) cannot make it one."
            ) from error
        raise ValueError(f"{key}: {str(error).splitlines()[0]}.") from error
