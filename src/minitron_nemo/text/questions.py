"""Multiple-choice questions from a JSONL file, scored by likelihood.

One question a line, in either form:

    {"context": "The trophy did not fit because it was too", "options": ["big", "small"], "answer": 0}
    {"sentence": "The trophy did not fit because _ was too big.", "option1": "it", "option2": "the case", "answer": "1"}

`answer` is an option's index from 0 or its text; in the second form, Winogrande's own, it counts from 1. The option is
scored after the context; where there is a blank, it is put there and the text after it is scored (partial evaluation).
Winogrande's blank is "_"; the first form has one where the question names it, `"blank": "___"`. The model's choice is
the option with the largest sum of log-likelihoods of the scored tokens; with `normalize`, divided by the number of
characters of the scored text.

Texts become tokens as in lm-evaluation-harness, so that accuracies compare: one space between context and continuation,
spaces at the context's end belong to the continuation, and the continuation's tokens are those the whole text has more
than the context alone, since a tokenizer may merge across the border. A question begins as a document does; an empty
context is the beginning-of-text token, or the end-of-text token where there is none. Few-shot examples, where wanted,
stand in the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.checks import NothingThere, require
from minitron_nemo.text.jsonl import read_jsonl

BLANK = "_"
_WINOGRANDE = ("sentence", "option1", "option2", "answer")
_OWN = ("context", "options", "answer")


@dataclass(frozen=True)
class Continuation:
    """A text whose last tokens are scored."""

    tokens: tuple[int, ...]
    num_scored: int
    num_characters: int
    """Of the scored text, for `normalize`."""


@dataclass(frozen=True)
class Question:
    options: tuple[Continuation, ...]
    answer: int


def read_questions(
    path: Path | str, encode: Callable[[str], list[int]], *, prefix: int, seq_length: int, key: str = "depth.task"
) -> list[Question]:
    """The file's questions as tokens.

    Args:
        encode: text -> token ids, as a document begins; see `Encoder.prompt`.
        prefix: what an empty context is.
        seq_length: tokens the model can read at once.
        key: the user's config key that named the path, for messages.
    Raises: FileNotFoundError; ValueError: names the file, the line and the key.
    """
    path = Path(path)
    require(path.is_file(), f"{key}={path} is not a file. Give a JSONL file, one question a line.", NothingThere)
    questions = []
    for where, record in read_jsonl(path, str(path), holds=f"the keys {', '.join(_OWN)}"):
        context, options, answer, blank = _parse(record, where)
        continuations = []
        for option in options:
            read, scored = _place(context, option, blank)
            continuation = tokenise(read, scored, encode, prefix, num_characters=len(scored.strip()))
            require(
                continuation.num_scored > 0,
                f"{where}: nothing is left to score for option {option!r}: the tokenizer gives context and text "
                "together no more tokens than the context alone. Change the border between them.",
            )
            require(
                len(continuation.tokens) - 1 <= seq_length,
                f"{where}: {len(continuation.tokens) - 1} tokens with option {option!r}, but the model reads at most "
                f"{seq_length}. Shorten the context.",
            )
            continuations.append(continuation)
        questions.append(Question(tuple(continuations), answer))
    require(len(questions) > 0, f"{key}={path} holds no question. Write one JSON object a line.")
    return questions


def _parse(record: dict[str, Any], where: str) -> tuple[str, list[str], int, str | None]:
    """Context, options, the answer's index from 0, and what marks the blank in the context, if it has one."""
    winogrande = "sentence" in record
    for key in _WINOGRANDE if winogrande else _OWN:
        require(
            key in record,
            f"{where} lacks {key}: a question has {', '.join(_OWN)}, or Winogrande's {', '.join(_WINOGRANDE)}.",
        )
    context = record["sentence" if winogrande else "context"]
    options = [record["option1"], record["option2"]] if winogrande else record["options"]
    require(isinstance(context, str), f"{where}: the {'sentence' if winogrande else 'context'} must be text.")
    require(
        isinstance(options, list)
        and len(options) >= 2
        and all(isinstance(option, str) and option.strip() for option in options)
        and len(set(options)) == len(options),
        f"{where}: options={options} must be at least two different texts.",
    )
    blank = BLANK if winogrande else record.get("blank")
    require(
        blank is None or (isinstance(blank, str) and blank != "" and context.count(blank) == 1),
        f"{where}: "
        + (f'a Winogrande sentence has exactly one blank "{BLANK}"' if winogrande else f"blank={blank!r} stands once")
        + f", this one has {context.count(blank) if isinstance(blank, str) and blank else 0}.",
    )
    return context, options, _index(record["answer"], options, 1 if winogrande else 0, where), blank


def _index(answer: Any, options: list[str], first: int, where: str) -> int:
    if answer in options:
        return options.index(answer)
    if first == 1 and isinstance(answer, str) and answer.isdigit():
        answer = int(answer)
    known = isinstance(answer, int) and not isinstance(answer, bool) and first <= answer < first + len(options)
    require(
        known,
        f"{where}: answer={answer!r} must be an option's number, {first} to {first + len(options) - 1}, or its text.",
    )
    return int(answer) - first


def _place(context: str, option: str, blank: str | None) -> tuple[str, str]:
    """What is read, and what is scored after it."""
    if blank is not None:
        before, after = context.split(blank)
        if after.strip():
            return before + option, " " + after.strip()
        context = before  # nothing stands after the blank: the option itself is scored
    context = context.rstrip(" ")
    return context, f" {option}" if context else option


def tokenise(
    context: str, scored: str, encode: Callable[[str], list[int]], prefix: int, *, num_characters: int
) -> Continuation:
    """Context and scored text as lm-evaluation-harness reads them; arguments as those of `read_questions`."""
    bare = context.rstrip()
    text = context[len(bare) :] + scored
    before, whole = encode(bare) if bare else [prefix], encode(bare + text)
    if not bare and whole[:1] != before:
        whole = before + whole
    return Continuation(tuple(whole), max(0, len(whole) - len(before)), num_characters)


def micro_batches(
    continuations: Sequence[Continuation], rows: int, *, multiple_of: int = 1, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """This data-parallel rank's share, longest first, in micro-batches of `rows` padded to their longest text.

    Every rank gets equally many; what fills them up has a loss_mask of 0 and no index.

    Args:
        multiple_of: what the padded length must be divisible by, to be split over ranks.
    Yields: the places of the rows in `continuations`, and tokens, labels, position_ids [b, s] int64 with the
        loss_mask [b, s] float32, 1 at the tokens whose label is scored; on the CPU.
    """
    order = sorted(range(len(continuations)), key=lambda place: -len(continuations[place].tokens))
    for first in range(0, len(order), rows * dp_size):
        length = len(continuations[order[first]].tokens) - 1
        length = -(-length // multiple_of) * multiple_of
        places = order[first : first + rows * dp_size][dp_rank * rows : (dp_rank + 1) * rows]
        text = torch.zeros(rows, length + 1, dtype=torch.int64)
        mask = torch.zeros(rows, length)
        for row, place in enumerate(places):
            continuation = continuations[place]
            size = len(continuation.tokens)
            text[row, :size] = torch.tensor(continuation.tokens)
            mask[row, size - 1 - continuation.num_scored : size - 1] = 1
        yield (
            places,
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": mask,
                "position_ids": torch.arange(length).repeat(rows, 1),
            },
        )


def accuracy(questions: Sequence[Question], log_likelihoods: Tensor, *, normalize: bool) -> Tensor:
    """Share of questions whose likeliest option is the answer.

    Args:
        log_likelihoods: [..., continuations], in the questions' order, all options of one after another.
    Returns: [...] float64. Of equally likely options the first counts as chosen.
    """
    correct = torch.zeros(log_likelihoods.shape[:-1], dtype=torch.float64, device=log_likelihoods.device)
    first = 0
    for question in questions:
        last = first + len(question.options)
        scores = log_likelihoods[..., first:last]
        if normalize:
            scores = scores / scores.new_tensor([option.num_characters for option in question.options])
        correct += scores.argmax(-1) == question.answer
        first = last
    return correct / len(questions)
