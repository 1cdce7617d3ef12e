"""What a user did wrong, in one message: the key as they typed it, what it may be, and the mend.

Hydra and OmegaConf speak of nodes, structs and merges; their errors are reworded here. Ours pass through.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_nemo.checks import CannotWrite, Mistake, did_you_mean
from minitron_nemo.conf_tree import WIRING, conf_dir, recipes

MISTAKES = (Mistake, HydraException, OmegaConfBaseException)
"""Errors that are a user's to mend; any other keeps its traceback."""

_FORMER_KEYS = {
    "trainer.num_nodes": "trainer.num_nodes is no key any more: the launcher says how many nodes there are "
    "(torchrun --nnodes, slurm.nodes). Leave it out.",
    "trust_checkpoint": "trust_checkpoint is no key any more: nothing in a checkpoint is run, whoever made it. "
    "Leave it out.",
    "compress.overwrite": "compress.overwrite is no key any more: overwrite=true replaces what differs, at every door.",
}


def explain(error: Exception, door: str, overrides: Sequence[str]) -> str:
    """One message a tired person can use."""
    text = str(error).strip()
    for key, mend in _FORMER_KEYS.items():
        named = re.search(rf"(?<![\w/-]){re.escape(key)}(?![\w/-])", text)  # and not a part of a path
        if named or getattr(error, "full_key", None) == key:
            return mend
    if "You must specify 'recipe'" in text:
        return f"say which recipe: recipe=<name>. Known: {', '.join(recipes())}."
    if match := re.match(r"In '.*': Could not find 'recipe/(.*)'", text):
        return f"recipe={match[1]} is not a file under {conf_dir() / 'recipe'}; {did_you_mean(match[1], recipes())}"
    if match := re.match(r"Could not override '(.*)'", text):
        return _unknown_key(match[1], door, overrides)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as key=value ({_reason(text)}). "
            "Quote what the shell or Hydra would take apart: 'key=[a, b]', 'key=\"a, b\"'."
        )
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        return f"{text.removeprefix('Error merging override ')}: {_first_line(cause)}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}"
    if isinstance(error, CannotWrite) and error.strerror:
        return error.strerror
    return text


def _reason(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith(("Error parsing override", "See https"))]
    return lines[0] if lines else text


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] + "."


def _unknown_key(key: str, door: str, overrides: Sequence[str]) -> str:
    chosen = [override for override in overrides if override.startswith("recipe=")]
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = hydra.compose(WIRING, chosen)
    path, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, path, throw_on_resolution_failure=False) if path else config
    every = f"All keys: minitron {door} {' '.join(chosen)} --cfg job"
    if isinstance(parent, DictConfig) and path and OmegaConf.get_type(parent) is dict:  # takes keys of its own
        near = difflib.get_close_matches(name, [str(each) for each in parent], n=1, cutoff=0.8)
        hint = f"; did you mean {path}.{near[0]}?" if near else "."
        return f"{key} is not in this recipe{hint} A new entry of {path} is written with a plus: +{key}=..."
    written = OmegaConf.to_container(config, resolve=False)
    known = list(_keys(written))
    found = [each for each in known if each.endswith(f".{key}")] or difflib.get_close_matches(
        key, known, n=1, cutoff=0.8
    )
    if found:
        return f"{key} is not a key of this recipe; did you mean {' or '.join(found[:3])}? {every}"
    # the longest part of it that is there, and what stands below
    while path and not isinstance(OmegaConf.select(config, path, throw_on_resolution_failure=False), DictConfig):
        path = path.rpartition(".")[0]
    below = OmegaConf.select(config, path, throw_on_resolution_failure=False) if path else config
    where = f"known below {path}" if path else "known"
    return f"{key} is not a key of this recipe; {where}: {', '.join(sorted(map(str, below)))}. {every}"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key by its whole name, leaves and groups."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield prefix + name
            yield from _keys(value, f"{prefix}{name}.")
