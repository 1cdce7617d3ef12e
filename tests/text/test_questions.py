"""Multiple-choice files become the tokens a likelihood is taken of, and a mistake in them is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.text.questions import Continuation, Question, accuracy, micro_batches, read_questions
from minitron_nemo.text.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["the trophy did not fit in the suitcase because the trophy was too big. it rained. "] * 20
END_OF_TEXT = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocab_size=280, output=path)
    return load_tokenizer(path)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def read(path: Path, encode: Any = characters, **values: Any) -> list[Question]:
    return read_questions(path, encode, prefix=END_OF_TEXT, seq_length=values.pop("seq_length", 200), **values)


def texts(continuation: Continuation) -> tuple[str, str]:
    """What is read, what is scored."""
    text = "".join(chr(token) for token in continuation.tokens)
    return text[: -continuation.num_scored], text[-continuation.num_scored :]


def test_a_blank_is_filled_and_the_text_after_it_scored(tmp_path: Path) -> None:
    own = {"context": "the ___ was too big. ", "options": ["cup", "case"], "answer": "case", "blank": "___"}
    winogrande = {"sentence": "the _ was too big. ", "option1": "cup", "option2": "case", "answer": "2", "qID": "x"}
    for question in read(write(tmp_path / "questions.jsonl", own, "", winogrande)):
        assert [texts(option) for option in question.options] == [
            ("the cup", " was too big."),
            ("the case", " was too big."),
        ]
        assert question.answer == 1
        assert [option.num_characters for option in question.options] == [12, 12]


def test_without_a_blank_the_option_is_scored_after_one_space(tmp_path: Path) -> None:
    path = write(
        tmp_path / "questions.jsonl",
        {"context": "it is", "options": ["big", "small"], "answer": 0},
        {"context": "it is ", "options": ["big", "small"], "answer": 0},
        {"context": "it is _", "options": ["big", "small"], "answer": 0, "blank": "_"},
        {"context": "a_b is", "options": ["big", "small"], "answer": 0},
        {"context": "", "options": ["big", "small"], "answer": 0},
    )
    read_texts = [texts(question.options[1]) for question in read(path)]
    assert read_texts == [("it is", " small")] * 3 + [("a_b is", " small"), (chr(END_OF_TEXT), "small")]


def test_an_underscore_of_a_context_is_no_blank(tmp_path: Path) -> None:
    (question,) = read(
        write(tmp_path / "questions.jsonl", {"context": "call read_text for", "options": ["a", "b"], "answer": 0})
    )
    assert [texts(option) for option in question.options] == [
        ("call read_text for", " a"),
        ("call read_text for", " b"),
    ]


def test_a_question_begins_as_a_document_does(tmp_path: Path) -> None:
    def encode(text: str) -> list[int]:
        return [END_OF_TEXT, *characters(text)]

    path = write(tmp_path / "questions.jsonl", GOOD, GOOD | {"context": ""})
    for question, context in zip(read(path, encode), ("a", ""), strict=True):
        assert texts(question.options[0]) == (chr(END_OF_TEXT) + context, " b" if context else "b")


def test_tokens_are_those_of_the_whole_text(tmp_path: Path, tokenizer: Any) -> None:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    path = write(
        tmp_path / "questions.jsonl",
        {"context": "the _ did not fit", "options": ["trophy", "suitcase"], "answer": 0, "blank": "_"},
        {"context": "the trophy because the ", "options": ["suitcase", "trophy"], "answer": 0},
    )
    blank, after = read(path, encode)
    for option, name in zip(blank.options, ("trophy", "suitcase"), strict=True):
        assert list(option.tokens) == encode(f"the {name} did not fit")
        assert tokenizer.decode(option.tokens[-option.num_scored :]) == " did not fit"
    assert list(after.options[0].tokens) == encode("the trophy because the suitcase")
    assert tokenizer.decode(after.options[0].tokens[-after.options[0].num_scored :]) == " suitcase"
    assert after.options[0].num_scored < len(" suitcase")  # merges were at work


def test_micro_batches_hold_every_continuation_once_on_some_rank() -> None:
    continuations = [
        Continuation(tuple(range(1, size + 1)), scored, scored) for size, scored in [(3, 1), (6, 4), (4, 3)]
    ]
    seen = []
    for dp_rank in range(2):
        share = list(micro_batches(continuations, 2, multiple_of=4, dp_rank=dp_rank, dp_size=2))
        assert len(share) == 1
        [(places, batch)] = share
        assert batch["tokens"].shape == (2, 8)  # the longest reads 5 tokens
        for row, place in enumerate(places):
            scored = batch["labels"][row][batch["loss_mask"][row] == 1].tolist()
            assert scored == list(continuations[place].tokens[-continuations[place].num_scored :])
            before = batch["tokens"][row][batch["loss_mask"][row] == 1].tolist()
            assert before == [token - 1 for token in scored]  # each is scored where the one before it is read
        assert batch["loss_mask"][len(places) :].sum() == 0
        seen += places
    assert sorted(seen) == [0, 1, 2]


def test_accuracy_counts_the_likeliest_options_and_normalises_by_characters() -> None:
    def option(characters: int) -> Continuation:
        return Continuation((1, 2), 1, characters)

    questions = [Question((option(2), option(8)), 1), Question((option(4), option(4), option(4)), 2)]
    likelihoods = torch.tensor([[-1.0, -2.0, -3.0, -2.0, -1.0], [-2.0, -1.0, -1.0, -2.0, -3.0]], dtype=torch.float64)
    assert accuracy(questions, likelihoods, normalize=False).tolist() == [0.5, 0.5]
    assert accuracy(questions, likelihoods, normalize=True).tolist() == [1.0, 0.5]


GOOD = {"context": "a", "options": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"questions.jsonl, line 2 is not JSON"),
        ([1], r"line 2 is not a JSON object with the keys context, options, answer"),
        ({"context": "a", "answer": 0}, r"line 2 lacks options"),
        ({"sentence": "a _ b", "option1": "c", "answer": "1"}, r"line 2 lacks option2"),
        (GOOD | {"context": 5}, r"line 2: the context must be text"),
        (GOOD | {"options": ["b"]}, r"line 2: options=\['b'\] must be at least two different texts"),
        (GOOD | {"options": ["b", "b"]}, r"must be at least two different texts"),
        (GOOD | {"answer": 2}, r"line 2: answer=2 must be an option's number, 0 to 1, or its text"),
        (GOOD | {"answer": "d"}, r"answer='d' must be an option's number, 0 to 1"),
        (GOOD | {"answer": True}, r"answer=True must be"),
        (
            {"sentence": "a _", "option1": "b", "option2": "c", "answer": ""},
            r"answer='' must be an option's number, 1 to",
        ),
        (GOOD | {"blank": "_"}, r"line 2: blank='_' stands once, this one has 0"),
        ({"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}, r'exactly one blank "_", this one has 0'),
        (GOOD | {"context": "a" * 9}, r"line 2: 10 tokens with option 'b', but the model reads at most 9"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_its_line(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "questions.jsonl", GOOD, record), seq_length=9)


def test_a_missing_or_empty_file_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"depth.task=.*none.jsonl is not a file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"depth.task=.*empty.jsonl holds no question"):
        read(write(tmp_path / "empty.jsonl", ""))


def test_a_tokenizer_that_leaves_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: nothing is left to score for option 'b'"):
        read(write(tmp_path / "questions.jsonl", GOOD), encode=lambda text: [1])
