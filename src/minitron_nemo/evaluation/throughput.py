"""How fast models write, side by side: each has its turn, round after round, so that what else the machine does meets
all of them. What is told are medians over the rounds.

A measurement is two runs on the same prompts, [b, s] tokens drawn at random:

    first   seconds until every sequence has its first new token       time to first token;  prefill  b s / first
    all     seconds until every sequence has its n new tokens          decode   b (n - 1) / (all - first)

Peak memory is the most that was held during both, less what was held before the model was loaded: weights, cache and
activations. Nothing communicates; one model is loaded at a time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minitron_nemo import platform
from minitron_nemo.checks import Mistake, require
from minitron_nemo.config.throughput import ThroughputConfig
from minitron_nemo.evaluation.comparison import Comparison
from minitron_nemo.evaluation.on_vllm import vllm_writer
from minitron_nemo.hf.writer import Write, has_weights, transformers_writer
from minitron_nemo.platform.memory import available_bytes, held_bytes, peak_bytes, reset_peak
from minitron_nemo.progress import Reporter

LARGEST_ON_A_CPU = 64  # sequences


@dataclass(frozen=True)
class Timed:
    """A model to be timed."""

    model: str
    """As the config names it."""
    label: str
    folder: str
    """With its config.json, and its weights where there are any."""
    parameters: int
    vocab_size: int


@dataclass
class Cell:
    """A model at a batch size, and what each turn took."""

    timed: Timed
    batch_size: int
    largest: bool
    first: list[float] = field(default_factory=list)
    """Seconds, one a turn; so `all`."""
    all: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    """Bytes."""


Clock = Callable[[], float]


def measure(models: Sequence[Timed], config: ThroughputConfig, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """What `throughput.json` holds: machine, rows and remarks.

    Args:
        clock: what counts as a second; another one may see less of what else the machine does.
    Raises: Mistake: the batch does not fit, or new tokens are too few for the clock.
    """
    gc.freeze()  # what is there already need not be looked through before every load
    try:
        cells = _timed_cells(models, config, clock)
    finally:
        gc.unfreeze()
    return {
        "machine": _machine(),
        "rows": [_row(cell, _first_of(cell, cells), config) for cell in cells],
        "remarks": _remarks(config),
    }


def _timed_cells(models: Sequence[Timed], config: ThroughputConfig, clock: Clock) -> list[Cell]:
    cells = [Cell(timed, config.batch_size, largest=False) for timed in models]
    if config.largest_batch and config.engine != "vllm":
        cells += [Cell(timed, _largest_batch(timed, models, config), largest=True) for timed in models]
    with Reporter(f"timing {len(models)} models", config.repeats * len(models)) as reporter:
        for turn in range(config.repeats):
            for place, timed in enumerate(models):
                _take_turn(timed, [cell for cell in cells if cell.timed is timed], models, config, clock)
                reporter.update(turn * len(models) + place + 1, timed.label)
    return cells


def _take_turn(
    timed: Timed, cells: Sequence[Cell], models: Sequence[Timed], config: ThroughputConfig, clock: Clock
) -> None:
    """Load, and time every batch size, smallest first, as the peak goes on from one to the next."""
    write, before = _load(timed, config)
    for cell in sorted(cells, key=lambda cell: cell.batch_size):
        prompts = _prompts(cell.batch_size, models, config)
        for _ in range(config.warmup):
            _run(write, prompts, config.new_tokens, timed)
        began = clock()
        _run(write, prompts, 1, timed)
        between = clock()
        _run(write, prompts, config.new_tokens, timed)
        cell.first.append(between - began)
        cell.all.append(clock() - between)
        cell.peaks.append(peak_bytes() - before)


def _load(timed: Timed, config: ThroughputConfig) -> tuple[Write, int]:
    """The model, which goes with the function that calls this, and what was held before; the peak counts from here."""
    dtype = platform.dtype_of(config.dtype)
    reset_peak()
    before = held_bytes()
    if config.engine == "vllm":
        write = vllm_writer(timed.folder, dtype, config.prompt_tokens + config.new_tokens)
    else:
        write = transformers_writer(timed.folder, dtype, platform.device())
    reset_peak()
    return write, before


def _prompts(batch_size: int, models: Sequence[Timed], config: ThroughputConfig) -> list[list[int]]:
    """The same for every model."""
    known_to_all = min(timed.vocab_size for timed in models)
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        known_to_all, (batch_size, config.prompt_tokens), generator=generator
    ).tolist()
    return prompts


def _run(write: Write, prompts: list[list[int]], new_tokens: int, timed: Timed) -> None:
    try:
        written = write(prompts, new_tokens)
    except torch.OutOfMemoryError as error:
        raise Mistake(
            f"throughput.batch_size: {len(prompts)} sequences of {len(prompts[0])} + {new_tokens} tokens do not fit "
            f"beside {timed.label}. Lower throughput.batch_size, prompt_tokens or new_tokens."
        ) from error
    assert [len(each) for each in written] == [new_tokens] * len(prompts)


# ---- the largest batch that fits -------------------------------------------------------------------------------------


def _largest_batch(timed: Timed, models: Sequence[Timed], config: ThroughputConfig) -> int:
    """batch_size, doubled as often as its memory is there and the limits allow.

    Where memory is limited by a number, a batch is not tried whose memory, twice that of the batch before beside the
    weights, would be beyond it: a process on a CPU that takes too much is killed.
    """
    sequences, memory = _limits(config)
    write, before = _load(timed, config)
    weights, batch = held_bytes() - before, config.batch_size
    _run(write, _prompts(batch, models, config), config.new_tokens, timed)
    while 2 * batch <= sequences and weights + 2 * (peak_bytes() - before - weights) <= memory:
        try:
            _run(write, _prompts(2 * batch, models, config), config.new_tokens, timed)
        except Mistake:
            break
        batch *= 2
    return batch


def _limits(config: ThroughputConfig) -> tuple[float, float]:
    """Sequences and bytes."""
    on_cpu = not platform.has_accelerator()
    sequences: float = LARGEST_ON_A_CPU if on_cpu else float("inf")
    memory = available_bytes() / 2 if on_cpu else float("inf")
    if config.max_batch_size is not None:
        sequences = config.max_batch_size
    if config.max_memory_gigabytes is not None:
        memory = config.max_memory_gigabytes * 1e9
    return sequences, memory


# ---- what is told ----------------------------------------------------------------------------------------------------


def _first_of(cell: Cell, cells: Sequence[Cell]) -> Cell:
    """That of the first model: at the same batch, or at its own largest."""
    return next(each for each in cells if each.largest == cell.largest)


def _row(cell: Cell, first: Cell, config: ThroughputConfig) -> dict[str, Any]:
    speeds, firsts = _speeds(cell, config), _speeds(first, config)
    return {
        "model": cell.timed.model,
        "label": cell.timed.label,
        "weights": "its own" if has_weights(cell.timed.folder) else "random",
        "parameters": cell.timed.parameters,
        "engine": config.engine,
        "dtype": str(platform.dtype_of(config.dtype)).removeprefix("torch."),
        "batch_size": cell.batch_size,
        "largest": cell.largest,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "prefill_tokens_per_s": speeds["prefill"],
        "decode_tokens_per_s": speeds["decode"],
        "time_to_first_token_s": statistics.median(cell.first),
        "peak_memory_bytes": None if config.engine == "vllm" else int(statistics.median(cell.peaks)),
        "times_first_model": {name: speed / firsts[name] for name, speed in speeds.items()},
        "seconds": {"first": cell.first, "all": cell.all},
    }


def _speeds(cell: Cell, config: ThroughputConfig) -> dict[str, float]:
    """Tokens per second, of the medians."""
    first, whole = statistics.median(cell.first), statistics.median(cell.all)
    require(
        first < whole,
        f"throughput.new_tokens={config.new_tokens} took {cell.timed.label} no longer than the first of them: too few "
        "to be timed here. Raise throughput.new_tokens.",
    )
    return {
        "prefill": cell.batch_size * config.prompt_tokens / first,
        "decode": cell.batch_size * (config.new_tokens - 1) / (whole - first),
    }


def _machine() -> str:
    if platform.has_accelerator():
        return torch.cuda.get_device_name(platform.device())
    return f"a CPU, {torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"


def _remarks(config: ThroughputConfig) -> list[str]:
    said = [f"Medians of {config.repeats} turns, one model after the other."]
    if config.engine == "vllm":
        said.append("vLLM queues what does not fit and takes its memory at once: no largest batch, no peak memory.")
    elif config.largest_batch:
        sequences, memory = _limits(config)
        ends = [f"{sequences:.0f} sequences"] if sequences < float("inf") else []
        ends += [f"{memory / 2**30:.1f} GiB of memory"] if memory < float("inf") else []
        end = f"at most {' and '.join(ends)}" if ends else "until the device's memory was full"
        said.append(f"The largest batch is {config.batch_size} doubled, {end}.")
    return said


def comparison(found: dict[str, Any]) -> Comparison:
    """The rows of `measure` as a table."""
    headers = ["model", "batch", "prompt + new", "prefill tokens/s", "decode tokens/s", "first token (s)",
               "peak memory (GiB)", "prefill", "decode"]  # fmt: skip
    rows = []
    for row in found["rows"]:
        peak, times = row["peak_memory_bytes"], row["times_first_model"]
        rows.append([
            row["label"] + (" (random weights)" if row["weights"] == "random" else ""),
            f"{row['batch_size']}" + (" (largest)" if row["largest"] else ""),
            f"{row['prompt_tokens']} + {row['new_tokens']}", f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.1f}", f"{row['time_to_first_token_s']:.3f}",
            "\u2013" if peak is None else f"{peak / 2**30:.2f}", f"{times['prefill']:.2f}x", f"{times['decode']:.2f}x",
        ])  # fmt: skip
    engine = {(row["engine"], row["dtype"]) for row in found["rows"]}
    on = ", ".join(sorted(f"{name} in {dtype}" for name, dtype in engine))
    verdict = [f"On {found['machine']}, {on}; the last two columns are multiples of the first model's."]
    return Comparison(headers, rows, [*verdict, *found["remarks"]], title="Throughput")
