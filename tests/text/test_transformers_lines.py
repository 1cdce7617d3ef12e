"""A tokenizer that leaves us is read alike by transformers 4 and 5, and as its own tokenizer.json says."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from minitron_nemo.text.tokenizer import begins_with_bos, load_tokenizer
from minitron_nemo.text.tokenizer_files import copy_tokenizer, special_token_ids, tokenizer_digest
from support.transformers5 import transformers5

AWKWARD = [
    "pay 1234 now",
    "  leading spaces",
    "line\n\n42 lines\n7",
    "tab\t8 and   99",
    "<|im_start|>user\nhi 5<|im_end|>\n",
    "year2024 isn't it's",
    "naïve 数学 🙂",
]
CLASSES = ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"]
SPECIAL = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]

IDS_IN_5 = """
import json, sys
from transformers import AutoTokenizer
texts, *paths = [json.loads(sys.argv[1]), *sys.argv[2:]]
print(json.dumps({
    path: [[tokenizer(text, add_special_tokens=special).input_ids for text in texts] for special in (False, True)]
    for path in paths for tokenizer in [AutoTokenizer.from_pretrained(path)]
}))
"""


def backend(kind: str) -> Tokenizer:
    """A small BPE with a pre-tokenizer that no class of transformers would build."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    tokenizer.pre_tokenizer = {
        "digits": pre_tokenizers.Sequence([digits, byte_level]),
        "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "words": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s?\p{L}+|\s?\p{N}{1,2}|\s+|[^\s\p{L}\p{N}]"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }[kind]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [f"line {number} pay  {number * 37}\n\nit's {number}" for number in range(200)], trainer
    )
    if kind != "prefix":
        template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 1)]}
        tokenizer.post_processor = processors.TemplateProcessing(**template)
    return tokenizer


def write(path: Path, tokenizer: Tokenizer, config: dict[str, Any], model_type: str | None = "llama") -> Path:
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def exported(source: Path) -> Path:
    """Through an artifact, as export-hf writes it."""
    artifact, target = source.with_name(f"{source.name}-artifact"), source.with_name(f"{source.name}-export")
    copy_tokenizer(source, artifact)
    copy_tokenizer(artifact, target)
    if (source / "config.json").is_file():
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def in_4(path: Path, *, special: bool) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(text, add_special_tokens=special).input_ids for text in AWKWARD]


def test_whatever_class_is_named_both_lines_read_the_exported_tokenizer_as_its_file_says(tmp_path: Path) -> None:
    expected = {}
    backends = {kind: backend(kind) for kind in ("digits", "prefix", "words")}
    for kind, name, model_type in product(backends, CLASSES, ("llama", "qwen3", None)):
        tokenizer = backends[kind]
        extra = {"extra_special_tokens": SPECIAL[2:]} if name == "TokenizersBackend" else {}
        config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "<|endoftext|>"} | extra
        source = write(tmp_path / f"{kind}-{name}-{model_type}", tokenizer, config, model_type)
        target = exported(source)
        assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        expected[str(target)] = [
            [tokenizer.encode(text, add_special_tokens=special).ids for text in AWKWARD] for special in (False, True)
        ]
        assert [in_4(target, special=False), in_4(target, special=True)] == expected[str(target)], (kind, name)
        ours = load_tokenizer(source)
        assert [ours(text, add_special_tokens=False).input_ids for text in AWKWARD] == expected[str(target)][0]
        assert tokenizer_digest(source) == tokenizer_digest(target)
    assert transformers5(IDS_IN_5, json.dumps(AWKWARD), *expected) == expected


def test_a_setting_decides_over_the_template_what_begins_a_text_in_both_lines(tmp_path: Path) -> None:
    expected = {}
    for kind, adds in (("prefix", True), ("digits", False)):  # whose tokenizer.json does the opposite
        tokenizer = backend(kind)
        config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
        source = write(tmp_path / kind, tokenizer, config | {"add_bos_token": adds})
        target = exported(source)
        plain = [tokenizer.encode(text, add_special_tokens=False).ids for text in AWKWARD]
        expected[str(target)] = [plain, [[1, *ids] if adds else ids for ids in plain]]
        assert begins_with_bos(load_tokenizer(source)) == begins_with_bos(load_tokenizer(target)) == adds
        assert in_4(target, special=True) == expected[str(target)][1]
        assert tokenizer_digest(source) == tokenizer_digest(target)
    assert transformers5(IDS_IN_5, json.dumps(AWKWARD), *expected) == expected


def test_a_tokenizer_of_transformers_5_is_read_with_its_special_tokens(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    backend("digits").save(str(source / "tokenizer.json"))
    save = """
import sys
from transformers import PreTrainedTokenizerFast
PreTrainedTokenizerFast(
    tokenizer_file=sys.argv[1], bos_token="<s>", eos_token="<|im_end|>",
    extra_special_tokens=["<|im_start|>", "<|im_end|>"]
).save_pretrained(sys.argv[2])
print(1)
"""
    transformers5(save, source / "tokenizer.json", source)
    assert json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    tokenizer = load_tokenizer(source)
    assert (tokenizer.eos_token_id, tokenizer.additional_special_tokens) == (3, ["<|im_start|>", "<|im_end|>"])
    copy_tokenizer(source, tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").additional_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert special_token_ids(source) == {"bos_token_id": 1, "eos_token_id": 3}


def test_added_tokens_are_matched_as_tokenizer_json_says_in_both_lines(tmp_path: Path) -> None:
    tokenizer = backend("digits")
    tokenizer.add_special_tokens([AddedToken("<tool>", rstrip=True, normalized=False)])
    flags = {"lstrip": False, "rstrip": False, "single_word": True, "normalized": True, "special": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"} | flags,
        "added_tokens_decoder": {"420": {"content": "<tool>"} | flags},
    }
    target = exported(write(tmp_path / "source", tokenizer, config))
    texts = ["a<tool>  b", "x<|endoftext|>y"]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    read = AutoTokenizer.from_pretrained(target)
    assert [read(text, add_special_tokens=False).input_ids for text in texts] == expected
    assert transformers5(IDS_IN_5, json.dumps(texts), target)[str(target)][0] == expected


def test_a_sentencepiece_model_alone_becomes_a_tokenizer_json(tmp_path: Path) -> None:
    import sentencepiece

    source = tmp_path / "source"
    source.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"some words and {number} numbers" for number in range(300)]),
        model_prefix=str(source / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # as Llama's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    slow = AutoTokenizer.from_pretrained(source, use_fast=False)
    target = exported(source)
    assert (target / "tokenizer.json").is_file()
    expected = [slow(text).input_ids for text in AWKWARD]
    for path in (source, target):
        assert [load_tokenizer(path)(text).input_ids for text in AWKWARD] == expected
    assert transformers5(IDS_IN_5, json.dumps(AWKWARD), target)[str(target)][1] == expected
    assert tokenizer_digest(source) == tokenizer_digest(target)
