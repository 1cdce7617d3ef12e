"""The tokenizer in a GGUF file's metadata becomes a tokenizer.json.

GGUF keeps vocabulary, merges, kinds of tokens and special ids; how text is cut before merging it keeps as a name alone
(`tokenizer.ggml.pre`), whose meaning is in llama.cpp's source (llama-vocab.cpp). The rows below are what the named
tokenizers' own tokenizer.json says; llama.cpp comes near them with the regular expressions it has. A name without a row
is refused, as another cut gives other ids without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_nemo.checks import require

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
        model == "gpt2",
        f"{file} has tokenizer.ggml.model={model}; supported: gpt2 (byte-level BPE). {_MEND}",
    )
    require(
        pre in CUTS,
        f"{file} has tokenizer.ggml.pre={pre}: how it cuts text before merging is not known; known: "
        f"{', '.join(sorted(CUTS))}. {_MEND}",
    )


def write_tokenizer(metadata: Metadata, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a tokenizer that is known."""
    _byte_level_bpe(metadata, CUTS[metadata["tokenizer.ggml.pre"]]).save(str(folder / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {
        key.removesuffix("_id"): tokens[i] for key, i in special_ids(metadata, ("bos", "eos", "pad", "unk")).items()
    }
    settings = roles | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # the class has one more, which generate() refuses
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


def _byte_level_bpe(metadata: Metadata, cut: Cut) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    vocabulary = {
        token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != TokenType.UNUSED
    }
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
    _add_special_tokens(tokenizer, metadata, kinds)
    tokenizer.post_processor = _around(metadata, cut, processors.ByteLevel(trim_offsets=False))
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata, kinds: list[int]) -> None:
    """Tokens that are taken from the text before it is cut: control tokens, and those a user defined."""
    from tokenizers import AddedToken

    tokens, roles = metadata["tokenizer.ggml.tokens"], set(special_ids(metadata).values())
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        special = kind == TokenType.CONTROL or i in roles
        if special or kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])


def _around(metadata: Metadata, cut: Cut, processor: Any) -> Any:
    """The post-processor, with BOS before and EOS after a text as the file says."""
    from tokenizers import processors

    ids, tokens = special_ids(metadata), metadata["tokenizer.ggml.tokens"]
    first = ids.get("bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token", cut.add_bos) else None
    last = ids.get("eos_token_id") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return processor
    before, after = ([] if i is None else [tokens[i]] for i in (first, last))
    one, two = (" ".join([*before, part, *after]) for part in ("$A", "$B:1"))
    special = [(tokens[i], i) for i in {first, last} - {None}]
    template = processors.TemplateProcessing(single=one, pair=f"{one} {two}", special_tokens=special)
    return processors.Sequence([processor, template])
