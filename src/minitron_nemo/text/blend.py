"""The prepared data of a run: which artifacts, in which proportion, and whether they fit the model that reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.checks import require
from minitron_nemo.config.data import Prepared
from minitron_nemo.text.corpus import VALIDATION
from minitron_nemo.text.tokenizer import vocabulary_size
from minitron_nemo.text.tokenizer_files import tokenizer_digest

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer


def open_blend(config: Prepared) -> list[tuple[Artifact, float]]:
    """The prepared artifacts, each with its weight.

    Raises: as `open_artifact`; ValueError: missing, unweighted or mixed.
    """
    entries = config.prepared
    require(bool(entries), "data.prepared is not set. Run prepare-data and set data.prepared to its output.")
    if isinstance(entries, (str, Path, Mapping)):
        entries = [entries]
    blend = []
    for entry in entries:
        given = entry if isinstance(entry, Mapping) else {"path": entry}
        require(
            set(given) <= {"path", "weight"} and "path" in given and ("weight" in given or len(entries) == 1),
            f"data.prepared: {entry!r} must be {{path: ..., weight: ...}} when several are blended.",
        )
        weight = float(given.get("weight", 1.0))
        require(
            0 < weight < float("inf"),
            f"data.prepared: weight={weight} of {given['path']} must be a positive number.",
        )
        blend.append((open_artifact(given["path"], made_by=["prepare-data"], key="data.prepared"), weight))
    digests = {str(artifact.path): artifact.facts["tokenizer_digest"] for artifact, _ in blend}
    require(
        len(set(digests.values())) == 1,
        f"data.prepared blends data of different tokenizers: {', '.join(digests)}. "
        "Prepare them again with one tokenizer.",
    )
    return blend


def weighted_sources(blend: list[tuple[Artifact, float]]) -> list[tuple[Artifact, dict[str, Any], float]]:
    """Every source of the artifacts with its share of training, relative.

    Sources of one artifact without weights share its weight by their number of tokens.
    """
    shares = []
    for artifact, weight in blend:
        sources = artifact.facts["sources"]
        parts = [source["weight"] if source["weight"] is not None else source["train_tokens"] for source in sources]
        shares += [(artifact, each, weight * part / sum(parts)) for each, part in zip(sources, parts, strict=True)]
    return shares


def split_prefixes(artifact: Artifact, split: str) -> list[str]:
    """Paths of a split's .bin/.idx pairs, without their endings: one per source with text there."""
    return [
        os.path.abspath(artifact.path / source[split])
        for source in artifact.facts["sources"]
        if source[f"{split}_tokens"] > 0
    ]


def held_out_sources(blend: list[tuple[Artifact, float]], seq_length: int) -> dict[str, str]:
    """Name of each source with a sample of held-out text -> path of its .bin/.idx pair without its ending.

    A source is called as its file or folder is (`stdlib`), or in a blend where its artifact has no other, as the
    artifact's folder; of sources with one name the later ones are numbered.
    """
    found: dict[str, str] = {}
    for artifact, _ in blend:
        sources = artifact.facts["sources"]
        for source in sources:
            alone = len(sources) == 1 and len(blend) > 1
            name = plain = Path(artifact.path if alone else source["path"]).name
            number = 1
            while name in found:
                number += 1
                name = f"{plain} {number}"
            found[name] = os.path.abspath(artifact.path / source[VALIDATION])
            if source[f"{VALIDATION}_tokens"] <= seq_length:
                del found[name]
    return found


def require_tokenizer_of(artifact: Artifact, tokenizer: Tokenizer) -> None:
    """The tokenizer must be the one this prepared data was made with."""
    path = tokenizer.name_or_path
    require(
        tokenizer_digest(path) == artifact.facts["tokenizer_digest"],
        f"tokenizer={path} (vocabulary {vocabulary_size(tokenizer)}) is not the tokenizer that {artifact.path} was "
        f"prepared with (vocabulary {artifact.facts['vocab_size']}). "
        f"Prepare the data again with tokenizer={path}, or use the model made for {artifact.path}/tokenizer.",
    )


def require_length(artifact: Artifact, split: str, seq_length: int) -> None:
    """A source of the split must hold at least one sample, and the label of its last token."""
    tokens = max(source[f"{split}_tokens"] for source in artifact.facts["sources"])
    require(
        tokens > seq_length,
        f"seq_length={seq_length} does not fit into the {split} text of {artifact.path}: {tokens} tokens. "
        f"Set seq_length below {tokens}, or prepare more text"
        + (" or a larger validation_fraction." if split == VALIDATION else "."),
    )


def require_documents_end_once(artifact: Artifact) -> None:
    """Documents can be told apart by the end-of-text token only where it stands nowhere else among what is learned."""
    within = sum(source.get("documents_ended_within", 0) for source in artifact.facts["sources"])
    require(
        within == 0,
        f"data.reset_at_documents=true tells documents apart by {artifact.facts.get('closes_with')}, which {within} "
        f"documents of {artifact.path} have before their end too, as chats of several turns do. Set it to false.",
    )
