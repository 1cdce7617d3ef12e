"""Tokenizers, from and to local Hugging Face directories: train one, load one, copy one, tell two apart.

Nothing here reaches for a network: a path that is not a local directory is an error, not a download.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_nemo.checks import Mistake, NothingThere, require
from minitron_nemo.config.stages import SMALLEST_VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

END_OF_TEXT = "<|endoftext|>"
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_FILES = (
    *_VOCABULARY_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
)
"""All that a Hugging Face tokenizer is made of; a model's directory holds weights and more beside them."""


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
    ).save_pretrained(str(output))


def require_vocab_size(vocab_size: int) -> None:
    require(
        vocab_size >= SMALLEST_VOCABULARY,
        f"vocab_size={vocab_size} must be at least {SMALLEST_VOCABULARY}: every byte and {END_OF_TEXT}. Try 4096.",
    )


def load_tokenizer(path: Path | str, *, key: str = "tokenizer") -> Tokenizer:
    """The Hugging Face tokenizer in a local directory, the fast one where there is one.

    Where no end-of-text token is set, the separator stands for it, as in NeMo's tokenizers.

    Args:
        key: the user's config key that named the path, for the message.
    Raises: FileNotFoundError: no such directory. ValueError: no tokenizer in it, or one without an end-of-text token.
    """
    path = require_tokenizer_files(path, key=key)
    try:
        tokenizer = _from_pretrained(path)
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


def _from_pretrained(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), use_fast=True, trust_remote_code=False, local_files_only=True)
    except Exception:
        return AutoTokenizer.from_pretrained(str(path), use_fast=False, trust_remote_code=False, local_files_only=True)


def plain_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """text -> token ids, no special token added."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return encode


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs for this tokenizer: its highest id plus one, before any padding."""
    return max(tokenizer.get_vocab().values()) + 1


def copy_tokenizer(source: Path | str, target: Path | str, *, key: str = "tokenizer") -> None:
    """Copy the tokenizer's files, and no others."""
    source = require_tokenizer_files(source, key=key)
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(target) / name)


def tokenizer_digest(path: Path | str, *, key: str = "tokenizer") -> str:
    """sha256 of what decides the ids: vocabulary, merges, normalisation and the end-of-text token.

    Equal for copies and for re-saved files that differ only in layout or in padding and truncation.
    """
    path = require_tokenizer_files(path, key=key)
    if (path / "tokenizer.json").is_file():
        content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        parts: dict[str, Any] = {k: v for k, v in content.items() if k not in ("padding", "truncation", "version")}
    else:
        files = [path / name for name in _VOCABULARY_FILES if (path / name).is_file()]
        parts = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    parts["eos_token"] = _eos_token(path)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def special_token_ids(path: Path | str, *, key: str = "tokenizer") -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id as far as the tokenizer's own files say."""
    path = require_tokenizer_files(path, key=key)
    settings, ids = {}, {}
    if (path / "tokenizer_config.json").is_file():
        settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        ids = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if (path / "tokenizer.json").is_file():
        tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    found = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            found[f"{role}_token_id"] = ids[content]
    return found


def require_tokenizer_files(path: Path | str, *, key: str = "tokenizer") -> Path:
    """The path, once it is known to be a local directory that holds a tokenizer's vocabulary."""
    path = Path(path)
    require(
        path.is_dir(),
        f"{key}={path} is not a directory on this machine. Give the path of a Hugging Face tokenizer directory; "
        "names of models on a hub are not looked up.",
        NothingThere,
    )
    require(
        any((path / name).is_file() for name in _VOCABULARY_FILES),
        f"{key}={path} holds no tokenizer: none of {', '.join(_VOCABULARY_FILES)} is there. "
        "Save one there with tokenizer.save_pretrained(...).",
    )
    return path


def _eos_token(path: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).is_file():
            token = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return None
