"""The tokenizer in a GGUF file's metadata becomes a tokenizer.json.

GGUF keeps vocabulary, merges, kinds of tokens and special ids; how text is cut before merging it keeps as a name alone
(`tokenizer.ggml.pre`), whose meaning is in llama.cpp's source (llama-vocab.cpp). The rows below are what the named
tokenizers' own tokenizer.json says; llama.cpp comes near them with the regular expressions it has. A name without a row
is refused, as another cut gives other ids without a word.

Of SentencePiece (`tokenizer.ggml.model` is llama) GGUF keeps scores in place of merges. Those of its BPE are ranks: 0,
-1, -2 and so on. They give the merges back; a unigram model's do not, and it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_nemo.checks import require
from minitron_nemo.text.tokenizer_files import INPUT_NAMES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Metadata = Mapping[str, Any]
_MEND = "Name a Hugging Face tokenizer folder of this model instead: import_hf.tokenizer=/path/to/folder."


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Cut:
    """How text is cut into pieces that merges do not cross."""

    pattern: str | None = None
    """Pieces of byte-level BPE; None: GPT-2's."""
    digits_alone: bool = False
    normalized: bool = False
    """NFC before all else."""
    whole_words: bool = False
    """A piece that is a token is that token, whatever the merges say."""
    add_bos: bool = False
    """Where the file does not say whether a text begins with BOS."""


_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = Cut()
_SMOLLM = Cut(digits_alone=True)
_LLAMA3 = Cut(_CASELESS + r"\p{N}{1,3}" + _REST, whole_words=True, add_bos=True)
_QWEN2 = Cut(_CASELESS + r"\p{N}" + _REST, normalized=True)
_TEKKEN = Cut(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    add_bos=True,
)
CUTS: dict[str, Cut] = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
"""`tokenizer.ggml.pre` -> its cut."""


def require_known_tokenizer(metadata: Metadata, file: Path) -> None:
    """ValueError where the file has no tokenizer, or one of a kind or a cut that is not known."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "missing")
    require(model is not None, f"{file} holds no tokenizer. {_MEND}")
    require(
        model in ("gpt2", "llama"),
        f"{file} has tokenizer.ggml.model={model}; supported: gpt2 (byte-level BPE) and llama (SentencePiece). {_MEND}",
    )
    if model == "gpt2":
        require(
            pre in CUTS,
            f"{file} has tokenizer.ggml.pre={pre}: how it cuts text before merging is not known; known: "
            f"{', '.join(sorted(CUTS))}. {_MEND}",
        )
        return
    require(
        all(score == int(score) for score in metadata.get("tokenizer.ggml.scores", [0.5])),
        f"{file} has tokenizer.ggml.scores that are no ranks: a SentencePiece unigram model, which GGUF does not keep "
        f"in full. {_MEND}",
    )
    require(
        not metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        f"{file} has tokenizer.ggml.remove_extra_whitespaces=true, which is not supported. {_MEND}",
    )


def write_tokenizer(metadata: Metadata, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a tokenizer that is known."""
    if metadata["tokenizer.ggml.model"] == "gpt2":
        cut = CUTS[metadata["tokenizer.ggml.pre"]]
        tokenizer, add_bos = _byte_level_bpe(metadata, cut), cut.add_bos
    else:
        tokenizer, add_bos = _sentencepiece_bpe(metadata), True
    _add_special_tokens(tokenizer, metadata)
    _begin_and_end(tokenizer, metadata, add_bos=add_bos)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {
        key.removesuffix("_id"): tokens[i] for key, i in special_ids(metadata, ("bos", "eos", "pad", "unk")).items()
    }
    settings = roles | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": INPUT_NAMES,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length", int(1e30)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def special_ids(metadata: Metadata, roles: tuple[str, ...] = ("bos", "eos", "pad")) -> dict[str, int]:
    """bos_token_id and so on, as far as the file says."""
    found = {f"{role}_token_id": metadata.get(f"tokenizer.ggml.{_KEYS[role]}_token_id") for role in roles}
    return {key: i for key, i in found.items() if i is not None}


def _kinds(metadata: Metadata) -> list[int]:
    return metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(metadata["tokenizer.ggml.tokens"])


def _byte_level_bpe(metadata: Metadata, cut: Cut) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens = zip(metadata["tokenizer.ggml.tokens"], _kinds(metadata), strict=True)
    vocabulary = {token: i for i, (token, kind) in enumerate(tokens) if kind != TokenType.UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole_words))
    if cut.normalized:
        tokenizer.normalizer = normalizers.NFC()
    if cut.pattern is None:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        pieces = pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated", invert=False)
        steps = [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if cut.digits_alone:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece_bpe(metadata: Metadata) -> Tokenizer:
    """Merges are all ways to put a piece together from two, best piece first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, kinds, scores = metadata["tokenizer.ggml.tokens"], _kinds(metadata), metadata["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = {token: i for token, i in vocabulary.items() if kinds[i] == TokenType.NORMAL}
    merges = sorted(
        (-scores[whole], pieces[piece[:cut]], pieces[piece[cut:]])
        for piece, whole in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(tokens[left], tokens[right]) for _, left, right in merges],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefixed else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata) -> None:
    """Tokens that are taken from the text before it is cut: control tokens, and those a user defined."""
    from tokenizers import AddedToken

    tokens, roles = metadata["tokenizer.ggml.tokens"], set(special_ids(metadata).values())
    for i, (token, kind) in enumerate(zip(tokens, _kinds(metadata), strict=True)):
        special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or i in roles
        if special or kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])


def _begin_and_end(tokenizer: Tokenizer, metadata: Metadata, *, add_bos: bool) -> None:
    """BOS before and EOS after a text, as the file says or else `add_bos`."""
    from tokenizers import processors

    ids, tokens = special_ids(metadata), metadata["tokenizer.ggml.tokens"]
    first = ids.get("bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    last = ids.get("eos_token_id") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return
    before, after = ([] if i is None else [tokens[i]] for i in (first, last))
    one, two = ([*before, part, *after] for part in ("$A", "$B:1"))
    template = processors.TemplateProcessing(
        single=one, pair=one + two, special_tokens=[(tokens[i], i) for i in {first, last} - {None}]
    )
    present = tokenizer.post_processor
    tokenizer.post_processor = template if present is None else processors.Sequence([present, template])
