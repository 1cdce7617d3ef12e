"""A recipe: everything one compression needs, as data.

    conf/wiring.yaml       a section for each stage: which step's output is which step's input
    conf/launcher/<name>   who starts the ranks
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

A family is several students, each made of the one before (family.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from minitron_nemo import family
from minitron_nemo.checks import Mistake, did_you_mean, require
from minitron_nemo.conf_tree import WIRING, conf_dir
from minitron_nemo.config import stages
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.launcher import LauncherConfig
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
    wiring: Mapping[str, str] = field(default_factory=dict)
    """Of a member of a family: what it takes from another member's steps in place of the base's values."""
    bases: tuple[Step, ...] = ()
    """The base, the base's base and so on."""

    @property
    def schema(self) -> type:
        return STAGES[self.stage]


OWN_STEPS = {stage.replace("-", "_"): Step(stage.replace("-", "_"), stage) for stage in STAGES}
"""The step of each stage's own name."""


# ---- which steps a recipe has --------------------------------------------------------------------------------------


def steps_of(overrides: Sequence[str]) -> dict[str, Step]:
    """Name -> step, of the recipe that a command line names and of what it adds to `compress.steps`.

    They have to be known before Hydra composes, which checks each section against its stage's dataclass.
    Raises: Mistake: a step of no stage, named as another is, or taking its values from nowhere; a family or its teacher
        that cannot be.
    """
    files = _files(overrides)
    found = dict(OWN_STEPS)
    for entry in itertools.chain.from_iterable(_settings("compress.steps", list, files, overrides)):
        if isinstance(entry, Mapping):
            step = _step(entry)
            known = found.setdefault(step.name, step)
            require(
                known == step,
                f"compress.steps: {step.name} is a step of stage {known.stage} already. Choose another name.",
            )
    *_, members = [[], *_settings("family", list, files, overrides)]
    *_, teacher = [family.FIRST, *_settings("family_teacher", object, files, overrides)]
    for name, (base, wiring) in family.wirings([str(member) for member in members], teacher).items():
        step = Step(name, base.replace("_", "-"), base, wiring)
        require(step.name not in found, f"family: {step.name} is another step already. Name the member otherwise.")
        found[step.name] = step
    for step in found.values():
        require(
            step.base is None or step.base in found,
            f"compress.steps: {step.name} takes its values from {step.base}, which is no step; "
            f"{did_you_mean(str(step.base), found)}",
        )
    return {name: _with_bases(step, found) for name, step in found.items()}


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


def _with_bases(step: Step, steps: Mapping[str, Step]) -> Step:
    chain = [step]
    while (base := chain[-1].base) is not None:
        names = [each.name for each in chain]
        require(
            base not in names,
            f"compress.steps: {' takes its values from '.join([*names, base])}, without an end. Give one its own.",
        )
        chain.append(steps[base])
    bases: tuple[Step, ...] = ()
    for each in reversed(chain[1:]):
        bases = (replace(each, bases=bases), *bases)
    return replace(step, bases=bases)


def _files(overrides: Sequence[str]) -> list[DictConfig]:
    """The recipe's file, behind those that it begins from."""
    folders = [conf_dir(), *config_dirs(overrides)]
    names = (each.removeprefix("recipe=") for each in overrides if each.startswith("recipe="))
    return [file for name in names for file in _with_defaults(name, folders)]


def _with_defaults(recipe: str, folders: Sequence[Path]) -> Iterator[DictConfig]:
    file = next((path for folder in folders if (path := folder / "recipe" / f"{recipe}.yaml").is_file()), None)
    content = None if file is None else OmegaConf.load(file)
    if not isinstance(content, DictConfig):
        return  # Hydra will say so in its own words
    for default in OmegaConf.select(content, "defaults") or ():
        if isinstance(default, str) and default != "_self_":
            yield from _with_defaults(Path(default).name, folders)
    yield content


def _settings(key: str, kind: type, files: Sequence[DictConfig], overrides: Sequence[str]) -> Iterator[Any]:
    """What `key` is set to by each of the files and by the command line, where it is of this kind: of another kind the
    schema says so."""
    found = [OmegaConf.select(file, key, throw_on_resolution_failure=False) for file in files]
    values = [
        OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for value in found if value is not None
    ]
    for override in overrides:
        if override.lstrip("+").startswith(f"{key}="):
            with contextlib.suppress(HydraException):  # Hydra will say so in its own words
                values += [parsed.value() for parsed in OverridesParser.create().parse_overrides([override])]
    yield from (value for value in values if isinstance(value, kind))


def config_dirs(overrides: Sequence[str]) -> Iterator[Path]:
    """Those of Hydra's option --config-dir, where a person's own recipes are."""
    for place, option in enumerate(overrides):
        name, _, value = option.partition("=")
        if name in ("--config-dir", "-cd"):
            yield Path(value or (overrides[place + 1] if place + 1 < len(overrides) else ""))


def chain_of(config: DictConfig) -> list[str]:
    """Names of a composed recipe's steps in their order; a family's are together, behind what stands among them.

    Raises: Mistake: members that cannot be told apart.
    """
    names = [_step(entry).name if isinstance(entry, Mapping) else str(entry) for entry in config.compress.steps]
    return family.spread(names, config)


def compose(overrides: Sequence[str], *, directory: Path | None = None) -> tuple[DictConfig, dict[str, Step]]:
    """The recipe that a command line names, with its overrides, and its steps. Raises: Mistake, Hydra's errors."""
    steps = steps_of(overrides)
    register_schema(steps)
    with hydra.initialize_config_dir(str(directory or conf_dir()), version_base="1.3"):
        config = hydra.compose(WIRING, list(overrides))
    follow_tables(config, steps)
    return config, steps


def follow_tables(config: DictConfig, steps: Mapping[str, Step]) -> None:
    """Give each step's tables (`prune.target`) the keys of its base's that they do not have; in a config that Hydra has
    composed otherwise than by `compose`.

    Were they interpolations, as other fields are, Hydra would merge a recipe's keys with what the base has by then, and
    what the command line gives the base would not be followed.
    """
    for step in sorted(steps.values(), key=lambda each: len(each.bases)):
        given = _given(step)
        for key in _tables(step.schema):
            own = f"{step.name}.{key}"
            if key.partition(".")[0] in given and not _is_reference(own, config):
                both: dict[Any, Any] = {}
                for table in (f"{step.bases[0].name}.{key}", own):
                    both |= dict(OmegaConf.select(config, table).items_ex(resolve=False))
                OmegaConf.update(config, own, both, merge=False, force_add=True)


@functools.cache
def _tables(schema: type) -> tuple[str, ...]:
    """Dotted keys of a dataclass's fields that are tables."""
    found: list[str] = []
    for name, kind in typing.get_type_hints(schema).items():
        if typing.get_origin(kind) is dict:
            found.append(name)
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found += [f"{name}.{inner}" for inner in _tables(kind)]
    return tuple(found)


def _is_reference(key: str, config: DictConfig) -> bool:
    """Whether a key, or a group that it is in, is that of another key, whole."""
    node: Any = config
    for part in key.split("."):
        if OmegaConf.is_interpolation(node, part):
            return True
        node = node[part]
    return False


def require_one_recipe(overrides: Sequence[str]) -> None:
    """Of a sweep all jobs have the same steps, as they are known before Hydra takes the values apart.

    Raises: Mistake: it sweeps over what names them.
    """
    named = [each for each in overrides if re.match(r"[+]*(recipe|family|family_teacher|compress\.steps)=", each)]
    for parsed in OverridesParser.create().parse_overrides(named):
        require(
            not parsed.is_sweep_override(),
            f"{parsed.input_line} sweeps over recipes or their steps; --multirun runs one recipe with several values. "
            "Start one command for each.",
        )


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
        ("family", list[str], field(default_factory=list)),
        ("family_teacher", str, family.FIRST),
        *((name, group, field(default_factory=group)) for name, group in _GROUPS.items()),
        ("compress", stages.CompressConfig, field(default_factory=stages.CompressConfig)),
        ("submit", stages.SubmitConfig, field(default_factory=stages.SubmitConfig)),
        ("slurm", SlurmConfig, field(default_factory=SlurmConfig)),
        ("plan", PlanConfig, field(default_factory=PlanConfig)),
        ("launcher", LauncherConfig, field(default_factory=LauncherConfig)),
    ]
    for step in steps.values():
        section = _section_schema(step)
        # a class as default: its fields are read, but no half-filled instance is made and checked
        fields.append((step.name, section, field(default=section)))
    ConfigStore.instance().store(name="schema", node=dataclasses.make_dataclass("Recipe", fields))


_DOORS = ("section", "overwrite", "verify_inputs", "compress", "submit", "slurm", "plan", "launcher")
_TOP = ("name", "run_dir", "family", "family_teacher", *_DOORS, *SHARED, "hydra")


def _given(step: Step) -> set[str]:
    """Fields that a step takes from its base."""
    if not step.bases:
        return set()
    hints, base = typing.get_type_hints(step.schema), step.bases[0].schema
    both = {name for name, kind in typing.get_type_hints(base).items() if hints.get(name) == kind}
    return both - set(SHARED) - ({"output"} if base is step.schema else {"output", "model", "plan"})


def _section_schema(step: Step) -> type:
    """The stage's dataclass less what stands at the top of a recipe, and without its checks, which run on the whole."""
    hints, given = typing.get_type_hints(step.schema), _given(step)
    own = []
    for each in dataclasses.fields(step.schema):
        if each.name in SHARED:
            continue
        if each.name == "output" and step.name not in OWN_STEPS:
            own.append((each.name, str, f"${{run_dir}}/{step.name}"))
        elif each.name in step.wiring:
            own.append((each.name, hints[each.name], step.wiring[each.name]))
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
    """Type and default of a field that is that of `key`, of a group field by field, so that each can be set alone; a
    table is filled later (`follow_tables`), as its keys are not known."""
    if typing.get_origin(kind) is dict:
        return kind, field(default_factory=dict)
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
