"""What a person learns in a minute: which student speaks for the run, what was gained, what was lost, what it cost."""

from __future__ import annotations

from typing import Any

from minitron_nemo.report.bill import Bill
from minitron_nemo.report.run import Run
from minitron_nemo.report.sheets import keeps, loss_of_cut, speed_up
from minitron_nemo.report.table import count, size
from minitron_nemo.shape import ModelShape

GAINED, LOST, COST = "Gained", "Lost", "Cost"


def best_student(run: Run, values: dict[str, Any]) -> dict[str, Any] | None:
    """The student's row with the lowest held-out loss; where none is known, the first; None: there is no student."""
    rows = [row for row in values["rows"] if row["name"] in run.students]
    known = [row for row in rows if row["held_out_loss"] is not None]
    return min(known, key=lambda row: row["held_out_loss"]) if known else next(iter(rows), None)


def reference_teacher(run: Run, values: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher's row that students are measured against; where no loss is known, the last teacher's."""
    teachers = [model.name for model in run.models if model.is_teacher]
    rows = [row for row in values["rows"] if row["name"] in teachers]
    return next((row for row in rows if row["name"] == values["reference_teacher"]), rows[-1] if rows else None)


def headline(run: Run, values: dict[str, Any], bill: Bill) -> dict[str, list[str]]:
    """Sentences under `Gained`, `Lost` and `Cost`; those of which nothing is known are left out."""
    student, teacher = best_student(run, values), reference_teacher(run, values)
    found: dict[str, list[str]] = {GAINED: [], LOST: [], COST: bill.sentences}
    if student is not None and teacher is not None:
        found[GAINED] = [*_size(run, student, teacher), *speed_up(run, student["name"], teacher["name"])]
        found[LOST] = [*_loss(run, student, teacher), *_won_back(run, student, teacher), *_tasks(run, student, teacher)]
    return {title: sentences for title, sentences in found.items() if sentences}


def _size(run: Run, student: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    small, large = run.shape(student["name"]), run.shape(teacher["name"])
    if small is None or large is None:
        return []
    said = [
        f"{student['label']} has {count(small.num_parameters)} of {teacher['label']}'s {count(large.num_parameters)} "
        f"parameters ({small.num_parameters / large.num_parameters:.0%}).",
        f"Its weights take {size(2 * small.num_parameters)} instead of {size(2 * large.num_parameters)} in bf16.",
    ]
    caches = small.kv_bytes_per_token(), large.kv_bytes_per_token()
    if caches[0] != caches[1]:
        said.append(f"A token of context takes {size(caches[0])} instead of {size(caches[1])}.")
    return [*said, f"A token costs {_flops(small) / _flops(large):.0%} of the arithmetic (FLOPs of a forward pass)."]


def _flops(shape: ModelShape) -> int:
    return shape.flops_per_token(shape.seq_length)


def _loss(run: Run, student: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    if student["held_out_loss"] is None or teacher["held_out_loss"] is None:
        return []
    gap = student["held_out_loss"] - teacher["held_out_loss"]
    said = (
        f"Held-out loss is {student['held_out_loss']:.3f} nats per token instead of {teacher['held_out_loss']:.3f}, "
        f"{abs(gap):.3f} {'more' if gap >= 0 else 'less'}: perplexity {student['perplexity']:.2f} instead of "
        f"{teacher['perplexity']:.2f}."
    )
    kl = run.evaluations[student["name"]].metrics.get("kl")
    return [said] if kl is None else [said, f"Its predictions are {kl:.3f} nats (KL) away from its teacher's."]


def _won_back(run: Run, student: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    after_cut = loss_of_cut(run, student["name"])
    if after_cut is None or student["held_out_loss"] is None or teacher["held_out_loss"] is None:
        return []
    lost, left = after_cut - teacher["held_out_loss"], student["held_out_loss"] - teacher["held_out_loss"]
    if lost <= 0:
        return []
    return [
        f"The cut alone cost {lost:.3f}; training on {count(student['tokens'])} tokens won back {1 - left / lost:.0%} "
        "of that."
    ]


def _tasks(run: Run, student: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    sentence = keeps(run, student["name"], teacher["name"])
    return [f"{student['label']} {sentence}."] if sentence else []
