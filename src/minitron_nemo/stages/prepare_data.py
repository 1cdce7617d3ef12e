"""prepare-data: a corpus and a tokenizer in, token files out.

    corpus ──hold out whole documents──► training ──► (train a tokenizer) ──► train.bin/.idx, shuffled
                                     └─► validation ────────────────────────► validation.bin/.idx

The artifact also holds `tokenizer/`, and in its manifest the facts later stages check against: tokenizer_digest,
vocab_size, tokens and documents of each split, sources and their weights, corpus, licence; by which rule documents
became ids (special_tokens, begins_with, closes_with), and what was left out of each source.

One process does the work; under several ranks the first, while the others wait. One that is told to stop keeps nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from minitron_nemo.artifact import Artifact, Draft, open_artifact, writing
from minitron_nemo.checks import NothingKept, require
from minitron_nemo.config.data import STDLIB
from minitron_nemo.config.stages import PrepareDataConfig
from minitron_nemo.parallel import by_rank_zero
from minitron_nemo.progress import Reporter
from minitron_nemo.stopping import Stop
from minitron_nemo.text.corpus import (
    STDLIB_LICENCE,
    TRAIN,
    VALIDATION,
    Document,
    Reading,
    Source,
    Splitter,
    read_corpus,
)
from minitron_nemo.text.encoding import Encoder
from minitron_nemo.text.token_files import TokenFiles, encode_documents
from minitron_nemo.text.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from minitron_nemo.text.tokenizer_files import copy_tokenizer, require_tokenizer_files, tokenizer_digest

Item = TypeVar("Item")


@by_rank_zero
def check(cfg: PrepareDataConfig) -> None:
    """What can be seen of the corpus before a chain of stages begins. Raises: FileNotFoundError, ValueError."""
    Splitter(cfg.validation_fraction)
    _sources(cfg)


@by_rank_zero
def run(cfg: PrepareDataConfig) -> Artifact:
    """Prepare the data and return the artifact.

    Raises: FileNotFoundError, ValueError: a corpus or tokenizer that cannot be read, or a corpus too small to split
        or to fill the vocabulary. Nothing is left behind then, and an older artifact stays.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # the tokenizer's own threads; nothing forks here
    sources = _sources(cfg)
    splitter = Splitter(cfg.validation_fraction)
    if cfg.tokenizer is not None:
        require_tokenizer_files(cfg.tokenizer)
    sizes = survey(sources, splitter, cfg)
    with writing(cfg.output, stage="prepare-data", config=cfg) as draft:
        _write(cfg, sources, splitter, sizes, draft)
    return open_artifact(cfg.output)


@dataclass
class SourceSize:
    """What the first reading of a source found, per split, and what it left out."""

    documents: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    characters: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    chats: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def survey(sources: list[Source], splitter: Splitter, cfg: PrepareDataConfig) -> list[SourceSize]:
    """Read everything once, so that what cannot be read or split raises before anything is written."""
    render = None if cfg.tokenizer is None else Encoder(load_tokenizer(cfg.tokenizer)).render
    sizes, stop = [], Stop()
    for source in sources:
        size, reading = SourceSize(), Reading(render, cfg.max_characters)
        for document in source.documents(reading):
            split = _split_of(document, splitter)
            size.documents[split] += 1
            size.characters[split] += len(document.whole)
            size.chats += document.chat is not None
            _leave_if_asked(stop, f"looking through {source.path}")
        _require_few_null(source, reading, cfg.max_skipped)
        require(
            reading.documents > 0,
            f"corpus={source.path} is empty: no file or record in it holds more than white space"
            + (f", or at most max_characters={cfg.max_characters}" if reading.too_long else "")
            + ". Correct corpus.",
        )
        require(
            size.documents[TRAIN] > 0,
            f"corpus={source.path}: validation takes all of its documents ({size.documents[VALIDATION]}). "
            "Add documents or lower validation_fraction.",
        )
        size.skipped = {"null": reading.null, "empty": reading.empty, "too_long": reading.too_long}
        sizes.append(size)
    documents = sum(sum(size.documents.values()) for size in sizes)
    require(
        any(size.documents[VALIDATION] > 0 for size in sizes),
        f"validation_fraction={splitter.validation_fraction} holds out none of {documents} documents. "
        "Raise validation_fraction, add documents, or split the corpus into more of them.",
    )
    return sizes


def _require_few_null(source: Source, reading: Reading, limit: float) -> None:
    records = reading.documents + reading.null + reading.empty + reading.too_long
    require(
        reading.null <= limit * records,
        f"{reading.first_null} has null where its text belongs, as {reading.null} of {records} records of corpus="
        f"{source.path} do: more than max_skipped={limit}. Correct text_key or the records, or raise max_skipped to "
        "leave them out.",
    )


def _sources(cfg: PrepareDataConfig) -> list[Source]:
    return read_corpus(cfg.corpus, text_key=cfg.text_key, prompt_key=cfg.prompt_key, messages_key=cfg.messages_key)


def _write(
    cfg: PrepareDataConfig, sources: list[Source], splitter: Splitter, sizes: list[SourceSize], draft: Draft
) -> None:
    directory = draft.path / "tokenizer"
    documents = {split: sum(size.documents[split] for size in sizes) for split in (TRAIN, VALIDATION)}
    if cfg.tokenizer is None:
        with Reporter("training the tokenizer, documents", documents[TRAIN]) as reporter:
            everything = (each for source in sources for each in source.documents(Reading(None, cfg.max_characters)))
            training = (each.whole for each in everything if not splitter.is_validation(each))
            train_tokenizer(_counted(training, reporter), vocab_size=cfg.vocab_size, output=directory)
    else:
        copy_tokenizer(cfg.tokenizer, directory)
    tokenizer = load_tokenizer(directory)
    vocab_size = vocabulary_size(tokenizer)
    encoder = Encoder(tokenizer, special_tokens=cfg.special_tokens, add_bos=cfg.add_bos)

    written: list[dict[str, Any]] = []
    with Reporter("tokenising, documents", sum(documents.values())) as reporter:
        for index, (source, size) in enumerate(zip(sources, sizes, strict=True)):
            ending = f"-{index}" if len(sources) > 1 else ""
            marked = source.prompt_key is not None or size.chats > 0
            files = {
                split: TokenFiles(draft.path / f"{split}{ending}", vocab_size, marked=marked)
                for split in (TRAIN, VALIDATION)
            }
            where: deque[str] = deque()  # the split of each document the tokenizer has taken but not given back
            noted = _noting_split(source.documents(Reading(encoder.render, cfg.max_characters)), splitter, where)
            before = sum(entry["train_documents"] + entry["validation_documents"] for entry in written)
            ends_inside = 0
            for ids in _counted(encode_documents(noted, encoder), reporter, before=before):
                files[where.popleft()].add(ids)
                ends_inside += encoder.end_of_text in ids[:-1]
            entry: dict[str, Any] = {"path": source.path, "weight": source.weight, "skipped": size.skipped}
            entry |= {"chats": size.chats, "documents_ended_within": ends_inside}
            for split, pair in files.items():
                pair.finish(seed=cfg.seed)
                entry[split] = pair.prefix.name if pair.documents else None
                entry[f"{split}_documents"], entry[f"{split}_tokens"] = pair.documents, pair.tokens
            written.append(entry)

    draft.facts.update(
        tokenizer_digest=tokenizer_digest(directory),
        vocab_size=vocab_size,
        special_tokens=cfg.special_tokens,
        begins_with=tokenizer.bos_token if encoder.adds_bos else None,
        closes_with=tokenizer.eos_token,
        sources=written,
        different_texts=splitter.different_texts,
        corpus=STDLIB if _is_stdlib(sources) else ", ".join(source.path for source in sources),
        licence=cfg.licence or (STDLIB_LICENCE if _is_stdlib(sources) else "not stated; set licence"),
    )
    for what in ("tokens", "documents"):
        for split in (TRAIN, VALIDATION):
            draft.facts[f"{split}_{what}"] = sum(entry[f"{split}_{what}"] for entry in written)
    draft.metrics["tokens"] = draft.facts["train_tokens"]
    characters = sum(sum(size.characters.values()) for size in sizes)
    draft.metrics["characters_per_token"] = round(
        characters / (draft.facts["train_tokens"] + draft.facts["validation_tokens"]), 4
    )


def _split_of(document: Document, splitter: Splitter) -> str:
    return VALIDATION if splitter.is_validation(document) else TRAIN


def _noting_split(documents: Iterator[Document], splitter: Splitter, where: deque[str]) -> Iterator[Document]:
    for document in documents:
        where.append(_split_of(document, splitter))
        yield document


def _counted(items: Iterable[Item], reporter: Reporter, *, before: int = 0) -> Iterator[Item]:
    """The items as they come, their number shown; every hundredth, as showing takes longer than a short document.

    Raises: NothingKept: told to stop.
    """
    stop = Stop()
    for done, item in enumerate(items, start=before + 1):
        yield item
        if done % 100 == 0 or done == reporter.total:
            reporter.update(done)
        _leave_if_asked(stop, reporter.label)


def _leave_if_asked(stop: Stop, doing: str) -> None:
    """Raises: NothingKept."""
    if stop.asked():
        raise NothingKept(f"stopped {doing}, as it was asked to. Nothing is kept: the same command begins anew.")


def _is_stdlib(sources: list[Source]) -> bool:
    return all(source.path == STDLIB for source in sources)
