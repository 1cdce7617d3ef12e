"""A recipe: everything one compression needs, as data.

    conf/wiring.yaml       a section for each stage: which step's output is which step's input
    conf/recipe/<name>     the values, and the steps in their order

A step is a section that a stage runs. Every stage has one of its own name (`distill`); a recipe names others where it
puts them in order, and gives their values in a section of that name:

    compress:
      steps:
        - distill
        - {stage: distill, name: distill_again, from: distill}

    distill_again:
      student: ${distill.output}

`from` names a step whose values it takes, key by key, unless it gives its own; of another stage's step, those of the
keys that both have. Its output is `${run_dir}/<name>` unless it says another.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from minitron_nemo.checks import Mistake, did_you_mean, require
from minitron_nemo.conf_tree import WIRING, conf_dir
from minitron_nemo.config import stages
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.plan import PlanConfig
from minitron_nemo.config.search import SearchConfig
from minitron_nemo.config.slurm import SlurmConfig
from minitron_nemo.config.throughput import ThroughputConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.quiet import imports_held_back

STAGES: dict[str, type] = {
    "prepare-data": stages.PrepareDataConfig,
    "pretrain": stages.PretrainConfig,
    "import-hf": stages.ImportHfConfig,
    "correct-teacher": stages.CorrectTeacherConfig,
    "estimate-importance": stages.EstimateImportanceConfig,
    "prune": stages.PruneConfig,
    "prune-hf": stages.PruneHfConfig,
    "search": SearchConfig,
    "teacher-logits": stages.TeacherLogitsConfig,
    "distill": stages.DistillConfig,
    "evaluate": stages.EvaluateConfig,
    "export-hf": stages.ExportHfConfig,
    "throughput": ThroughputConfig,
    "report": stages.ReportConfig,
}
"""Stage -> the dataclass of its sections; its module is `minitron_nemo.stages.<stage>`."""

_GROUPS: dict[str, type] = {"trainer": TrainerConfig, "data": DataConfig}
SHARED = ("seed", *_GROUPS)
"""Fields that a section takes from the top of the recipe."""


@dataclass(frozen=True)
class Step:
    """A section, the stage that runs it, and the step whose values it takes where it gives none."""

    name: str
    stage: str
    base: str | None = None

    @property
    def schema(self) -> type:
        return STAGES[self.stage]


OWN_STEPS = {stage.replace("-", "_"): Step(stage.replace("-", "_"), stage) for stage in STAGES}
"""The step of each stage's own name."""


# ---- which steps a recipe has --------------------------------------------------------------------------------------


def steps_of(overrides: Sequence[str]) -> dict[str, Step]:
    """Name -> step, of the recipe that a command line names and of what it adds to `compress.steps`.

    They have to be known before Hydra composes, which checks each section against its stage's dataclass.
    Raises: Mistake: a step of no stage, named as another is, or taking its values from nowhere.
    """
    found = dict(OWN_STEPS)
    for entry in _entries(overrides):
        if isinstance(entry, Mapping):
            step = _step(entry)
            known = found.setdefault(step.name, step)
            require(
                known == step,
                f"compress.steps: {step.name} is a step of stage {known.stage} already. Choose another name.",
            )
    for step in found.values():
        require(
            step.base is None or step.base in found,
            f"compress.steps: {step.name} takes its values from {step.base}, which is no step; "
            f"{did_you_mean(str(step.base), found)}",
        )
    for step in found.values():
        _require_ends(step, found)
    return found


def _step(entry: Mapping[str, Any]) -> Step:
    unknown = sorted(set(entry) - {"stage", "name", "from"})
    require(
        "stage" in entry and not unknown,
        f"compress.steps: {dict(entry)} must be a name, or {{stage: ..., name: ..., from: ...}} with its values in a "
        f"section of that name{f'; not known: {unknown[0]}' if unknown else ''}.",
    )
    stage = str(entry["stage"]).replace("_", "-")
    require(stage in STAGES, f"compress.steps: {stage} is not a stage; {did_you_mean(stage, STAGES)}")
    base = entry.get("from")
    name = str(entry.get("name", stage.replace("-", "_")))
    require(
        name.isidentifier() and name not in _TOP,
        f"compress.steps: name={name} must be one word of letters, digits and underscores that is not {_TOP[0]}, "
        f"{', '.join(_TOP[1:-1])} or {_TOP[-1]}.",
    )
    return Step(name, stage, None if base is None else str(base))


def _require_ends(step: Step, steps: Mapping[str, Step]) -> None:
    seen = [step.name]
    while (base := steps[seen[-1]].base) is not None:
        require(
            base not in seen,
            f"compress.steps: {' takes its values from '.join([*seen, base])}, without an end. Give one its own.",
        )
        seen.append(base)


def _entries(overrides: Sequence[str]) -> Iterator[Any]:
    """What stands in `compress.steps`: of the recipe's file, of those it begins from, and of the command line."""
    plain = [each for each in overrides if not each.startswith("-") and "=" in each]
    folders = [conf_dir(), *_config_dirs(overrides)]
    for override in plain:
        if override.startswith("recipe="):
            yield from _entries_of_file(override.removeprefix("recipe="), folders)
    for override in plain:
        if override.lstrip("+").startswith("compress.steps="):
            try:
                [parsed] = OverridesParser.create().parse_overrides([override])
                value = parsed.value()
            except HydraException:
                continue  # Hydra will say so in its own words
            yield from value if isinstance(value, list) else ()


def _config_dirs(overrides: Sequence[str]) -> Iterator[Path]:
    """Those of Hydra's option --config-dir, where a person's own recipes are."""
    for place, option in enumerate(overrides):
        name, _, value = option.partition("=")
        if name in ("--config-dir", "-cd"):
            yield Path(value or (overrides[place + 1] if place + 1 < len(overrides) else ""))


def _entries_of_file(recipe: str, folders: Sequence[Path]) -> Iterator[Any]:
    file = next((path for folder in folders if (path := folder / "recipe" / f"{recipe}.yaml").is_file()), None)
    if file is None:
        return  # Hydra will say so in its own words
    content = OmegaConf.load(file)
    if not isinstance(content, DictConfig):
        return
    for default in OmegaConf.select(content, "defaults") or ():
        if isinstance(default, str) and default != "_self_":
            yield from _entries_of_file(Path(default).name, folders)
    steps = OmegaConf.select(content, "compress.steps", throw_on_resolution_failure=False)
    entries = OmegaConf.to_container(steps, resolve=False) if isinstance(steps, ListConfig) else []
    assert isinstance(entries, list)
    yield from entries


def names_of(entries: Sequence[Any]) -> list[str]:
    """Names of the steps in a composed `compress.steps`."""
    return [_step(entry).name if isinstance(entry, Mapping) else str(entry) for entry in entries]


def compose(overrides: Sequence[str], *, directory: Path | None = None) -> tuple[DictConfig, dict[str, Step]]:
    """The recipe that a command line names, with its overrides, and its steps. Raises: Mistake, Hydra's errors."""
    steps = steps_of(overrides)
    register_schema(steps)
    with hydra.initialize_config_dir(str(directory or conf_dir()), version_base="1.3"):
        return hydra.compose(WIRING, list(overrides)), steps


def require_own_keys(config: DictConfig, overrides: Sequence[str]) -> None:
    """No override reaches into a group that is wholly another one, such as `target: ${prune.target}`: OmegaConf would
    change that one, and with it every step that takes it.

    Raises: Mistake: one does.
    """
    written = OmegaConf.to_container(config, resolve=False)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        node: Any = written
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if isinstance(node, str) and node.startswith("${"):
                group, followed, rest = ".".join(parts[:depth]), node[2:-1], ".".join(parts[depth:])
                raise Mistake(
                    f"{group} is that of {followed}, whole. Set {followed}.{rest}, or another {group} in the recipe."
                )
            node = node.get(part) if isinstance(node, dict) else None


# ---- the schema that Hydra composes against --------------------------------------------------------------------------


def register_schema(steps: Mapping[str, Step]) -> None:
    """Give Hydra every section's dataclass, so that an unknown key or a wrong type fails while composing."""
    fields: list[tuple[str, Any, Any]] = [
        ("name", str, MISSING),
        ("run_dir", str, MISSING),
        ("section", str | None, None),
        ("overwrite", bool, False),
        ("verify_inputs", bool, False),
        ("seed", int, 1234),
        *((name, group, field(default_factory=group)) for name, group in _GROUPS.items()),
        ("compress", stages.CompressConfig, field(default_factory=stages.CompressConfig)),
        ("submit", stages.SubmitConfig, field(default_factory=stages.SubmitConfig)),
        ("slurm", SlurmConfig, field(default_factory=SlurmConfig)),
        ("plan", PlanConfig, field(default_factory=PlanConfig)),
    ]
    for step in steps.values():
        section = _section_schema(step, steps)
        # a class as default: its fields are read, but no half-filled instance is made and checked
        fields.append((step.name, section, field(default=section)))
    ConfigStore.instance().store(name="schema", node=dataclasses.make_dataclass("Recipe", fields))


_DOORS = ("section", "overwrite", "verify_inputs", "compress", "submit", "slurm", "plan")
_TOP = ("name", "run_dir", *_DOORS, *SHARED, "hydra")


def _section_schema(step: Step, steps: Mapping[str, Step]) -> type:
    """The stage's dataclass less what stands at the top of a recipe, and without its checks, which run on the whole."""
    given: set[str] = set()
    hints = typing.get_type_hints(step.schema)
    if step.base is not None:
        base = steps[step.base].schema
        same_stage = base is step.schema
        given = {name for name, kind in typing.get_type_hints(base).items() if hints.get(name) == kind}
        given -= {"output"} if same_stage else {"output", "model", "plan"}
    own = []
    for each in dataclasses.fields(step.schema):
        if each.name in SHARED:
            continue
        if each.name == "output" and step.name not in OWN_STEPS:
            own.append((each.name, str, f"${{run_dir}}/{step.name}"))
        elif each.name in given:
            own.append((each.name, *_following(hints[each.name], f"{step.base}.{each.name}")))
        else:
            own.append((each.name, hints[each.name], _default(each)))
    return dataclasses.make_dataclass(step.schema.__name__, own)


def _default(each: dataclasses.Field[Any]) -> Any:
    if each.default_factory is not dataclasses.MISSING:
        return field(default_factory=each.default_factory)
    return each.default if each.default is not dataclasses.MISSING else MISSING


def _following(kind: Any, key: str) -> tuple[Any, Any]:
    """Type and default of a field that is that of `key`, of a group field by field, so that each can be set alone."""
    if not dataclasses.is_dataclass(kind):
        return kind, f"${{{key}}}"
    hints = typing.get_type_hints(kind)
    inner = [(each.name, *_following(hints[each.name], f"{key}.{each.name}")) for each in dataclasses.fields(kind)]
    group = dataclasses.make_dataclass(kind.__name__, inner)  # type: ignore[union-attr]
    return group, field(default=group)


# ---- from a composed recipe to a stage's config ----------------------------------------------------------------------


def find_step(name: str, steps: Mapping[str, Step]) -> Step:
    """Raises: Mistake: no such step."""
    require(name in steps, f"{name} is not a section of a recipe; {did_you_mean(name, steps)}")
    return steps[name]


def config_of(step: Step, config: DictConfig) -> Any:
    """A step's section as its stage's dataclass, interpolations resolved and what it reads of the top added.

    Raises: Mistake, OmegaConf's errors: a value of the wrong type or range.
    """
    hints = typing.get_type_hints(step.schema)
    shared = [name for name in SHARED if name in hints]
    values = OmegaConf.to_container(config[step.name], resolve=True)
    assert isinstance(values, dict)
    for name in shared:
        values[name] = config[name]
        if name in _GROUPS:
            values[name] = _part(OmegaConf.to_container(config[name], resolve=True), _GROUPS[name], hints[name])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(step.schema), values))
    except OmegaConfBaseException as error:  # its keys begin below the section, a user's do not
        key = str(error.full_key)
        key = key if key.split(".")[0] in shared else f"{step.name}.{key}"
        if isinstance(error, ConfigKeyError):
            raise Mistake(f"{key} is not a key of this recipe, and a plus (+{key}=...) cannot make it one.") from error
        raise Mistake(f"{key}: {str(error).splitlines()[0]}.") from error
    except Mistake as error:  # so do those of the dataclasses' own checks
        own = "|".join(set(hints) - set(shared))
        begins = rf"\A({own})\b|(?<![\w./=-])({own})(?=(\.[a-z]\w*)+)|(?<![\w./=-])({own})(?==)"
        raise Mistake(re.sub(begins, rf"{step.name}.\g<0>", str(error))) from error


def _part(values: Any, whole: type, narrow: type) -> dict[str, Any]:
    """Of a group at the top of the recipe what a stage reads; keys that the whole does not have stay, to fail."""
    left_out = {each.name for each in dataclasses.fields(whole)} - {each.name for each in dataclasses.fields(narrow)}
    return {name: value for name, value in values.items() if name not in left_out}


def stage_module(stage: str) -> Any:
    """The module of a stage; imported only when asked for, since most bring Megatron with them."""
    require(stage in STAGES, f"{stage} is not a stage; {did_you_mean(stage, STAGES)}")
    with imports_held_back():
        return importlib.import_module(f"minitron_nemo.stages.{stage.replace('-', '_')}")
