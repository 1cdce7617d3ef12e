"""Whether two configs of a stage make the same thing.

A field with the metadata `HOW` says how a step runs, not what it makes: a model spread over other ranks gives the same
numbers. Everything else is part of what an artifact is.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

HOW = {"how": True}
"""Metadata of a field whose value changes nothing of what is made."""


_FORMER = {"trainer.num_nodes", "trust_checkpoint"}
"""Such fields of earlier versions, which their artifacts still name."""


def how(default: Any) -> Any:
    """Such a field with this default."""
    return dataclasses.field(default=default, metadata=HOW)


def as_dict(config: Any) -> dict[str, Any]:
    """A stage's config as the plain data that its manifest keeps; paths are strings."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def decisive(config: Any) -> dict[str, Any]:
    """Dotted key -> value of all that decides what a config, or plain data, makes."""
    if not dataclasses.is_dataclass(config):
        return _flat(config)
    only_how = set(_how_keys(type(config)))
    return {key: value for key, value in _flat(as_dict(config)).items() if not _stands_below(key, only_how)}


def differences(then: dict[str, Any], config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, then, now) of what a config, or plain data, would make otherwise than data of an earlier one did."""
    is_config = dataclasses.is_dataclass(config)
    old, new = _flat(then), _flat(as_dict(config) if is_config else config)
    only_how = _FORMER | (set(_how_keys(type(config))) if is_config else set())
    for key in sorted(old.keys() | new.keys()):
        if not _stands_below(key, only_how) and old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _how_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that say how a step runs, of a dataclass and those within."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if field.metadata.get("how"):
            yield prefix + field.name
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from _how_keys(hints[field.name], f"{prefix}{field.name}.")


def _stands_below(key: str, groups: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:depth]) in groups for depth in range(1, len(parts) + 1))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
