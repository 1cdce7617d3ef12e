"""Which shapes a search looks at, and what they may cost: conf's `search` group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from minitron_nemo.checks import require
from minitron_nemo.config.ranges import Ranged, ranged

BANDS = ("parameters", "non_embedding_parameters", "active_parameters", "flops_per_token", "memory")
"""Costs that follow from the dims alone."""


@dataclass
class ConstraintsConfig(Ranged):
    """What every candidate keeps to; those that are not set ask for nothing, all others hold together.

    A cost is a band: `at most` as 4.5B (or a share of the model's own, 0.6), or [from, to] of two such values, of which
    either may be null.
    """

    KEY: ClassVar[str] = "constraints"

    parameters: Any = None
    """All parameters, embeddings included."""
    non_embedding_parameters: Any = None
    """Parameters of layers and final norm, as the papers count them."""
    active_parameters: Any = None
    """Parameters one token meets: all but the experts it is not routed to."""
    flops_per_token: Any = None
    """Matrix-multiply FLOPs of one token's forward pass at seq_length."""
    memory: Any = None
    """Bytes of all weights and of the key-value cache of batch_size sequences of seq_length: 16GiB."""
    batch_size: int = ranged(1, at_least=1)
    seq_length: int = ranged(4096, at_least=1)
    bytes_per_value: int = ranged(2, at_least=1, at_most=8)
    """Of a weight and of a cached key or value; 2 is bf16."""
    tensor_parallel: int = ranged(1, at_least=1)
    """Heads, query groups and neurons split over so many ranks."""
    multiple_of: dict[str, int] = ranged(of=dict, at_least=1)
    """Dims that must be multiples, as tensor cores (16 and more) or llama.cpp's K-quants (256) like them."""
    opens: bool = True
    """Whether transformers must open the shape under the model's family."""
    predicates: list[str] = field(default_factory=list)
    """Functions of yours, as `package.module.function`: called with a ModelShape, true where it may stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in BANDS:
            value = getattr(self, name)
            pair = isinstance(value, list | tuple)
            require(
                value is None or (pair and len(value) == 2) or isinstance(value, str | int | float),
                f"constraints.{name}={value} must be one value, such as 4.5B or 0.6 of the model's, or [from, to].",
            )
