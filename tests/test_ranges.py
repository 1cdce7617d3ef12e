"""Every number of every stage says beside its field what it may be, and is refused in words where it is not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_nemo.checks import Mistake
from minitron_nemo.config.ranges import LARGEST, Range, range_of
from minitron_nemo.config.slurm import SlurmConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.mistakes import explain
from minitron_nemo.recipe import OWN_STEPS, SHARED, STAGES, compose, config_of

TRIED = (0, -1, math.nan, math.inf, HUGE := 10**18, 1.5)


def numbers_of(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any], str]]:
    """(key below the section, its dataclass, field, type in words) of all numbers: alone, in lists and in dicts."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from numbers_of(hints[field.name], f"{prefix}{field.name}.")
        elif re.search(r"\b(int|float)\b", str(hints[field.name])):
            yield prefix + field.name, schema, field, str(hints[field.name])


def lies_within(value: float, limits: Range) -> bool:
    whole = isinstance(value, int) and limits.at_most is None
    sides = [(limits.at_least, value.__ge__), (limits.above, value.__gt__), (limits.at_most, value.__le__)]
    sides += [(limits.below, value.__lt__), (LARGEST if whole else None, value.__le__)]
    return math.isfinite(value) and all(holds(type(value)(side)) for side, holds in sides if side is not None)


def as_given(kind: str, number: float) -> Any:
    given: Any = {"hidden_size": number} if "dict" in kind else number
    for _ in range(kind.count("list")):
        given = [given]
    return given


def refusal(make: Callable[[], Any]) -> str | None:
    """What a person hears; None: nothing."""
    try:
        make()
    except (Mistake, OmegaConfBaseException) as error:
        return explain(error, "compress", [])
    return None


@pytest.fixture(scope="module")
def recipe() -> DictConfig:
    return compose(["recipe=quickstart"])[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_number_that_means_nothing_is_refused_by_its_whole_key_its_value_and_its_limit(
    stage: str, recipe: DictConfig
) -> None:
    step = OWN_STEPS[stage.replace("-", "_")]
    for below, group, field, kind in numbers_of(STAGES[stage]):
        limits = range_of(field)
        assert limits is not None, f"{below} of {stage} has no range beside its field"
        for number in TRIED:
            if "int" not in kind:
                number = float(number)
            elif isinstance(number, float):
                continue  # OmegaConf's to refuse, as below
            heard = refusal(functools.partial(group, **{field.name: as_given(kind, number)}))
            if lies_within(number, limits):
                assert heard is None or below in heard, (below, number, heard)  # another key may stand against it
            else:
                limit = (
                    "finite" if not math.isfinite(number) else str(limits) if number <= LARGEST else "(at most|below) "
                )
                said = rf"^{re.escape(below)}[^ ]*={re.escape(str(number))} must be .*{limit}"
                assert heard is not None and re.search(said, heard), (below, number, heard)

        key = below if below.split(".")[0] in SHARED else f"{step.name}.{below}"  # as a person types it
        parent, name = OmegaConf.select(recipe, key.rpartition(".")[0]) if "." in key else recipe, key.split(".")[-1]
        before = copy.deepcopy(parent._get_node(name))  # as it is written, an interpolation or not
        for number in (math.nan, -HUGE):

            def typed(number: float = number, key: str = key, kind: str = kind) -> None:
                OmegaConf.update(recipe, key, as_given(kind, number), merge=False)
                config_of(step, recipe)

            heard = refusal(typed)
            assert heard is not None and re.match(rf"(data\.)?{re.escape(key)}[^ ]*[=:]", heard), (key, heard)
            parent._set_item_impl(name, copy.deepcopy(before))


def test_every_number_asked_of_slurm_has_a_range() -> None:
    assert [key for key, _, field, _ in numbers_of(SlurmConfig) if range_of(field) is None] == []
    with pytest.raises(ValueError, match=r"slurm.nodes=0 must be at least 1; the default is 1\."):
        SlurmConfig(nodes=0)


def test_a_rate_that_would_never_arrive_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"training.optim.warmup_steps=40 is more than training.steps=20: the learning"
    ):
        TrainingConfig(steps=20, optim=OptimConfig(warmup_steps=40))
    with pytest.raises(ValueError, match=r"training.optim.decay_steps=8 after training.optim.warmup_steps=3 is more"):
        TrainingConfig(steps=10, optim=OptimConfig(warmup_steps=3, schedule="wsd", decay_steps=8))
    TrainingConfig(steps=3, optim=OptimConfig(warmup_steps=3))


def test_the_keys_of_a_step_of_ones_own_are_named_by_its_name() -> None:
    again = "compress.steps=[{stage: distill, name: again, from: distill}]"
    config, steps = compose(["recipe=quickstart", again, "again.training.optim.clip_grad=-1"])
    with pytest.raises(Mistake, match=r"^again.training.optim.clip_grad=-1.0 must be at least 0; the default is 1.0"):
        config_of(steps["again"], config)
