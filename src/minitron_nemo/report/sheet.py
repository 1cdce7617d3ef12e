"""A section of the report that is a table of text: the same for the page and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Sheet:
    """Title, cells and what is to be said of them."""

    key: str
    """Id on the page."""
    title: str
    headers: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    pictures: list[Markup] = field(default_factory=list)
    """On the page alone."""
