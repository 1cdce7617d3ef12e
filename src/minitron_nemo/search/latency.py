"""How long every candidate takes on the machine at hand, from timings of parts that they share.

A candidate's layers are alike, so its time is layers * (attention + MLP) + the rest. An attention is timed once for its
hidden size, heads and query groups, an MLP once for its hidden size and neurons or experts, the rest once for its
hidden size; one model of a single layer times one of each (runtime/timings.py).

    time_to_first_token      seconds of a pass over a prompt of seq_length tokens, batch_size of them at once
    time_per_output_token    seconds of a pass over one more token of each, the others in the cache
    throughput               tokens per second while they are generated, of all batch_size together

By Megatron-core's modules: an engine that fuses more is faster, and orders candidates much the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.config.search import TIMED
from minitron_nemo.config.trainer import Layout
from minitron_nemo.counts import Counts
from minitron_nemo.runtime.timings import PROMPT, TOKEN, Timings
from minitron_nemo.search.ledger import Ledger
from minitron_nemo.shape import ModelShape

PARTS = {
    "attention": ("hidden_size", "num_attention_heads", "num_query_groups"),
    "mlp": (
        "hidden_size",
        "ffn_hidden_size",
        "num_moe_experts",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
    ),
    "rest": ("hidden_size",),
}
"""Part -> the dims that decide how long it takes."""

Sizes = tuple[int, ...]
"""Of a part's dims; 0 for one that the model does not have."""


def why_untimed(source: ModelShape, layout: Layout) -> str | None:
    """Why candidates cannot be timed here; None: they can."""
    if source.moe_layer_freq is not None:
        return "a search times layers that are alike, and this model has layers with experts and without"
    if layout.pipeline_model_parallel_size > 1:
        return "a search times one layer, which has no pipeline. Set trainer.pipeline_model_parallel_size=1"
    if layout.sequence_parallel or layout.context_parallel_size > 1:
        return (
            "a search times single tokens, which cannot be split. Set trainer.sequence_parallel=false and "
            "trainer.context_parallel_size=1"
        )
    return None


class Times:
    """Every candidate's times; a part is measured when it is first asked for."""

    def __init__(
        self, source: ModelShape, ledger: Ledger, measure: Callable[[ModelShape], Timings], *, batch_size: int
    ) -> None:
        """
        Args:
            ledger: what was measured, a part and its sizes -> {prompt, token} in seconds.
            measure: times a model of one layer. Communicates: all ranks.
            batch_size: sequences at once, as `measure` runs them.
        """
        self._source, self._ledger, self._measure, self._batch_size = source, ledger, measure, batch_size

    def of(self, counts: Counts) -> dict[str, NDArray[np.float64]]:
        """By `config.search.TIMED`, [n] each; [1] where every dim is one number. Communicates: where a part is new."""
        columns = {dim: _column(counts, dim) for dims in PARTS.values() for dim in dims}
        number = max(map(len, columns.values()))
        found = {}
        for part, dims in PARTS.items():
            rows = np.stack([np.broadcast_to(columns[dim], number) for dim in dims], axis=1)
            sizes, where = np.unique(rows, axis=0, return_inverse=True)
            found[part] = [tuple(row) for row in sizes.tolist()], where.reshape(-1)
        self._measure_missing({part: sizes for part, (sizes, _) in found.items()})
        seconds = {}
        for kind in (PROMPT, TOKEN):
            each = {
                part: np.array([self._ledger[_name(part, row)][kind] for row in sizes])[where]
                for part, (sizes, where) in found.items()
            }
            seconds[kind] = _column(counts, "num_layers") * (each["attention"] + each["mlp"]) + each["rest"]
        times = (seconds[PROMPT], seconds[TOKEN], self._batch_size / seconds[TOKEN])
        return dict(zip(TIMED, times, strict=True))

    def _measure_missing(self, wanted: Mapping[str, Sequence[Sizes]]) -> None:
        """One layer holds an attention and an MLP, so that of each hidden size it takes as many as there are of one."""
        missing = {
            part: [row for row in sizes if _name(part, row) not in self._ledger] for part, sizes in wanted.items()
        }
        for hidden in sorted({row[0] for sizes in missing.values() for row in sizes}):
            attentions, mlps = ([row for row in wanted[part] if row[0] == hidden] for part in ("attention", "mlp"))
            lacks = [[row for row in missing[part] if row[0] == hidden] for part in ("attention", "mlp")]
            pairs = itertools.zip_longest(*lacks) if any(lacks) else [(attentions[0], mlps[0])]
            for attention, mlp in pairs:
                rows = {"attention": attention or attentions[0], "mlp": mlp or mlps[0], "rest": (hidden,)}
                dims = {dim: size for part, row in rows.items() for dim, size in zip(PARTS[part], row, strict=True)}
                timings = self._measure(
                    self._source.pruned_to(num_layers=1, **{d: size for d, size in dims.items() if size})
                )
                for part, row in rows.items():
                    if _name(part, row) not in self._ledger:
                        self._ledger.put(
                            _name(part, row), {kind: timings[f"{kind} {part}"] for kind in (PROMPT, TOKEN)}
                        )


def _column(counts: Counts, dim: str) -> NDArray[np.int64]:
    value = getattr(counts, dim)
    return np.atleast_1d(np.asarray(0 if value is None else value, np.int64))


def _name(part: str, sizes: Sizes) -> str:
    return f"{part} {', '.join(f'{dim}={size}' for dim, size in zip(PARTS[part], sizes, strict=True) if size)}"
