"""From a corpus to token files: nothing lost, nothing leaked, the same every time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.stages import PrepareDataConfig
from minitron_nemo.stages.prepare_data import check, run
from minitron_nemo.text.blend import require_documents_end_once
from minitron_nemo.text.corpus import STDLIB_LICENCE, Source
from minitron_nemo.text.tokenizer import load_tokenizer, train_tokenizer
from minitron_nemo.text.tokenizer_files import tokenizer_digest
from support.chats import CHATML, chat_tokenizer
from support.prepared import decoded, documents


def test_every_document_is_in_one_split_with_its_text_intact(data_config, prepared):
    train, validation = decoded(prepared, "train"), decoded(prepared, "validation")
    assert sorted(train + validation) == sorted(each.text for each in Source(data_config.corpus).documents())
    assert len(train) == prepared.facts["train_documents"]
    assert len(validation) == prepared.facts["validation_documents"] > 0


def test_no_text_is_in_both_splits_though_some_come_twice(prepared):
    train, validation = decoded(prepared, "train"), decoded(prepared, "validation")
    assert not set(train) & set(validation)
    everything = train + validation
    assert len(set(everything)) == prepared.facts["different_texts"] < len(everything)


def test_the_end_of_text_closes_each_document_and_appears_nowhere_else(prepared):
    for split in ("train", "validation"):
        for ids in documents(prepared, split):
            assert ids[-1] == 0
            assert 0 not in ids[:-1]  # also where the text spells <|endoftext|>


def test_facts_count_the_tokens_that_are_there(prepared):
    for split in ("train", "validation"):
        assert prepared.facts[f"{split}_tokens"] == sum(map(len, documents(prepared, split)))
    assert prepared.facts["vocab_size"] == 384
    assert prepared.facts["tokenizer_digest"] == tokenizer_digest(prepared.path / "tokenizer")
    assert (prepared.path / "train.bin").stat().st_size == 2 * prepared.facts["train_tokens"]  # uint16


def test_two_runs_write_the_same_bytes_and_another_seed_another_order(data_config, prepared, tmp_path):
    again = run(dataclasses.replace(data_config, output=str(tmp_path / "again")))
    files = [name for name in prepared.manifest["files"] if name != "manifest.json"]
    assert {"train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer/tokenizer.json"} <= set(files)
    for name in files:
        assert (again.path / name).read_bytes() == (prepared.path / name).read_bytes(), name
    other = run(dataclasses.replace(data_config, output=str(tmp_path / "other"), seed=7))
    assert decoded(other, "train") != decoded(prepared, "train")
    assert sorted(decoded(other, "train")) == sorted(decoded(prepared, "train"))


def test_the_tokenizer_has_seen_the_training_split_only(data_config, prepared, tmp_path):
    held_out = set(decoded(prepared, "validation"))
    texts = [each.text for each in Source(data_config.corpus).documents() if each.text not in held_out]
    train_tokenizer(texts, vocab_size=384, output=tmp_path)
    assert tokenizer_digest(tmp_path) == prepared.facts["tokenizer_digest"]


def test_a_given_tokenizer_is_used_and_kept(prepared, blended):
    assert blended.facts["tokenizer_digest"] == prepared.facts["tokenizer_digest"]
    assert (blended.path / "tokenizer" / "tokenizer.json").is_file()


def test_the_embedded_corpus_states_its_licence(tmp_path, prepared, monkeypatch):
    few = [(name, file) for name, file in Source("stdlib").files() if name.startswith(("json/", "email/"))]
    monkeypatch.setattr("minitron_nemo.text.corpus._stdlib_files", lambda: few)  # the whole takes half a minute
    artifact = run(PrepareDataConfig(output=str(tmp_path / "data"), tokenizer=str(prepared.path / "tokenizer")))
    assert (artifact.facts["corpus"], artifact.facts["licence"]) == ("stdlib", STDLIB_LICENCE)


@pytest.mark.parametrize(
    ("texts", "fraction", "message"),
    [
        ([], 0.1, "is a folder without files"),
        (["", "  \n"], 0.1, "is empty: no file or record in it holds more than white space"),
        (["a", "b"], 1e-9, "validation_fraction=1e-09 holds out none of 2 documents. Raise validation_fraction"),
        (["good", b"\xff"], 0.1, "is not UTF-8 text"),
        (["equal words"] * 9, 0.5, "validation takes all of its documents .9.. Add documents or lower validation_f"),
    ],
)
def test_a_corpus_that_cannot_be_used_leaves_nothing_behind(tmp_path, texts, fraction, message):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(texts):
        (corpus / f"document{number + 1}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        run(PrepareDataConfig(output=str(tmp_path / "data"), corpus=str(corpus), validation_fraction=fraction))
    assert sorted(tmp_path.iterdir()) == [corpus]


def test_a_failed_run_leaves_the_older_artifact_as_it_was(data_config, prepared, tmp_path):
    digest = prepared.digest
    with pytest.raises(ValueError, match="vocab_size=60000 is more than this corpus can fill"):
        run(dataclasses.replace(data_config, vocab_size=60_000))
    assert open_artifact(prepared.path).digest == digest
    assert not prepared.path.with_name("data.partial").exists()


def test_a_wrong_config_says_so_at_once():
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 257"):
        PrepareDataConfig(vocab_size=100)
    with pytest.raises(ValueError, match=r"validation_fraction=0.9 must be above 0 and at most 0.5"):
        check(PrepareDataConfig(validation_fraction=0.9))
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        PrepareDataConfig(seed=-1)


def test_prompt_and_answer_read_one_after_the_other_are_the_document(instructions):
    tokenizer = load_tokenizer(instructions.path / "tokenizer")
    texts = []
    for split in ("train", "validation"):
        for ids in documents(instructions, split):
            prompt = [-1 - token for token in ids if token < 0]
            assert ids[: len(prompt)] == [-1 - token for token in prompt]
            texts.append(tokenizer.decode([*prompt, *ids[len(prompt) : -1]]))
    assert len(texts) == 80
    assert sorted(texts)[0] == "Q 0\nA: 0 times yes "


def test_a_missing_prompt_key_is_named(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"promt": "a", "text": "b"}) + "\n")
    with pytest.raises(ValueError, match="has no key prompt_key=prompt; did you mean promt"):
        run(PrepareDataConfig(output=str(tmp_path / "out"), corpus=str(tmp_path / "chat.jsonl"), prompt_key="prompt"))


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


def chat_records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"line {number}?"},
                {"role": "assistant", "content": f"pay {number}"},
            ]
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "strings"])
def test_chats_are_written_by_the_tokenizers_template_and_the_assistant_is_learned(tmp_path: Path, kind: str) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    records: list[dict[str, Any]] = chat_records(60)
    if kind == "jsonl":
        corpus = write_lines(tmp_path / "chats.jsonl", *records)
    else:
        import pyarrow
        import pyarrow.parquet

        if kind == "strings":
            records = [{"messages": json.dumps(each["messages"])} for each in records]
        else:
            records[0]["messages"][1] |= {"tool_calls": [{"name": "f"}]}  # gives every message this key
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chats.parquet")
        corpus = tmp_path / "chats.parquet"
    artifact = run(
        PrepareDataConfig(
            output=str(tmp_path / "data"), corpus=str(corpus), tokenizer=str(tokenizer), validation_fraction=0.3
        )
    )
    read = load_tokenizer(tokenizer)
    answers = []
    for split in ("train", "validation"):
        for ids in documents(artifact, split):
            learned = read.decode([token for token in ids if token >= 0])
            answers.append(int(learned.split("pay ")[1].split("<")[0].split("{")[0]))
            assert f"user\nline {answers[-1]}?" in read.decode([-1 - token for token in ids if token < 0])
    assert sorted(answers) == list(range(60))
    assert artifact.facts["sources"][0]["chats"] == 60
    assert (artifact.facts["special_tokens"], artifact.facts["begins_with"]) == ("auto", None)


def test_no_chat_is_in_both_splits(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    corpus = write_lines(tmp_path / "chats.jsonl", *chat_records(30) * 3)
    artifact = run(
        PrepareDataConfig(
            output=str(tmp_path / "data"), corpus=str(corpus), tokenizer=str(tokenizer), validation_fraction=0.3
        )
    )
    train, validation = ({tuple(ids) for ids in documents(artifact, split)} for split in ("train", "validation"))
    assert len(train) + len(validation) == 30 == artifact.facts["different_texts"]
    assert not train & validation


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "no list"}, r"line 41: messages are a string that is not JSON"),
        ({"messages": {"role": "user"}}, r"line 41: messages are dict, not a list of messages"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"line 41: message 1 has no role"),
        ({"messages": [{"role": "user", "content": 5}]}, r"line 41: the content of message 1 is int, not text"),
        ({"messages": [{"role": "assistant", "content": "raise"}]}, r"line 41: the chat template of .* refuses"),
        ({"conversation": []}, r"line 41 has no key text_key=text"),
    ],
)
def test_a_broken_chat_is_named_by_its_line(tmp_path: Path, record: Any, message: str) -> None:
    template = "{% if messages[0].content == 'raise' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template)
    corpus = write_lines(tmp_path / "chats.jsonl", *chat_records(40), record)
    config = PrepareDataConfig(output=str(tmp_path / "data"), corpus=str(corpus), tokenizer=str(tokenizer))
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not (tmp_path / "data").exists()


def test_chats_need_a_tokenizer_with_a_template(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "chats.jsonl", *chat_records(40))
    with pytest.raises(ValueError, match=r"line 1 is a chat, which a tokenizer's chat template writes.* Set tokenizer"):
        run(PrepareDataConfig(output=str(tmp_path / "data"), corpus=str(corpus)))
    plain = chat_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer=.* has no chat template"):
        run(PrepareDataConfig(output=str(tmp_path / "data"), corpus=str(corpus), tokenizer=str(plain)))


def test_records_left_out_are_counted_and_too_many_nulls_are_an_error(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    good = [{"text": f"line {number}"} for number in range(50)]
    odd = [{"text": None}, {"text": " "}, {"text": "x" * 99}, {"messages": []}, {"messages": None}]
    corpus = write_lines(tmp_path / "records.jsonl", *good[:3], *odd, *good[3:], *chat_records(2))
    config = PrepareDataConfig(
        output=str(tmp_path / "data"),
        corpus=str(corpus),
        tokenizer=str(tokenizer),
        validation_fraction=0.3,
        max_characters=80,
    )
    with pytest.raises(
        ValueError, match=r"line 4 has null where its text belongs, as 2 of 57 records .* more than max_s"
    ):
        run(config)
    artifact = run(dataclasses.replace(config, max_skipped=0.1))
    assert artifact.facts["sources"][0]["skipped"] == {"null": 2, "empty": 2, "too_long": 1}
    assert artifact.facts["train_documents"] + artifact.facts["validation_documents"] == 52


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files_are_read_as_what_they_hold(data_config, prepared, tmp_path: Path, ending: str) -> None:
    import pyarrow

    corpus = tmp_path / "corpus"
    for _, file in Source(data_config.corpus).files():
        target = corpus / file.relative_to(data_config.corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.output_stream(str(target) + f".{ending}", compression="gzip" if ending == "gz" else "zstd") as out:
            out.write(file.read_bytes())
    texts, packed = ([each.text for each in Source(str(path)).documents()] for path in (data_config.corpus, corpus))
    assert sorted(packed) == sorted(texts)
    damaged = next(corpus.rglob(f"*.{ending}"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{damaged.name} cannot be read .*[Tt]runcated"):
        list(Source(str(corpus)).documents())


def test_documents_begin_as_the_tokenizer_begins_a_text_and_the_manifest_says_it(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", bos=True)
    corpus = write_lines(tmp_path / "records.jsonl", *({"text": f"line {number}"} for number in range(50)))
    config = PrepareDataConfig(
        output=str(tmp_path / "data"), corpus=str(corpus), tokenizer=str(tokenizer), validation_fraction=0.3
    )
    for add_bos, first in ((None, True), (False, False), (True, True)):
        artifact = run(dataclasses.replace(config, add_bos=add_bos))
        assert {ids[0] == 1 for split in ("train", "validation") for ids in documents(artifact, split)} == {first}
        assert artifact.facts["begins_with"] == ("<s>" if first else None)
    with pytest.raises(ValueError, match="add_bos=true needs a tokenizer"):
        PrepareDataConfig(add_bos=True)


def test_documents_that_end_within_cannot_be_told_apart(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML, eos="<|im_end|>")
    records = [{"messages": each["messages"] * 2} for each in chat_records(40)]
    corpus = write_lines(tmp_path / "chats.jsonl", *records)
    artifact = run(
        PrepareDataConfig(
            output=str(tmp_path / "data"), corpus=str(corpus), tokenizer=str(tokenizer), validation_fraction=0.3
        )
    )
    with pytest.raises(
        ValueError, match=r"data.reset_at_documents=true tells documents apart by <.im_end.>, which 40 doc"
    ):
        require_documents_end_once(artifact)
