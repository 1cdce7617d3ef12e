"""The same text becomes the same ids, whether it is prepared, calibrated on or asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minitron_nemo.text.calibration import calibration_batches
from minitron_nemo.text.chats import read_chat
from minitron_nemo.text.corpus import Document
from minitron_nemo.text.documents import unmark
from minitron_nemo.text.encoding import Encoder
from minitron_nemo.text.questions import read_questions
from minitron_nemo.text.token_files import encode_documents
from minitron_nemo.text.tokenizer import load_tokenizer
from support.chats import CHATML, GENERATION, GROWING, chat_tokenizer

USER = {"role": "user", "content": "line 12?"}
ANSWER = {"role": "assistant", "content": "pay 3\n "}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}]}
TOOL = {"role": "tool", "content": "42"}
SYSTEM = {"role": "system", "content": "it's short"}
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
WITHOUT_END = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
PROMPT, TEXT = "<|im_start|>line 5", " pay 6<|im_end|>"


def encoder(path: Path, template: str | None = None, **options: Any) -> Encoder:
    rule = {key: options.pop(key) for key in ("special_tokens", "add_bos") if key in options}
    return Encoder(load_tokenizer(chat_tokenizer(path, template, **options)), **rule)


def parts(found: Encoder, document: Document) -> tuple[str, str]:
    """(what is read and not learned, what is learned), as text."""
    (stored,) = found([document])
    ids, learned = unmark(torch.from_numpy(stored))
    return found.tokenizer.decode(ids[learned == 0]), found.tokenizer.decode(ids[learned == 1])


def chat(found: Encoder, *messages: dict[str, Any], tools: Any = None) -> Document:
    read = read_chat([*messages], tools, "corpus: x, line 1")
    return Document(None, found.render(read), chat=read)


def test_special_tokens_stay_text_in_web_text_and_are_kept_in_prompts_and_chats(tmp_path: Path) -> None:
    found = encoder(tmp_path, CHATML)
    start, end = (found.tokenizer.convert_tokens_to_ids(f"<|im_{which}|>") for which in ("start", "end"))
    web, asked, talk = found([Document(None, PROMPT + TEXT), Document(None, TEXT, PROMPT), chat(found, USER, ANSWER)])
    assert not {start, end} & set(web.tolist())
    assert found.tokenizer.decode(web) == PROMPT + TEXT
    assert (asked[0], asked[-1]) == (-1 - start, end)
    assert -1 - start in talk and end in talk
    for rule, kept in (("keep", True), ("split", False)):
        found = encoder(tmp_path / rule, special_tokens=rule)
        for ids in found([Document(None, PROMPT + TEXT), Document(None, TEXT, PROMPT)]):
            assert (end in ids) == kept


def test_prepared_calibrated_and_asked_text_has_the_same_ids(tmp_path: Path) -> None:
    found = encoder(tmp_path, bos=True)
    (prepared,) = encode_documents([Document(None, TEXT, PROMPT)], found)
    ids = unmark(torch.from_numpy(prepared))[0].tolist()
    samples, task = tmp_path / "samples.jsonl", tmp_path / "task.jsonl"
    samples.write_text(json.dumps({"prompt": PROMPT, "response": TEXT}))
    task.write_text(json.dumps({"context": PROMPT, "options": [TEXT.strip(), "no"], "answer": 0}))
    (batch,) = calibration_batches(samples, found, seq_length=len(ids), micro_batch_size=1, num_samples=1)
    assert batch["tokens"][0].tolist() == ids
    (question,) = read_questions(task, found.prompt, prefix=found.prefix, seq_length=99)
    assert list(question.options[0].tokens) == ids[:-1]  # nothing closes an option


@pytest.mark.parametrize("bos", [True, False])
def test_a_document_begins_once_as_its_tokenizer_begins_a_text(tmp_path: Path, bos: bool) -> None:
    found = encoder(tmp_path / "own", bos=bos)
    first = found.tokenizer.bos_token_id
    plain, asked = found([Document(None, "line 7"), Document(None, "line 7", "<s>pay")])
    assert found.tokenizer("line 7").input_ids == plain.tolist()
    assert (plain[0] == first) == bos
    assert [-1 - asked[0], -1 - asked[1] == first] == [first, False]  # the prompt's own, not doubled
    other = encoder(tmp_path / "other", bos=bos, add_bos=not bos)
    assert (other([Document(None, "line 7")])[0][0] == first) == (not bos)


def test_a_chat_is_the_ids_of_its_template_and_begins_as_that_does(tmp_path: Path) -> None:
    for name, template in (("without", CHATML), ("with", "<s>" + CHATML)):
        found = encoder(tmp_path / name, template, bos=True)
        (stored,) = found([chat(found, SYSTEM, USER, ANSWER)])
        theirs = AutoTokenizer.from_pretrained(tmp_path / name).apply_chat_template([SYSTEM, USER, ANSWER])
        assert np.where(stored < 0, -1 - stored, stored).tolist() == theirs


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (CHATML, "pay 3\n <|im_end|>\n  42 it's<|im_end|>\n"),
        (GENERATION, "pay 3\n <|im_end|>  42 it's<|im_end|>"),
        (WITHOUT_END, "pay 3\n   42 it's"),
        (GROWING, "pay 3\n </s>  42 it's</s>"),
    ],
    ids=["growing", "generation", "generation without its end", "no prompt for an answer"],
)
def test_the_assistants_turns_are_learned_and_nothing_else(tmp_path: Path, template: str, written: str) -> None:
    found = encoder(tmp_path, template)
    read, learned = parts(found, chat(found, SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "  42 it's"}))
    assert learned == written
    assert "pay 3" not in read and read.count("line 12?") == 2 and "it's short" in read


def test_calls_and_tools_are_rendered_and_what_a_tool_answers_is_not_learned(tmp_path: Path) -> None:
    found = encoder(tmp_path, CHATML)
    document = chat(found, USER, CALL, TOOL, ANSWER, tools=TOOLS)
    read, learned = parts(found, document)
    assert "sum" in learned and "42" not in learned and "42" in read
    assert '"parameters"' in read


def test_a_template_that_rewrites_what_came_before_is_refused_with_the_record(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found = encoder(tmp_path, template)
    with pytest.raises(ValueError, match=r"corpus: x, line 1: the chat template of .* writes message 2 differently"):
        found([chat(found, USER, ANSWER, USER)])


def test_a_document_that_ends_itself_is_not_closed_twice(tmp_path: Path) -> None:
    found = encoder(tmp_path, eos="<|im_end|>")
    asked, plain = encode_documents([Document(None, TEXT, PROMPT), Document(None, TEXT)], found)
    assert [(ids[-2:] == found.end_of_text).tolist() for ids in (asked, plain)] == [[False, True]] * 2
