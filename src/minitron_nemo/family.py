"""A family: several students of one recipe, each made of the one before.

Of `family: [8b, 4b]` the steps of `MEMBER_STEPS` run once a member, as `prune_8b`, `distill_8b`, ..., `prune_4b`. Each
takes its values `from` the step of compress.steps that it repeats, but for what it is made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from minitron_nemo.checks import require

MEMBER_STEPS = ("estimate_importance", "prune", "distill", "evaluate", "export_hf")
"""What each member has one of."""
FIRST, LAST = "first", "last"
"""Who teaches: the first teacher all members, or each member the next."""


def wirings(members: Sequence[str], teacher: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Name of a member's step -> the step it repeats, and its inputs, as interpolations.

    Raises: Mistake: a member's name or a teacher that cannot be.
    """
    for member in members:
        require(
            f"prune_{member}".isidentifier() and members.count(member) == 1,
            f"family={list(members)}: {member} must be letters, digits and underscores, and there once.",
        )
    require(
        teacher in (FIRST, LAST),
        f"family_teacher={teacher} must be {FIRST}, which teaches all members, or {LAST}, the member before each.",
    )
    return {
        f"{step}_{member}": (step, wiring)
        for before, member in zip([None, *members], members, strict=False)
        for step, wiring in _inputs(member, before, teacher).items()
    }


def _inputs(member: str, before: str | None, teacher: str) -> dict[str, dict[str, str]]:
    """`before`: the member that it is made of, None where that is the teacher."""
    model = f"${{distill_{member}.output}}"
    source = {} if before is None else {"model": f"${{distill_{before}.output}}"}
    taught = {} if before is None or teacher == FIRST else {"teacher": f"${{distill_{before}.output}}"}
    scores = f"estimate_importance_{member}"
    return {
        "estimate_importance": source,
        "prune": {"model": f"${{{scores}.model}}", "importance": f"${{{scores}.output}}"},
        "distill": {"student": f"${{prune_{member}.output}}", **taught},
        "evaluate": {"model": model},
        "export_hf": {"model": model},
    }


def spread(names: Sequence[str], config: DictConfig) -> list[str]:
    """The steps of a composed recipe with its members' in place of those they repeat, together, behind what stands
    among them.

    Raises: Mistake: members that would be alike, write to one place, or learn from what one teacher has said.
    """
    repeated = [name for name in names if name in MEMBER_STEPS]
    if not (config.family and repeated):
        return list(names)
    _require_members(config)
    last = names.index(repeated[-1])
    before, behind = [name for name in names[:last] if name not in MEMBER_STEPS], names[last + 1 :]
    return [*before, *(f"{step}_{member}" for member in config.family for step in repeated), *behind]


def _require_members(config: DictConfig) -> None:
    def of(key: str) -> Any:
        value = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    stored, corrected = of("distill.teacher_logits"), of("distill.corrected_teacher")
    require(
        config.family_teacher == FIRST or stored is None,
        f"family_teacher={LAST}: more than one teacher, and distill.teacher_logits={stored} is of one. Leave one out.",
    )
    require(
        len(config.family) < 2 or corrected is None,
        f"distill.corrected_teacher={corrected} would be written by every member of the family. Set "
        f"distill_{config.family[0]}.corrected_teacher and so on.",
    )
    for before, member in itertools.pairwise(config.family):
        keys = ("target", "layers", "keep", "budget")
        cuts = [{key: of(f"prune_{each}.{key}") for key in keys} for each in (before, member)]
        require(
            cuts[0] != cuts[1] or bool(cuts[1]["keep"]),  # which are shares of the one before
            f"family: {member} would be what {before} is: prune_{member} has the same target and layers. Set "
            f"prune_{member}.target.",
        )
