"""Tasks one after another on a model: what is over is kept, what is asked is the same on every rank.

A finished task stands in `<output>.unfinished` at once, beside the config and the digest of the model, so that neither
a stop nor a kill asks it again and no other model gets its answers. (lm_eval's own --use_cache knows an answer by the
question's text alone: a student that is evaluated with a teacher's cache gets the teacher's.)
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from minitron_nemo import platform
from minitron_nemo.checks import Interrupted
from minitron_nemo.config.evaluation import QUICK_LIMIT, asked_by, require_metric
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.parallel import rank_zero_leads, rank_zero_works
from minitron_nemo.resuming import Unfinished
from minitron_nemo.stopping import Stop

Results = dict[str, dict[str, Any]]
"""Entry of `evaluate.tasks` -> {"tasks": {task: a headline}, "all": lm_eval's own results, "notes": [...]}."""


def evaluate_core(config: EvaluateConfig, source: Any, core: Any, tokenizer: Any, unfinished: Unfinished) -> Results:
    """Every task on our model, which lies on its layout. Every rank calls; all get the results.

    Args:
        source: the model's `ModelInput`.
    Communicates: all ranks. Raises: Interrupted, on every rank: told to stop. Mistake: a task does not work.
    """
    with at_work():
        from minitron_nemo.evaluation import models

        stop = Stop()

        def after(done: int, total: int) -> None:
            if done < total and stop.asked():
                raise Interrupted(
                    "stopped within a task, as it was asked to; tasks that were over are kept in "
                    f"{unfinished.directory}. The same command goes on after them."
                )

        def between(over: str) -> None:
            if Stop().asked():
                raise Interrupted(
                    f"stopped after {over}, as it was asked to; it is kept in {unfinished.directory}. The same command "
                    "goes on there."
                )

        answer = partial(
            models.take_part,
            core=core,
            tokenizer=tokenizer,
            rows=config.batch_size,
            vocab_size=source.vocab_size,
            after=after,
        )

        def take_part(task: Any) -> Any:
            return between(task) if isinstance(task, str) else answer(task)

        def lead(together: Callable[[Any], Any]) -> Results:
            lm = models.MegatronLM(together, tokenizer, source.shape.seq_length, named_template(config))
            return _each_task(config, lm, unfinished, together)

        return rank_zero_leads(lead, take_part)


def evaluate_hf(config: EvaluateConfig, unfinished: Unfinished) -> Results:
    """Every task on a Hugging Face folder, by lm_eval's own class in one process. Every rank calls."""

    def work() -> Results:
        with at_work():
            from minitron_nemo.evaluation.models import HuggingFace

            precision = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}[config.trainer.precision]
            lm = HuggingFace(
                pretrained=config.model,
                device=str(platform.device()),
                dtype=precision,
                batch_size=config.batch_size,
                chat_template_args={"chat_template": named_template(config)},
            )
            return _each_task(config, lm, unfinished)

    return rank_zero_works(work)


def _each_task(
    config: EvaluateConfig, lm: Any, unfinished: Unfinished, between: Callable[[str], Any] = lambda over: None
) -> Results:
    """In one process; `between` is called with what is over, before the next task begins."""
    from minitron_nemo.evaluation import tasks as of

    every, manager = of.wanted(config.tasks or (), asked_by(config.preset), config.num_fewshot, config.metrics)
    of.require_fit(every, run_code=config.run_code)
    limit = QUICK_LIMIT if config.limit is None and config.preset == "quick" else config.limit
    results: Results = {}
    for each in every:
        if each.name in unfinished.records:
            results[each.name] = unfinished.records[each.name]
            continue
        if results:
            between(next(reversed(results)))
        with _code_may_run(config.run_code):
            results[each.name] = _one_task(config, lm, each, manager, limit)
        unfinished.keep(each.name, results[each.name])
    return results


def _one_task(config: EvaluateConfig, lm: Any, each: Any, manager: Any, limit: Any) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    from minitron_nemo.evaluation import tasks as of

    random.seed(0)  # as lm_eval's own command, for tasks that draw their documents
    np.random.seed(1234)
    built = of.build(each, manager)
    of.say(built.notes)
    templated = config.chat_template is not None
    found = evaluate(
        lm=lm,
        task_dict=built.loaded,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        apply_chat_template=templated,  # which one, the model knows
        fewshot_as_multiturn=templated,
        confirm_run_unsafe_code=config.run_code,
    )
    return {"tasks": _headlines(built, found), "all": _plain(found), "notes": list(built.notes)}


def _headlines(built: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Of each task that was named (of a group, the group's own): the metric that is quoted."""
    whole = {**found["results"], **(found.get("groups") or {})}
    names = [built.name] if built.name in whole else list(found["results"])
    return {name: headline for name in names if (headline := _headline(name, built.metric, found, whole)) is not None}


_NORMED = ("arc_", "hellaswag")  # tasks whose acc_norm is quoted, as in the papers


def _headline(name: str, metric: str | None, found: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any] | None:
    keys: dict[str, str] = {}
    for key in whole[name]:  # <metric>,<filter>; of several filters the first
        known, comma, _ = key.partition(",")
        if comma and not known.endswith("_stderr"):
            keys.setdefault(known, key)
    if not keys:
        return None
    first = "acc_norm" if name.startswith(_NORMED) and "acc_norm" in keys else next(iter(keys))
    require_metric(name, metric or first, keys)
    quoted = metric or first
    answers = keys[quoted].partition(",")[2]
    stderr = whole[name].get(f"{quoted}_stderr,{answers}")
    below = (found.get("group_subtasks") or {}).get(name) or [name]
    counts = [found["n-samples"][each]["effective"] for each in _leaves(below, found)]
    shots = {found["n-shot"][each] for each in _leaves(below, found) if each in found["n-shot"]}
    better = found["higher_is_better"].get(name) or {}
    return {
        "metric": quoted,
        "value": float(whole[name][keys[quoted]]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "higher_is_better": bool(better.get(quoted, True)),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "samples": sum(counts),
    }


def _leaves(names: Sequence[str], found: dict[str, Any]) -> list[str]:
    below = found.get("group_subtasks") or {}
    leaves: list[str] = []
    for name in names:
        inner = below.get(name)
        leaves += _leaves(inner, found) if inner else [name]
    return [name for name in leaves if name in found["n-samples"]]


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """lm_eval's numbers as JSON."""
    wanted = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
    return {key: _json(found[key]) for key in wanted if key in found}


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def named_template(config: EvaluateConfig) -> str | None:
    """What transformers calls the chat template; None: the default."""
    return None if config.chat_template == "default" else config.chat_template


@contextmanager
def _code_may_run(allowed: bool) -> Iterator[None]:
    """`evaluate`, which runs what a model wrote, asks the environment whether it may, when it is loaded already."""
    before = os.environ.get(_MAY_RUN)
    if allowed:
        os.environ[_MAY_RUN] = "1"
    try:
        yield
    finally:
        if allowed:
            del os.environ[_MAY_RUN]
            os.environ |= {} if before is None else {_MAY_RUN: before}


_MAY_RUN = "HF_ALLOW_CODE_EVAL"


@contextmanager
def at_work() -> Iterator[None]:
    """lm_eval, datasets and their friends keep still."""
    import datasets
    from tqdm.std import tqdm

    begin = tqdm.__init__
    tqdm.__init__ = lambda self, *given, **options: begin(self, *given, **(options | {"disable": True}))
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tqdm.__init__ = begin
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
