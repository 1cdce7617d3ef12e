"""Tables of what was measured beside held-out loss: by source, on tasks, in speed, on the way back, by a search.

Each is read from the artifacts as they are; one that no artifact knows of is not there.
"""

from __future__ import annotations

import json
from typing import Any

from minitron_nemo.artifact import Artifact
from minitron_nemo.checks import reading
from minitron_nemo.evaluation.comparison import compare
from minitron_nemo.report import pictures
from minitron_nemo.report.fits import fits
from minitron_nemo.report.histories import Curve
from minitron_nemo.report.run import Run
from minitron_nemo.report.sheet import Sheet
from minitron_nemo.report.table import UNKNOWN, count

_MEND = "Make the artifact again, or copy it again."


def sheets(run: Run, values: dict[str, Any]) -> list[Sheet]:
    """Those there are, in the order they are shown."""
    found = [_tasks(run, values), *_throughput(run), _recovery(run, values), _sources(run, values), _by_source(run)]
    found += [*fits(run), *_searches(run)]
    return [sheet for sheet in found if sheet.rows]


def _evaluated(run: Run, values: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, metrics of its evaluation)"""
    return [(row, run.evaluations[row["name"]].metrics) for row in values["rows"] if row["name"] in run.evaluations]


def _number(value: Any, form: str = "{:.3f}") -> str:
    return UNKNOWN if value is None else form.format(value)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def _tasks(run: Run, values: dict[str, Any]) -> Sheet:
    found = [(row, metrics["tasks"]) for row, metrics in _evaluated(run, values) if metrics.get("tasks")]
    names = list(dict.fromkeys(name for _, tasks in found for name in tasks))
    rows = []
    for row, tasks in found:
        cells = [_score(tasks[name]) if name in tasks else UNKNOWN for name in names]
        said = keeps(run, row["name"], values["reference_teacher"]) if row["name"] in run.students else None
        rows.append([row["label"], *cells, said or ""])
    first = {name: next(tasks[name] for _, tasks in found if name in tasks) for name in names}
    heads = [f"{name} ({each['metric']}, {_shots(each)})" for name, each in first.items()]
    remark = (
        "Scores of lm-evaluation-harness, ± one standard error. What a student keeps is the mean over the "
        "tasks that both were asked alike."
    )
    return Sheet("tasks", "Tasks", ["model", *heads, ""], rows, [remark])


def _shots(task: dict[str, Any]) -> str:
    shots = task.get("num_fewshot")
    return "as the task says" if shots is None else f"{shots}-shot"


def _score(task: dict[str, Any]) -> str:
    error = task.get("stderr")
    return f"{task['value']:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")


def keeps(run: Run, student: str, teacher: str | None) -> str | None:
    """`keeps 93% of the teacher at 55% of its parameters`; None where no task is known of both."""
    if teacher is None or student not in run.evaluations or teacher not in run.evaluations:
        return None
    of_student, of_teacher = (run.evaluations[name].metrics.get("tasks") or {} for name in (student, teacher))
    small, large = run.shape(student), run.shape(teacher)
    if not of_student or not of_teacher or small is None or large is None:
        return None
    said = compare(of_student, small.num_parameters, of_teacher, large.num_parameters).verdict
    return next((each[0].lower() + each[1:].rstrip(".") for each in said if each.startswith("Keeps")), None)


# ---- speed -----------------------------------------------------------------------------------------------------------


def _read_throughput(run: Run) -> list[dict[str, Any]]:
    return [_json(run.artifacts[name], "throughput.json") for name in run.lineage.made_by("throughput")]


def _throughput(run: Run) -> list[Sheet]:
    labels = {model.name: model.label for model in run.models}
    heads = ["model", "parameters", "engine", "batch", "prompt + new", "prefill tokens/s", "decode tokens/s",
             "first token (s)", "peak memory (GiB)"]  # fmt: skip
    found = []
    for number, measured in enumerate(_read_throughput(run)):
        rows = [
            [
                labels.get(_timed(run, row) or "", row["label"]), count(row["parameters"]),
                f"{row['engine']}, {row['dtype']}",
                f"{row['batch_size']}" + (" (largest)" if row.get("largest") else ""),
                f"{row['prompt_tokens']} + {row['new_tokens']}", _number(row["prefill_tokens_per_s"], "{:,.0f}"),
                _number(row["decode_tokens_per_s"], "{:,.1f}"), _number(row["time_to_first_token_s"]),
                _number(row["peak_memory_bytes"] and row["peak_memory_bytes"] / 2**30, "{:.2f}"),
            ]
            for row in measured["rows"]
        ]  # fmt: skip
        key = "speed" if number == 0 else f"speed-{number}"
        found.append(Sheet(key, "Speed", heads, rows, [f"Measured on {measured['machine']}.", *measured["remarks"]]))
    return found


def _timed(run: Run, row: dict[str, Any]) -> str | None:
    """The run's model that a row timed: of an export the one it was made from, of a folder the one it became."""
    imported = [name for name in run.lineage.made_by("import-hf") if _imported(run, name) == row["model"]]
    name = next(iter(imported), run.lineage.name_of(row["model"]))
    return None if name is None else run.lineage.nearest(name, [model.name for model in run.models])


def _imported(run: Run, name: str) -> str | None:
    folder = run.artifacts[name].manifest.get("config", {}).get("model")
    return None if folder is None else str(folder)


def speed_up(run: Run, student: str, teacher: str) -> list[str]:
    """How much faster the student decodes at the same batch and engine, where a model of its shape was measured."""
    for measured in _read_throughput(run):
        rows = [row for row in measured["rows"] if not row["largest"]]
        of_student, of_teacher = (
            next((row for row in rows if _is_of(run, row, name)), None) for name in (student, teacher)
        )
        if of_student is not None and of_teacher is not None:
            speed = of_student["decode_tokens_per_s"]
            batch, engine = of_student["batch_size"], of_student["engine"]
            times = speed / of_teacher["decode_tokens_per_s"]
            return [f"It writes {speed:,.0f} tokens/s at batch {batch} ({engine}), {times:.2f}x the teacher's."]
    return []


def _is_of(run: Run, row: dict[str, Any], name: str) -> bool:
    """Whether a row timed this model, or another of its shape, which is as fast."""
    timed, shape = _timed(run, row), run.shape(name)
    return timed is not None and (timed == name or (shape is not None and run.shape(timed) == shape))


# ---- the way back ----------------------------------------------------------------------------------------------------


def loss_of_cut(run: Run, name: str) -> float | None:
    """Held-out loss of the cut that a trained model started from; None where it is not known, or it is the cut."""
    if run.artifacts[name].stage == "prune" or run.artifacts[name].manifest.get("config", {}).get("like") is not None:
        return None
    cut = run.lineage.nearest(name, run.lineage.made_by("prune"))
    evaluation = run.evaluations.get(cut) if cut is not None else None
    loss = None if evaluation is None else evaluation.metrics.get("held_out_loss")
    return None if loss is None else float(loss)


def _recovery(run: Run, values: dict[str, Any]) -> Sheet:
    rows = []
    for row in values["rows"]:
        before = loss_of_cut(run, row["name"]) if row["name"] in run.students else None
        gap, tokens = row["gap_to_teacher"], row["tokens"]
        if before is None or gap is None or not tokens:
            continue
        lost = before - (row["held_out_loss"] - gap)
        share = f"{1 - gap / lost:.0%}" if lost > 0 else UNKNOWN
        rows.append(
            [row["label"], f"{lost:+.3f}", f"{gap:+.3f}", share, count(tokens), f"{1e6 * (lost - gap) / tokens:.3g}"]
        )
    heads = ["model", "gap after the cut", "gap now", "closed", "training tokens", "nats closed per million tokens"]
    remark = "The gap is to the teacher's held-out loss, in nats per token, and what closed it is the training named."
    return Sheet("recovery", "Recovery per token", heads, rows, [remark])


# ---- sources ---------------------------------------------------------------------------------------------------------


def _sources(run: Run, values: dict[str, Any]) -> Sheet:
    found = [(row, metrics.get("sources") or {}, metrics.get("kl")) for row, metrics in _evaluated(run, values)]
    names = list(dict.fromkeys(name for _, sources, _ in found for name in sources))
    if len(names) < 2 and all(kl is None for *_, kl in found):
        return Sheet("sources", "")
    rows = [
        [
            row["label"],
            *(
                _number(sources.get(name, {}).get(key))
                for name in names
                for key in ("held_out_loss", "kl")
            ),
        ]
        for row, sources, _ in found
        if sources
    ]  # fmt: skip
    heads = [f"{name}: {what}" for name in names for what in ("loss", "KL")]
    remark = (
        "Held-out loss and KL(teacher || model) of each source of the text, both in nats per token. Sources recover "
        "unevenly where the training text is not like the teacher's."
    )
    return Sheet("sources", "Loss and distance to the teacher by source", ["model", *heads], rows, [remark])


def _by_source(run: Run) -> Sheet:
    """From the first validation of a training to its last."""
    histories = {model.label: history for model in run.models if (history := run.history(model.name)) is not None}
    names = list(dict.fromkeys(name for history in histories.values() for name in history.source_losses))
    rows = [
        [
            label,
            *(
                _from_to(curves.get(name))
                for name in names
                for curves in (history.source_losses, history.source_divergences)
            ),
        ]
        for label, history in histories.items()
        if history.source_losses
    ]
    heads = [f"{name}: {what}" for name in names for what in ("loss", "distance")]
    remark = (
        "From a training's first validation to its last, in nats per token: the loss, and of a distillation the "
        "distance from the teacher."
    )
    return Sheet("by-source", "Training by source", ["model", *heads], rows, [remark])


def _from_to(curve: Curve | None) -> str:
    return UNKNOWN if curve is None else f"{_number(curve.values[0])} → {_number(curve.values[-1])}"


# ---- search ----------------------------------------------------------------------------------------------------------


def _searches(run: Run) -> list[Sheet]:
    return [_search(run.artifacts[name], number) for number, name in enumerate(run.lineage.made_by("search"))]


def _search(artifact: Artifact, number: int) -> Sheet:
    said = _json(artifact, "search.json")
    counts = " → ".join(f"{value:,} {what}" for what, value in said["counts"].items() if value is not None)
    remarks = [
        f"Sought: {said['target']}" + (f" ({', '.join(said['constraints'])})." if said["constraints"] else "."),
        f"Shapes: {counts}. The candidates trained on {count(said['tokens_spent'])} tokens in all.",
        f"The winner is {said['winner']}.",
    ]
    ranked = sorted(said["candidates"], key=lambda each: (each["rank"] is None, each["rank"] or 0))
    rows = [_candidate(each, said["winner"]) for each in ranked]
    heads = ["rank", "shape", "parameters", "memory", "first token (ms)", "next token (ms)", "loss after the cut",
             "loss after training", "tokens", "Pareto front"]  # fmt: skip
    key = "search" if number == 0 else f"search-{number}"
    return Sheet(key, "The search", heads, rows, remarks, pictures.search(key, said))


def _candidate(each: dict[str, Any], winner: Any) -> list[str]:
    first, following = each.get("time_to_first_token"), each.get("time_per_output_token")
    return [
        ("★ " if each["id"] == winner else "") + _number(each["rank"], "{}"),
        ", ".join(f"{name}={value}" for name, value in each["dims"].items()),
        count(each["parameters"]),
        _number(each.get("memory_bytes") and each["memory_bytes"] / 1e6, "{:,.1f} MB"),
        _number(first and 1e3 * first, "{:.2f}"),
        _number(following and 1e3 * following, "{:.2f}"),
        _number(each["loss_cut"]),
        _number(each["curve"][-1][1] if each["curve"] else None),
        count(each["tokens"]),
        "yes" if each["on_front"] else "",
    ]


def _json(artifact: Artifact, name: str) -> Any:
    with reading(artifact.path / name, _MEND):
        return json.loads((artifact.path / name).read_text(encoding="utf-8"))
