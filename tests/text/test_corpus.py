"""Which documents a corpus holds, in which order, and which of them are held out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minitron_nemo.config.data import STDLIB
from minitron_nemo.text.corpus import Document, Source, Splitter, read_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text file, a JSONL file and a Parquet file, and things that are no documents."""
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "b.txt").write_text("a text\nof two lines\n")
    (root / "a.txt").write_text("the first\n")
    (root / "empty.txt").write_text(" \n")
    (root / ".hidden").write_bytes(b"\xff\xfe")
    (root / "c.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two", "id": 2}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three", None, "four"]}), root / "d.parquet")
    return root


def texts(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


def test_a_folder_gives_every_kind_of_file_in_the_order_of_its_paths(folder):
    assert texts(Source(str(folder))) == ["the first\n", "one", "two", "three", "four", "a text\nof two lines\n"]


def test_text_files_are_named_and_records_are_not(folder):
    assert [document.name for document in Source(str(folder)).documents()] == [
        "a.txt", None, None, None, None, "deep/b.txt",
    ]  # fmt: skip


def test_a_single_file_is_a_corpus(folder):
    assert texts(Source(str(folder / "d.parquet"))) == ["three", "four"]
    assert texts(Source(str(folder / "a.txt"))) == ["the first\n"]


def test_glob_chooses_files_at_every_depth(folder):
    assert texts(Source(str(folder), glob="*.txt")) == ["the first\n", "a text\nof two lines\n"]


def test_the_key_of_the_text_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "here", "text": "not here"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"content": ["there"]}), tmp_path / "b.parquet")
    assert texts(read_corpus(str(tmp_path), text_key="content")[0]) == ["here", "there"]


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    assert texts(Source(str(tmp_path))) == ["a \ufffd b"]


def test_the_embedded_corpus_is_the_sorted_standard_library_without_what_is_installed_beside_it():
    names = [name for name, _ in Source(STDLIB).files()]
    assert names == sorted(names)
    assert {"argparse.py", "email/message.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "_sysconfigdata" in name or "/bad" in name]
    document = next(document for document in Source(STDLIB).documents() if document.name == "argparse.py")
    assert "ArgumentParser" in document.text


def test_equal_texts_are_never_on_both_sides():
    splitter = Splitter(0.5)
    documents = [Document(f"file{number}.txt", f"text {number % 7}") for number in range(200)]
    documents += [Document(None, f"text {number % 7}") for number in range(50)]
    sides: dict[str, set[bool]] = {}
    for document in documents:
        sides.setdefault(document.text, set()).add(splitter.is_validation(document))
    assert [len(side) for side in sides.values()] == [1] * 7
    assert set.union(*sides.values()) == {True, False}


def test_a_named_document_stays_held_out_when_its_text_is_edited():
    documents = [(f"file{number}.txt", f"text {number}") for number in range(300)]
    before = {name: Splitter(0.1).is_validation(Document(name, text)) for name, text in documents}
    after = {name: Splitter(0.1).is_validation(Document(name, text + " edited")) for name, text in documents}
    assert before == after
    assert any(before.values())


def test_the_held_out_share_is_what_was_asked_for():
    splitter = Splitter(0.02)
    held_out = sum(splitter.is_validation(Document(None, f"record {number}")) for number in range(20_000))
    assert abs(held_out / 20_000 - 0.02) < 0.004  # four standard deviations of a fair draw


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "names no source"),
        ([{"path": "a", "wieght": 2}], "unknown key 'wieght'.*did you mean weight?"),
        ([{"weight": 2}], "has no path"),
        ([{"path": "a", "weight": 0}], "weight=0.0 of a must be a positive number"),
        ([{"path": "a", "weight": "heavy"}], "weight='heavy' of a is not a number"),
        ([{"path": "a", "weight": 2}, "b"], "a weight to 1 of 2 sources. Give every source a weight, or none"),
        ([3], "3 is neither a path nor a mapping"),
    ],
)
def test_a_corpus_that_makes_no_sense_says_how_to_write_it(corpus, message):
    with pytest.raises(ValueError, match=message):
        read_corpus(corpus)


def test_unreadable_files_are_named_with_the_place_and_the_mend(tmp_path):
    cases = {
        "latin.txt": (b"caf\xe9 au lait", "not UTF-8 text .byte 0xe9 at 3.*iconv"),
        "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2 is not JSON"),
        "list.jsonl": (b"[1, 2]\n", "line 1 is not a JSON object"),
        "other.jsonl": (b'{"txt": "a"}\n', "line 1 has no key text_key=text; did you mean txt? Set text_key"),
        "number.jsonl": (b'{"text": 3}\n', "line 1: text is int, not a string"),
        "broken.parquet": (b"PAR1 not really", "broken.parquet is not a readable Parquet file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            texts(Source(str(tmp_path / name)))


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no column text_key=text; known: body, id"):
        texts(Source(str(tmp_path / "a.parquet")))
    with pytest.raises(ValueError, match="column id holds int64, not strings"):
        texts(Source(str(tmp_path / "a.parquet"), text_key="id"))


def test_a_path_that_is_not_there_and_an_empty_folder_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus=.*nowhere does not exist. Give a text, JSONL or Parquet file"):
        texts(Source(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="is a folder without files that match glob='\\*'"):
        texts(Source(str(tmp_path)))


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, float("nan")])
def test_a_validation_fraction_out_of_range_names_the_range(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction} must be above 0 and at most 0.5"):
        Splitter(fraction)
