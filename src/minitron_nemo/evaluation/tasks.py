"""Tasks of lm_eval by name or from local YAML, built with their data; in one process.

A task's data files stand as lm_eval reads them: a path in `dataset_kwargs.data_files` goes from the folder in which the
command runs.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from minitron_nemo.checks import Mistake, NothingThere, did_you_mean, require
from minitron_nemo.config.evaluation import CODE_TASKS, Asked, require_metric

_FEWSHOT_SEED = 1234  # lm_eval's own default
KEY = "evaluate.tasks"
_NO_METRICS: Mapping[str, str] = {}
_FROM_FILES = ("json", "csv", "parquet", "text", "arrow")
"""What `dataset_path` says where a task's data are files."""


@dataclass(frozen=True)
class Built:
    """A task, or a group of them, as `TaskManager.load` gives it, and its metric that is quoted."""

    name: str
    loaded: dict[str, Any]
    metric: str | None
    notes: tuple[str, ...]
    """What a person who quotes the number must know."""


@dataclass(frozen=True)
class Wanted:
    """One entry of `evaluate.tasks` or of a preset, before its data is read."""

    name: str
    spec: str
    """A name or a YAML file, for `TaskManager.load`."""
    config: dict[str, Any]
    """What its YAML says, functions unresolved."""
    num_fewshot: int | None
    metric: str | None = None
    file: Path | None = None
    """Its YAML, where it is the user's own."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its config that are other than its YAML says."""
    runs_code: bool = False
    key: str = KEY
    """The user's config key that named it, for messages."""


def wanted(
    tasks: Sequence[str], asked: Sequence[Asked], num_fewshot: int | None, metrics: Mapping[str, str] = _NO_METRICS
) -> tuple[list[Wanted], TaskManager]:
    """What is asked for, in order; nothing is read but YAML.

    Args:
        num_fewshot, metrics: of `tasks`; the others say theirs.
    Raises: Mistake: no such task or file, or one that is no task.
    """
    files = {entry: _files_of(entry) for entry in tasks}
    named = [entry for entry, found in files.items() if not found]
    manager = TaskManager(include_defaults=bool(named or asked))
    index = manager.task_index
    for name in named:
        near = difflib.get_close_matches(name, index, n=3, cutoff=0.5)
        require(
            name in index,
            f"evaluate.tasks: {name} is neither a task of lm-evaluation-harness nor a YAML file or folder here"
            f"{f'; the nearest names are {_listed(near)}' if near else ''}. Correct evaluate.tasks.",
        )
    found = []
    for entry in tasks:
        if not files[entry]:
            config, metric = index[entry].cfg or {}, metrics.get(entry)
            found.append(Wanted(entry, entry, config, num_fewshot, metric, runs_code=_is_code(entry)))
        for file in files[entry]:
            each = wanted_of_file(file, num_fewshot)
            found.append(replace(each, metric=metrics.get(each.name)))
    found += [
        Wanted(
            by_preset.task,
            by_preset.task,
            index[by_preset.task].cfg or {},
            by_preset.num_fewshot,
            by_preset.metric,
            changes=by_preset.changes,
            runs_code=by_preset.runs_code,
        )
        for by_preset in asked
    ]
    names = [each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"evaluate.tasks: {twice} is named twice. Leave one of them out.")
    own = names[: len(names) - len(asked)]
    for name in metrics:
        require(name in own, f"evaluate.metrics: {name} is none of evaluate.tasks; {did_you_mean(name, own)}")
    return found, manager


def wanted_of_file(file: Path, num_fewshot: int | None = None, *, key: str = KEY) -> Wanted:
    """Raises: Mistake: it is no YAML of lm_eval's."""
    config = _read(file, key)
    name = str(config.get("task", config.get("group")))
    return Wanted(name, str(file), config, num_fewshot, file=file, runs_code=bool(config.get("unsafe_code")), key=key)


def _is_code(name: str) -> bool:
    return name.startswith(CODE_TASKS)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _files_of(entry: str) -> list[Path]:
    """YAML files of a path; none where `entry` is a name. Raises: Mistake: it is a path, and nothing is there."""
    path = Path(entry)
    if path.is_dir():
        files = [file for file in sorted(path.glob("*.yaml")) if {"task", "group"} & _read(file).keys()]
        require(bool(files), f"evaluate.tasks: {entry} is a folder without a task's YAML file.", NothingThere)
        return files
    if path.suffix in (".yaml", ".yml") or os.sep in entry:
        require(path.is_file(), f"evaluate.tasks: {entry} is not a file. Correct evaluate.tasks.", NothingThere)
        return [path]
    return []


def _read(file: Path, key: str = KEY) -> dict[str, Any]:
    try:
        config = load_yaml(file, resolve_func=False)
    except Exception as error:
        raise Mistake(f"{key}: {file} is no YAML that lm_eval reads ({_first_line(error)}).") from error
    require(isinstance(config, dict), f"{key}: {file} is no task: it holds no keys.")
    return config


def require_fit(every: Sequence[Wanted], *, run_code: bool) -> None:
    """Raises: Mistake: a task would run code, or its local data is not there."""
    for each in every:
        require(
            run_code or not each.runs_code,
            f"{each.key}: {each.name} runs on this machine what the model wrote. Set evaluate.run_code=true where "
            "that may be, or leave it out.",
        )
        for file in _data_files(each.config):
            require(
                file.exists(),
                f"{each.key}: {each.name} reads {file.absolute()}, which does not exist. Put the data there, or "
                "correct dataset_kwargs.data_files, which goes from the folder in which the command runs.",
                NothingThere,
            )


def _data_files(config: dict[str, Any]) -> Iterator[Path]:
    """Local files that a task's data is read from; patterns and addresses are left to `datasets`."""
    kwargs = config.get("dataset_kwargs") or {}
    is_local = config.get("dataset_path") in _FROM_FILES and not kwargs.get("data_dir")
    given = [kwargs.get("data_files")] if is_local else []
    while given:
        each = given.pop()
        if isinstance(each, dict | list):
            given += each.values() if isinstance(each, dict) else each
        elif isinstance(each, str) and "://" not in each and "*" not in each:
            yield Path(each)


def build(each: Wanted, manager: TaskManager) -> Built:
    """A task with its data. Raises: Mistake: its data cannot be had, or the task is broken."""
    where = " ".join(str(each.config[key]) for key in ("dataset_path", "dataset_name") if each.config.get(key))
    try:
        loaded = manager.load([each.spec])
    except Mistake:
        raise
    except (OSError, ValueError) as error:  # of `datasets`: ConnectionError, FileNotFoundError, and its own
        raise NothingThere(
            f"{each.key}: the data of {each.name} cannot be had ({_first_line(error)}). It looked for "
            f"{where or 'the data sets of its tasks'} in {_cache()}. Run once with HF_HUB_OFFLINE=0 where there "
            "is a network, here or with the cache copied here (HF_HOME), or give a local YAML with dataset_path: json."
        ) from error
    except Exception as error:
        raise Mistake(f"{each.key}: {each.name} cannot be built ({_first_line(error)}).") from error
    _require_metric(each, loaded)
    notes: list[str] = []
    for task in loaded["tasks"].values():
        for key, value in each.changes.items():
            task.set_config(key, value)
        _set_fewshot(task, each.num_fewshot)
        notes += _note(task)
    return Built(each.name, loaded, each.metric, tuple(dict.fromkeys(notes)))


def _require_metric(wanted: Wanted, loaded: dict[str, Any]) -> None:
    """Raises: Mistake: it has no metric of the name. Those of a function of the task's own show when it is over."""
    group = (loaded.get("groups") or {}).get(wanted.name)
    if group is not None:
        named = [each.metric for each in group.aggregate_metric_list or []]
    else:
        named = [each["metric"] for task in loaded["tasks"].values() for each in task.config.metric_list or []]
    if wanted.metric is not None and named and all(isinstance(name, str) for name in named):
        require_metric(wanted.name, wanted.metric, named)


def _cache() -> str:
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """As lm_eval's own command: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if (own is None or num_fewshot is not None) and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _note(task: Task) -> Iterator[str]:
    shots = task.get_config("num_fewshot") or 0
    if shots == 0:
        return
    config, examples = task.config, getattr(task, "fewshot_cfg", None)
    if examples is None or examples.samples is not None:
        return
    split = examples.split or config.training_split or config.validation_split or config.test_split
    if split == (config.test_split or config.validation_split):
        yield (
            f"{task.task_name} has no split for examples: its {shots} examples before each question come from "
            f"{split}, which it is measured on; lm_eval leaves out the question itself alone."
        )


def groups_of(built: Built) -> dict[str, Group]:
    groups: dict[str, Group] = built.loaded.get("groups") or {}
    return groups


def say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"    {note}", file=sys.stderr, flush=True)
