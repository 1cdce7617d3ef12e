"""Which tasks of lm-evaluation-harness a model is measured by, and how each is asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from minitron_nemo.checks import did_you_mean, require

PRESETS = ("papers", "quick")
CODE_TASKS = ("humaneval", "mbpp")


@dataclass(frozen=True)
class Asked:
    """One task as a preset asks it."""

    task: str
    num_fewshot: int
    metric: str
    """The one that is quoted, of those the task has."""
    changes: dict[str, object] = field(default_factory=dict)
    """Fields of the task's own config."""
    runs_code: bool = False
    """Whether scoring runs what the model wrote."""


_SAMPLED = {"do_sample": True, "temperature": 0.2, "top_p": 0.95}

PAPERS = (
    Asked("mmlu", 5, "acc"),
    Asked("winogrande", 5, "acc"),
    Asked("arc_challenge", 25, "acc_norm"),
    Asked("hellaswag", 10, "acc_norm"),
    Asked("gsm8k", 5, "exact_match"),
    Asked("truthfulqa_mc2", 0, "acc"),
    Asked("mbpp", 0, "pass_at_1", runs_code=True),
    Asked(
        "humaneval",
        0,
        "pass@1",
        changes={
            "repeats": 20,
            "generation_kwargs": {
                "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
                "max_gen_toks": 1024,
                **_SAMPLED,
            },
        },
        runs_code=True,
    ),
)
"""Of arXiv:2408.11796. Its XL-Sum (English) is no task of lm_eval 0.4.13."""
QUICK = (Asked("winogrande", 5, "acc"), Asked("arc_challenge", 25, "acc_norm"), Asked("hellaswag", 10, "acc_norm"))
QUICK_LIMIT = 200  # documents of each task


def require_metric(task: str, metric: str, known: Collection[str]) -> None:
    """Raises: ValueError: names those there are."""
    require(
        metric in known,
        f"evaluate.metrics: {task} has no {metric}; {did_you_mean(metric, known)}",
    )


def asked_by(preset: str | None) -> tuple[Asked, ...]:
    return {None: (), "papers": PAPERS, "quick": QUICK}[preset]
