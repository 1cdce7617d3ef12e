"""Multiple-choice questions from a JSONL file, or of a task of lm_eval's from YAML.

Of a task, its documents, prompts, examples, choices and answers are lm_eval's own, so that importance and training
count what `evaluate` does. What is longer than the model reads is cut at its beginning, as there.

Communication: of a task all ranks, as rank 0 alone runs lm_eval.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from minitron_nemo.checks import NothingThere, require
from minitron_nemo.evaluation.run import at_work
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.text.encoding import Encoder
from minitron_nemo.text.questions import Continuation, Question, read_questions, tokenise


def open_questions(path: Path | str, encoder: Encoder, *, seq_length: int, key: str) -> list[Question]:
    """Every rank calls and gets the same.

    Args:
        seq_length: tokens the model can read at once.
        key: the user's config key that named the path, for messages.
    Raises: FileNotFoundError; ValueError: names the file and the key.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        return read_questions(path, encoder.prompt, prefix=encoder.prefix, seq_length=seq_length, key=key)
    return rank_zero_works(partial(_of_task, path, encoder, seq_length, key))


def _of_task(file: Path, encoder: Encoder, seq_length: int, key: str) -> list[Question]:
    require(file.is_file(), f"{key}={file} is not a file. Give a task's YAML or a JSONL file.", NothingThere)
    with at_work():
        from lm_eval.tasks import TaskManager

        from minitron_nemo.evaluation.tasks import build, require_fit, say, wanted_of_file

        wanted = wanted_of_file(file, key=key)
        require_fit([wanted], run_code=False)
        built = build(wanted, TaskManager(include_defaults=False))
        say(built.notes)
        tasks = list(built.loaded["tasks"].values())
        kinds = [task.OUTPUT_TYPE for task in tasks]
        require(
            kinds == ["multiple_choice"],
            f"{key}={file} must be one task of output_type multiple_choice, not {', '.join(kinds) or 'none'}.",
        )
        (task,) = tasks
        task.build_all_requests(rank=0, world_size=1)
        asked: dict[int, list[Any]] = {}
        for instance in task.instances:
            asked.setdefault(instance.doc_id, []).append(instance)
        return [_question(task, instances, encoder, seq_length, f"{key}={file}") for instances in asked.values()]


def _question(task: Any, instances: list[Any], encoder: Encoder, seq_length: int, where: str) -> Question:
    instances = sorted(instances, key=lambda instance: instance.idx)
    document, choices = instances[0].doc, task.doc_to_choice(instances[0].doc)
    require(
        len(instances) == len(choices),
        f"{where} asks for {len(instances)} likelihoods of {len(choices)} choices, as acc_mutual_info does. Take that "
        "metric out of its metric_list.",
    )
    options = []
    for instance, choice in zip(instances, choices, strict=True):
        context, scored = instance.args
        whole = tokenise(context, scored, encoder.prompt, encoder.prefix, num_characters=len(choice))
        require(
            0 < whole.num_scored <= seq_length,
            f"{where}: {whole.num_scored} tokens are to be scored for {choice!r:.80}, and it must be 1 to "
            f"{seq_length}, what the model reads at once. Take the question out.",
        )
        tokens = whole.tokens[-(seq_length + 1) :]
        options.append(Continuation(tokens, whole.num_scored, whole.num_characters))
    return Question(tuple(options), _answer(task, document, len(options), where))


def _answer(task: Any, document: Any, options: int, where: str) -> int:
    """The option that lm_eval counts as right where it is the likeliest."""
    right = []
    for place in range(options):
        likelihoods = [(0.0 if other == place else -1.0, False) for other in range(options)]
        right += [place] if task.process_results(document, likelihoods).get("acc") == 1 else []
    require(
        len(right) == 1,
        f"{where}: a question has {len(right)} right answers by the task's acc, and must have one. It needs acc in its "
        "metric_list, and a doc_to_target that is one choice.",
    )
    return right[0]
