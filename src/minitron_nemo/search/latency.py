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

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minitron_nemo import engine, platform
from minitron_nemo.checks import require
from minitron_nemo.config.identity import as_dict
from minitron_nemo.config.search import TIMED, ConstraintsConfig
from minitron_nemo.config.trainer import Layout, TrainerConfig
from minitron_nemo.counts import Counts
from minitron_nemo.parallel import is_rank_zero, rank_zero_says
from minitron_nemo.runtime.timings import PROMPT, TOKEN, Timings, timings_of
from minitron_nemo.search.ledger import Ledger
from minitron_nemo.search.share import Share
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

_LOCK = "times"

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


def require_timable(limits: ConstraintsConfig, source: ModelShape, layout: Layout) -> None:
    """Raises: Mistake: a time is limited that cannot be measured."""
    asked, why = [name for name in TIMED if getattr(limits, name) is not None], why_untimed(source, layout)
    require(not asked or why is None, f"constraints.{next(iter(asked), '')}: {why}, or leave it out.")


class Times:
    """Every candidate's times; a part is measured when it is first asked for."""

    def __init__(
        self,
        source: ModelShape,
        ledger: Ledger,
        share: Share,
        measure: Callable[[ModelShape], Timings],
        *,
        batch_size: int,
    ) -> None:
        """
        Args:
            ledger: what was measured, a part and its sizes -> {prompt, token} in seconds.
            share: of the search; one process at a time measures, so that all reckon with the same times.
            measure: times a model of one layer. Communicates: all ranks.
            batch_size: sequences at once, as `measure` runs them.
        """
        self._source, self._ledger, self._share, self._measure = source, ledger, share, measure
        self._batch_size = batch_size

    def of(self, counts: Counts) -> dict[str, NDArray[np.float64]]:
        """By `config.search.TIMED`, [n] each; [1] where every dim is one number. Communicates: where a part is new."""
        columns = {dim: _column(counts, dim) for dims in PARTS.values() for dim in dims}
        number = max(map(len, columns.values()))
        found = {}
        for part, dims in PARTS.items():
            rows = np.stack([np.broadcast_to(columns[dim], number) for dim in dims], axis=1)
            sizes, where = np.unique(rows, axis=0, return_inverse=True)
            found[part] = [tuple(row) for row in sizes.tolist()], where.reshape(-1)
        wanted = {part: sizes for part, (sizes, _) in found.items()}

        def made() -> list[str]:
            self._ledger.look()
            return [] if any(self._missing(wanted).values()) else [_LOCK]

        self._share.out([_LOCK], made=made, make=lambda _: self._measure_missing(wanted))
        self._ledger.look()
        seconds = {}
        for kind in (PROMPT, TOKEN):
            each = {
                part: np.array([self._ledger[_name(part, row)][kind] for row in sizes])[where]
                for part, (sizes, where) in found.items()
            }
            seconds[kind] = _column(counts, "num_layers") * (each["attention"] + each["mlp"]) + each["rest"]
        times = (seconds[PROMPT], seconds[TOKEN], self._batch_size / seconds[TOKEN])
        return dict(zip(TIMED, times, strict=True))

    def _missing(self, wanted: Mapping[str, Sequence[Sizes]]) -> dict[str, list[Sizes]]:
        return {
            part: [each for each in sizes if _name(part, each) not in self._ledger] for part, sizes in wanted.items()
        }

    def _measure_missing(self, wanted: Mapping[str, Sequence[Sizes]]) -> None:
        """A model holds one attention and one MLP, so that of each hidden size it takes as many as there are of one."""
        missing = self._missing(wanted)
        for hidden in sorted({each[0] for sizes in missing.values() for each in sizes}):
            lacks, any_of = (
                {part: [each for each in sizes if each[0] == hidden] for part, sizes in of.items()}
                for of in (missing, wanted)
            )
            number = max(map(len, lacks.values()))
            for place in range(number):
                parts = {part: (lacks[part][place:] or any_of[part])[0] for part in PARTS}
                timings = self._measure(_one_layer(self._source, parts))
                for part, sizes in parts.items():
                    if _name(part, sizes) not in self._ledger:
                        entry = {kind: timings[f"{kind} {part}"] for kind in (PROMPT, TOKEN)}
                        self._ledger.put(_name(part, sizes), entry)


def times_here(
    source: ModelShape, trainer: TrainerConfig, limits: ConstraintsConfig, directory: Path, share: Share
) -> Times:
    """On this machine and its layout, whose groups stand; measured times stay in `directory`."""
    dtype = platform.dtype_of(trainer.precision)
    decides = {
        "model": as_dict(source),
        "batch_size": limits.batch_size,
        "seq_length": limits.seq_length,
        "dtype": str(dtype),
        "tensor_model_parallel_size": trainer.tensor_model_parallel_size,
        "expert_model_parallel_size": trainer.expert_model_parallel_size,
        "device": rank_zero_says(platform.device_name()),
    }

    def measure(shape: ModelShape) -> Timings:
        if is_rank_zero():
            dims = ", ".join(f"{dim}={getattr(shape, dim)}" for dim in shape.prunable_dims if dim != "num_layers")
            print(f"    timing a layer of {dims}", file=sys.stderr, flush=True)
        core = engine.new_core(shape, trainer, dtype)
        return timings_of(core, batch_size=limits.batch_size, seq_length=limits.seq_length)

    ledger = Ledger(directory / "timings.json", decides)
    return Times(source, ledger, share, measure, batch_size=limits.batch_size)


def _one_layer(source: ModelShape, parts: Mapping[str, Sizes]) -> ModelShape:
    dims = {dim: size for part, sizes in parts.items() for dim, size in zip(PARTS[part], sizes, strict=True)}
    return source.pruned_to(num_layers=1, **{dim: size for dim, size in dims.items() if size})


def _column(counts: Counts, dim: str) -> NDArray[np.int64]:
    value = getattr(counts, dim)
    return np.atleast_1d(np.asarray(0 if value is None else value, np.int64))


def _name(part: str, sizes: Sizes) -> str:
    return f"{part} {', '.join(f'{dim}={size}' for dim, size in zip(PARTS[part], sizes, strict=True) if size)}"
