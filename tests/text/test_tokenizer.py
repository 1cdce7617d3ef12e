"""A tokenizer that is trained here works everywhere, and two different ones are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minitron_nemo.text.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from minitron_nemo.text.tokenizer_files import copy_tokenizer, tokenizer_digest

TEXTS = [f"def function_{number}(argument):\n    return argument + {number}\n" for number in range(200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    train_tokenizer(TEXTS, vocab_size=300, output=path)
    return path


def test_any_text_survives_the_round_trip(trained):
    tokenizer = load_tokenizer(trained)
    for text in ["  def f():\n\treturn 1  ", "naïve café 数学 🙂\r\n", "\x00\x7f", TEXTS[3]]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_transformers_reads_it_with_one_token_for_every_end_of_text(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer) == vocabulary_size(load_tokenizer(trained)) == 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert {file.name for file in trained.iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip


def test_equal_texts_give_equal_files(trained, tmp_path):
    train_tokenizer(TEXTS, vocab_size=300, output=tmp_path)
    for file in trained.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_digest_survives_saving_again_and_sees_another_vocabulary(trained, tmp_path):
    AutoTokenizer.from_pretrained(trained, truncation_side="left").save_pretrained(tmp_path / "again")
    train_tokenizer(TEXTS, vocab_size=299, output=tmp_path / "smaller")
    assert tokenizer_digest(tmp_path / "again") == tokenizer_digest(trained)
    assert tokenizer_digest(tmp_path / "smaller") != tokenizer_digest(trained)


def test_the_digest_sees_another_end_of_text(trained, tmp_path):
    copy_tokenizer(trained, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "x"}))
    assert tokenizer_digest(tmp_path) != tokenizer_digest(trained)


def test_copying_takes_the_tokenizer_out_of_a_model_directory_and_nothing_else(trained, tmp_path):
    model = tmp_path / "model"
    copy_tokenizer(trained, model)
    (model / "model.safetensors").write_bytes(b"weights")
    copy_tokenizer(model, tmp_path / "copy")
    assert not (tmp_path / "copy" / "model.safetensors").exists()
    assert load_tokenizer(tmp_path / "copy").encode("argument") == load_tokenizer(trained).encode("argument")


def test_a_name_on_a_hub_is_an_error_not_a_download():
    with pytest.raises(FileNotFoundError, match=r"tokenizer=gpt2 is not a directory on this machine.*not looked up"):
        load_tokenizer("gpt2")


def test_a_separator_ends_texts_where_no_end_of_text_is_set(trained, tmp_path):
    copy_tokenizer(trained, tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        roles = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({"sep_token": roles.pop("eos_token")} | roles))
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id is None
    assert load_tokenizer(tmp_path).eos_token_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(ValueError, match=r"has no eos_token, which separates documents. Set eos_token in its token"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"teacher=.* holds no tokenizer: none of tokenizer.json"):
        load_tokenizer(tmp_path, key="teacher")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_the_corpus_cannot_fill_names_the_size_it_can(tmp_path):
    with pytest.raises(
        ValueError, match=r"vocab_size=5000 is more than this corpus can fill: it gives \d+ tokens. Set"
    ):
        train_tokenizer(["few words"], vocab_size=5000, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_tokenizer(TEXTS, vocab_size=256, output=tmp_path / "none")
