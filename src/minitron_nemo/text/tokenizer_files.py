"""The files of a Hugging Face tokenizer: what stands in them, how they travel, how two tokenizers are told apart.

`tokenizer.json` says how text becomes ids, and nothing else does. transformers builds parts of a tokenizer anew by the
class that tokenizer_config.json names, differently in 4.x and 5.x; so a copy names `PreTrainedTokenizerFast`, which
both lines take as it is, and keeps tokenizer.json byte for byte. `add_bos_token` and `add_eos_token`, where they are
set, are the one thing said beside it: where its post-processor does otherwise, the copy's does as they say.

Nothing here reaches for a network: a path that is not a local directory is an error, not a download.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron_nemo.checks import Mistake, NothingThere, require

TOKENIZER_JSON, TOKENIZER_CONFIG, GENERATION_CONFIG = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_VOCABULARY_FILES = (TOKENIZER_JSON, "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_READ_BESIDE_TOKENIZER_JSON = (TOKENIZER_JSON, TOKENIZER_CONFIG, _SPECIAL_TOKENS_MAP, CHAT_TEMPLATE)
_FILES = (
    *_VOCABULARY_FILES,
    *(TOKENIZER_CONFIG, _SPECIAL_TOKENS_MAP, CHAT_TEMPLATE, "chat_template.json", f"{CHAT_TEMPLATES}/*.jinja"),
    *("*.tiktoken", "tekken.json", GENERATION_CONFIG, "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""All that goes with a model beside config.json and weights: tokenizer, templates, generation config, terms of use."""
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ANY_CLASS = "PreTrainedTokenizerFast"
INPUT_NAMES = ["input_ids", "attention_mask"]
"""The class has token_type_ids besides, which generate() of 4.57 refuses."""
_OF_A_CLASS = (
    "auto_map",
    "backend",
    "fix_mistral_regex",
    "from_slow",
    "is_local",
    "local_files_only",
    "tokenizer_file",
)
"""Keys of tokenizer_config.json that say how a class is to build the tokenizer."""


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its copies have it."""

    content: dict[str, Any]
    """tokenizer.json."""
    settings: dict[str, Any]
    """tokenizer_config.json: special tokens by name, as text."""
    changed: bool
    """Whether `content` is not what stands in the directory's tokenizer.json."""


def read_tokenizer_files(path: Path) -> TokenizerFiles | None:
    """The tokenizer of a directory that has a vocabulary, in whichever form; None: in one that has no tokenizer.json.

    Raises: Mistake: a file that is no JSON object.
    """
    if not (path / TOKENIZER_JSON).is_file():
        return _converted(path)
    content = _read(path / TOKENIZER_JSON)
    settings = _plain_settings(path, content)
    changed = False
    ids, wanted = _ids_of(content, settings), {}
    for role in ("bos_token", "eos_token"):
        if settings.get(f"add_{role}") is not None:
            wanted[f"add_{role}"] = settings[f"add_{role}"] and settings.get(role) in ids
    if wanted:
        adds = _added_by_template(content.get("post_processor"), settings)
        settings |= adds | wanted
        if adds != adds | wanted:
            content, changed = content | {"post_processor": _template(content, settings)}, True
    return TokenizerFiles(content, settings, changed)


def _converted(path: Path) -> TokenizerFiles | None:
    """What transformers makes of a vocabulary without tokenizer.json, such as SentencePiece's; None: it cannot."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in _VOCABULARY_FILES):
        return None
    _let_sentencepiece_be_read()
    with tempfile.TemporaryDirectory() as directory:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
            tokenizer.save_pretrained(directory, save_jinja_files=False)
        except Exception:  # transformers raises whatever its file readers do; `load_tokenizer` says it
            return None
        if not (Path(directory) / TOKENIZER_JSON).is_file():
            return None
        files = read_tokenizer_files(Path(directory))
    return files and replace(files, changed=True)


def _let_sentencepiece_be_read() -> None:
    """sentencepiece 0.2.3 describes its files for a later protobuf than NeMo allows; transformers brings its own."""
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except ImportError:
        return
    except Exception:  # protobuf's VersionError
        from transformers.utils import sentencepiece_model_pb2_new

        sys.modules["sentencepiece.sentencepiece_model_pb2"] = sentencepiece_model_pb2_new


def special_token_ids(path: Path | str, *, key: str = "tokenizer") -> dict[str, int | list[int]]:
    """bos_token_id, eos_token_id and pad_token_id as far as the tokenizer's own files say.

    eos_token_id is a list where generation_config.json has several.
    """
    path = require_tokenizer_files(path, key=key)
    files = read_tokenizer_files(path)
    settings = files.settings if files else _settings(path)
    ids = _ids_of(files.content if files else {}, settings)
    found: dict[str, int | list[int]] = {
        f"{role}_id": ids[settings[role]]
        for role in ("bos_token", "eos_token", "pad_token")
        if settings.get(role) in ids
    }
    several = _read(path / GENERATION_CONFIG).get("eos_token_id")
    return found | ({"eos_token_id": several} if isinstance(several, list) else {})


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


def require_ids_within(path: Path | str, vocab_size: int) -> None:
    """ValueError where generation_config.json in `path` names tokens that the model's vocabulary does not have."""
    generation = _read(Path(path) / GENERATION_CONFIG)
    for key in _IDS:
        given = generation.get(key)
        for token in given if isinstance(given, list) else [given]:
            require(
                token is None or (isinstance(token, int) and 0 <= token < vocab_size),
                f"{Path(path) / GENERATION_CONFIG} has {key}={given}, but the vocabulary ends at {vocab_size - 1}. "
                "Correct it, or remove the file.",
            )


def tokenizer_digest(path: Path | str, *, key: str = "tokenizer") -> str:
    """sha256 of what decides the ids: vocabulary, merges, normalisation and the end-of-text token.

    Equal for copies and for re-saved files that differ only in layout or in padding and truncation.
    """
    path = require_tokenizer_files(path, key=key)
    files = read_tokenizer_files(path)
    if files:
        parts = {k: v for k, v in files.content.items() if k not in ("padding", "truncation", "version")}
    else:
        present = [path / name for name in _VOCABULARY_FILES if (path / name).is_file()]
        parts = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in present}
    parts["eos_token"] = (files.settings if files else _settings(path)).get("eos_token")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---- copying ---------------------------------------------------------------------------------------------------------


def copy_tokenizer(source: Path | str, target: Path | str, *, key: str = "tokenizer") -> None:
    """Copy what goes with a model beside its weights: see `copy_files_beside`. Raises: ValueError: no tokenizer."""
    copy_files_beside(require_tokenizer_files(source, key=key), target)


def copy_files_beside(source: Path | str, target: Path | str) -> None:
    """Copy tokenizer, chat templates, generation config and terms of use of a model's folder, and no other file.

    tokenizer_config.json is written so that transformers 4 and 5 read the same tokenizer. Several ends of text that
    only config.json names go into a generation config of the copy.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    files = read_tokenizer_files(source)
    if files:
        if files.changed:
            _write(target / TOKENIZER_JSON, files.content)
        if files.settings != _read(source / TOKENIZER_CONFIG):
            _write(target / TOKENIZER_CONFIG, files.settings)
    config = _read(source / "config.json")
    if isinstance(config.get("eos_token_id"), list) and not (source / GENERATION_CONFIG).is_file():
        ids = {name: config[name] for name in _IDS if config.get(name) is not None}
        _write(target / GENERATION_CONFIG, ids | {"_from_model_config": True})


def copy_what_is_read(source: Path, target: Path) -> None:
    """Copy of a tokenizer's files those that transformers reads, as they are; all, where there is no tokenizer.json."""
    target.mkdir(parents=True)
    for name in _READ_BESIDE_TOKENIZER_JSON if (source / TOKENIZER_JSON).is_file() else _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# ---- settings --------------------------------------------------------------------------------------------------------


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, its special tokens as text; those it does not name, from special_tokens_map.json."""
    settings, elsewhere = _read(path / TOKENIZER_CONFIG), _read(path / _SPECIAL_TOKENS_MAP)
    for role in _ROLES:
        if role in settings or role in elsewhere:
            settings[role] = _text_of(settings.get(role, elsewhere.get(role)))
    return settings


def _plain_settings(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Those that every transformers reads alike beside this tokenizer.json, whose added tokens are as it says.

    Where no end of text is named, it is the first of the model's config.json.
    """
    settings = {key: value for key, value in _settings(path).items() if key not in _OF_A_CLASS}
    settings["tokenizer_class"] = _ANY_CLASS
    settings.setdefault("model_input_names", INPUT_NAMES)
    if settings.get("eos_token") is None and settings.get("sep_token") is None:
        settings |= _end_of_text_of_model(path, content)
    _list_extra_tokens(settings, _read(path / _SPECIAL_TOKENS_MAP))
    added = {str(token["id"]): _without_id(token) for token in content.get("added_tokens", [])}
    known = {token["content"] for token in added.values()}
    for index, token in settings.get("added_tokens_decoder", {}).items():
        if index not in added and token["content"] not in known:
            added[index] = token
    settings["added_tokens_decoder"] = added
    prefix = (content.get("pre_tokenizer") or {}).get("add_prefix_space")  # 4.x sets it as told, or to false
    if prefix is not None and bool(settings.get("add_prefix_space")) != prefix:
        settings["add_prefix_space"] = prefix
    return settings


def _list_extra_tokens(settings: dict[str, Any], special_tokens_map: Mapping[str, Any]) -> None:
    """4.x wants the list under one name and a mapping under the other, 5.x takes both so."""
    listed = settings.get("extra_special_tokens")
    named = settings.get("additional_special_tokens") or special_tokens_map.get("additional_special_tokens") or []
    if isinstance(listed, list):
        del settings["extra_special_tokens"]
        named = [*named, *listed]
    if named:
        settings["additional_special_tokens"] = list(dict.fromkeys(_text_of(token) for token in named))


def _end_of_text_of_model(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    given = _read(path / "config.json").get("eos_token_id")
    first = given[0] if isinstance(given, list) and given else given
    names = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    return {"eos_token": names[first]} if first in names else {}


def _ids_of(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
    ids |= {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


# ---- what begins and ends a text -------------------------------------------------------------------------------------


def _added_by_template(post_processor: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a post-processor puts the beginning-of-text token first, and the end-of-text token last."""
    first = last = None
    for each in _processors(post_processor):
        if each["type"] == "TemplateProcessing":
            ends = each["single"][0], each["single"][-1]
            first, last = (end["SpecialToken"]["id"] if "SpecialToken" in end else None for end in ends)
        elif each["type"] in ("BertProcessing", "RobertaProcessing"):
            first, last = each["cls"][0], each["sep"][0]
    return {
        "add_bos_token": first is not None and first == settings.get("bos_token"),
        "add_eos_token": last is not None and last == settings.get("eos_token"),
    }


def _processors(post_processor: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if post_processor is None:
        return []
    return post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]


def _template(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A post-processor that adds what the settings say, after those there are that add nothing."""
    ids = _ids_of(content, settings)
    around: dict[str, str] = {role: settings[role] for role in ("bos_token", "eos_token") if settings[f"add_{role}"]}

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": type_id}}]
        if "bos_token" in around:
            pieces.insert(0, {"SpecialToken": {"id": around["bos_token"], "type_id": type_id}})
        if "eos_token" in around:
            pieces.append({"SpecialToken": {"id": around["eos_token"], "type_id": type_id}})
        return pieces

    template = {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in around.values()},
    }
    kept = [each for each in _processors(content.get("post_processor")) if each["type"] == "ByteLevel"]
    return {"type": "Sequence", "processors": [*kept, template]} if kept else template


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Mistake(f"{file} is not valid JSON ({error}). Fetch it again.") from error
    require(isinstance(content, dict), f"{file} is not a JSON object. Fetch it again.")
    return content


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _text_of(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _without_id(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}
