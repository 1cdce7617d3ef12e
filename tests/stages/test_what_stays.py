"""What a step of a chain leaves in memory for the next one: nothing."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.ranks import Ranks
from support.tiny import quickstart_overrides
from support.tiny_run import TinyRun


def models_at_each_step(overrides: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Of a chain in this process: how many models there are when a step begins, and at the end."""
    from megatron.core.models.gpt import GPTModel

    from minitron_nemo import compress
    from minitron_nemo.recipe import compose

    found: dict[str, int] = {}

    def count(text: str) -> None:
        found[text.split()[-1]] = sum(type(each) is GPTModel for each in gc.get_objects())

    config, steps = compose(overrides)
    gc.collect()
    gc.disable()  # which would find some of them by chance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "say", count)
        patch.setattr(compress, "_close", lambda *_: None)
        try:
            compress.run(config, [steps[name] for name in names])
        finally:
            gc.enable()
    count("end")
    return found


def test_when_a_step_begins_the_models_of_the_one_before_are_gone(tiny_run: TinyRun, tmp_path: Path) -> None:
    names = ["evaluate_teacher", "estimate_importance", "prune", "distill"]
    overrides = quickstart_overrides(tmp_path, tiny_run.hf, tiny_run.directory / "corpus")
    made = {"import_hf": tiny_run.teacher, "prepare_data": tiny_run.data, "correct_teacher": tiny_run.teacher}
    overrides += [*(f"{name}.output={path}" for name, path in made.items()), "report.rows=[]"]
    ranks = Ranks()  # a process of its own, which imports NeMo in its first step
    try:
        (found,) = ranks("single").run(models_at_each_step, overrides, names)
    finally:
        ranks.close()
    assert found == dict.fromkeys([*names, "end"], 0)
