"""Tokenizers from local Hugging Face directories: train one, load one; their files are in tokenizer_files.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_nemo.checks import Mistake, require
from minitron_nemo.config.stages import SMALLEST_VOCABULARY
from minitron_nemo.text.tokenizer_files import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    INPUT_NAMES,
    TOKENIZER_JSON,
    TokenizerFiles,
    read_tokenizer_files,
    require_tokenizer_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, output: Path | str) -> None:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face directory.

    `<|endoftext|>` is id 0 and serves as beginning, end, padding and unknown token. Equal texts in equal order give
    equal files.

    Raises: ValueError: vocab_size is below 257, or the texts are too few to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    require_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    found = tokenizer.get_vocab_size()
    require(
        found == vocab_size,
        f"vocab_size={vocab_size} is more than this corpus can fill: it gives {found} tokens. "
        f"Set vocab_size={found} or lower, or use a larger corpus.",
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=INPUT_NAMES,
    ).save_pretrained(str(output))


def require_vocab_size(vocab_size: int) -> None:
    require(
        vocab_size >= SMALLEST_VOCABULARY,
        f"vocab_size={vocab_size} must be at least {SMALLEST_VOCABULARY}: every byte and {END_OF_TEXT}. Try 4096.",
    )


def load_tokenizer(path: Path | str, *, key: str = "tokenizer") -> Tokenizer:
    """The Hugging Face tokenizer in a local directory: what its tokenizer.json says, whatever class it names.

    Where there is none, it is transformers' conversion of the vocabulary there is. Where no end-of-text token is set,
    the separator stands for it, as in NeMo's tokenizers.

    Args:
        key: the user's config key that named the path, for the message.
    Raises: FileNotFoundError: no such directory. ValueError: no tokenizer in it, or one without an end-of-text token.
    """
    path = require_tokenizer_files(path, key=key)
    try:
        files = read_tokenizer_files(path)
        tokenizer = _from_files(path, files) if files else _by_class(path)
    except Mistake:
        raise
    except Exception as error:  # transformers raises whatever its file readers do
        raise Mistake(
            f"{key}={path} holds no tokenizer that transformers can load ({error}). "
            "Save one there with tokenizer.save_pretrained(...)."
        ) from error
    if tokenizer.eos_token is None and tokenizer.sep_token:
        tokenizer.eos_token = tokenizer.sep_token
    require(
        tokenizer.eos_token_id is not None,
        f"{key}={path} has no eos_token, which separates documents. Set eos_token in its tokenizer_config.json.",
    )
    return tokenizer


def _from_files(path: Path, files: TokenizerFiles) -> Tokenizer:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    settings = {key: value for key, value in files.settings.items() if key != "tokenizer_class"}
    settings["added_tokens_decoder"] = {
        int(index): AddedToken(**token) for index, token in settings["added_tokens_decoder"].items()
    }
    settings |= _chat_template(path, settings.get("chat_template"))
    if files.changed:
        backend: dict[str, Any] = {"tokenizer_object": Backend.from_str(json.dumps(files.content))}
    else:
        backend = {"tokenizer_file": str(path / TOKENIZER_JSON)}
    return PreTrainedTokenizerFast(**backend, name_or_path=str(path), **settings)


def _chat_template(path: Path, configured: Any) -> dict[str, Any]:
    """The templates that stand in files of their own, which go before what tokenizer_config.json has `configured`."""
    named = {file.stem: file.read_text(encoding="utf-8") for file in sorted((path / CHAT_TEMPLATES).glob("*.jinja"))}
    if (path / CHAT_TEMPLATE).is_file():
        default = (path / CHAT_TEMPLATE).read_text(encoding="utf-8")
        return {"chat_template": {"default": default} | named if named else default}
    if configured is None and (path / "chat_template.json").is_file():
        return {"chat_template": json.loads((path / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]}
    return {"chat_template": named} if named else {}


def _by_class(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), use_fast=False, trust_remote_code=False, local_files_only=True)


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own setting puts its beginning-of-text token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs for this tokenizer: its highest id plus one, before any padding."""
    return max(tokenizer.get_vocab().values()) + 1
