"""Times of candidates: parts are measured once each, on the machine at hand, and add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minitron_nemo.checks import Mistake
from minitron_nemo.config.search import ConstraintsConfig
from minitron_nemo.config.trainer import Layout
from minitron_nemo.runtime.timings import Timings, timings_of
from minitron_nemo.search.constraints import constraints_of, feasible, timed_constraints_of
from minitron_nemo.search.latency import Times, why_untimed
from minitron_nemo.search.ledger import Ledger
from minitron_nemo.search.share import Share
from minitron_nemo.search.space import Space
from minitron_nemo.shape import ModelShape
from search.test_space import EXPERTS, TINY
from support.megatron import build_gpt
from support.ranks import Ranks

DIMS = {"num_layers": [3, 5], "hidden_size": [24, 48], "ffn_hidden_size": [28, 56, 112], "num_attention_heads": [4, 6]}


def seconds_of(shape: ModelShape) -> Timings:
    """What parts would take if time were in the dims: seconds that say which sizes they are of."""
    attention, mlp = shape.hidden_size * shape.num_attention_heads, shape.hidden_size * shape.ffn_hidden_size
    prompt = {"prompt attention": attention, "prompt mlp": mlp, "prompt rest": shape.hidden_size}
    return {name: float(each) for name, each in prompt.items()} | {
        name.replace("prompt", "token"): each / 1000 for name, each in prompt.items()
    }


class Measured:
    def __init__(self, folder: Path) -> None:
        self.shapes: list[ModelShape] = []
        ledger = Ledger(folder / "times.json", {})
        self.times = Times(TINY, ledger, Share(folder), self.measure, batch_size=4)

    def measure(self, shape: ModelShape) -> Timings:
        self.shapes.append(shape)
        return seconds_of(shape)


def test_parts_are_measured_once_and_add_up(tmp_path: Path) -> None:
    measured, space = Measured(tmp_path), Space.of(TINY, DIMS)
    found = feasible(space, [])
    columns = space.columns(found.numbers)

    times = measured.times.of(columns)

    whole = [
        shape.num_layers * shape.hidden_size * (shape.num_attention_heads + shape.ffn_hidden_size) + shape.hidden_size
        for shape in found.shapes()
    ]
    np.testing.assert_allclose(times["time_to_first_token"], whole)
    np.testing.assert_allclose(times["time_per_output_token"], np.array(whole) / 1000)
    np.testing.assert_allclose(times["throughput"], 4000 / np.array(whole))
    assert [shape.num_layers for shape in measured.shapes] == [1] * 6, "of each hidden size as many as there are MLPs"

    np.testing.assert_allclose(Measured(tmp_path).times.of(TINY)["time_to_first_token"], 5 * 48 * (6 + 112) + 48)
    again = Measured(tmp_path)
    again.times.of(columns)
    assert not again.shapes, "what stands beside the output is not measured again"


@pytest.mark.parametrize(
    ("constraints", "low", "high"),
    [
        ({"time_to_first_token": "15000s"}, 0, 15_000),
        ({"time_per_output_token": "15000ms"}, 0, 15_000),
        ({"time_to_first_token": 0.5}, 0, 0.5 * (5 * 48 * 118 + 48)),
        ({"throughput": 0.4}, 0, 70_000),  # of the model's own 0.14 tokens per second, at least
        ({"throughput": ["0.4K", None]}, None, None),
    ],
)
def test_times_are_bands_as_other_costs_are(
    tmp_path: Path, constraints: dict, low: float | None, high: float | None
) -> None:
    space, config = Space.of(TINY, DIMS), ConstraintsConfig(**constraints, parameters=0.9)
    before = feasible(space, constraints_of(config, TINY))
    timed = timed_constraints_of(config, TINY, Measured(tmp_path).times.of)
    if high is None:
        with pytest.raises(Mistake, match=r"throughput=\['0.4K', None\] is met by none of the .* nearest have 1\.72 "):
            feasible(space, timed, of=before)
        return

    found = feasible(space, timed, of=before)

    def seconds(shape: ModelShape) -> float:
        layers = shape.num_layers * shape.hidden_size * (shape.num_attention_heads + shape.ffn_hidden_size)
        return layers + shape.hidden_size

    assert list(found.shapes()) == [shape for shape in before.shapes() if low <= seconds(shape) <= high]
    assert found.left["every shape"] == before.count and len(found.left) == len(before.left) + 1


def test_a_plain_number_above_one_is_seconds_and_a_unit_is_no_share(tmp_path: Path) -> None:
    times = Measured(tmp_path).times.of
    words = [
        timed_constraints_of(ConstraintsConfig(time_to_first_token=value), TINY, times)[0].words
        for value in (2, "2s", "0.5s", "500ms")
    ]
    assert words == [f"constraints.time_to_first_token={value}" for value in (2, "2s", "0.5s", "500ms")]
    with pytest.raises(Mistake, match=r"time_to_first_token=5 minutes is not a number above 0.* us, ms, s"):
        timed_constraints_of(ConstraintsConfig(time_to_first_token="5 minutes"), TINY, times)


def timed(ffn_hidden_size: int) -> Timings:
    shape = replace(TINY, num_layers=1, ffn_hidden_size=ffn_hidden_size)
    return timings_of(build_gpt(shape), batch_size=2, seq_length=16, repeats=3)


def test_a_wider_mlp_takes_longer(ranks: Ranks) -> None:
    wide, narrow = (ranks("single").run(timed, size)[0] for size in (32 * 1024, 16))
    assert wide["prompt mlp"] > narrow["prompt mlp"] > 0


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_ranks_agree_on_times(ranks: Ranks, layout: str) -> None:
    one, other = ranks(layout).run(timed, 32)
    assert one == other
    assert set(one) == {f"{kind} {part}" for kind in ("prompt", "token") for part in ("attention", "mlp", "rest")}


@pytest.mark.parametrize(
    ("source", "layout", "said"),
    [
        (TINY, Layout(pipeline_model_parallel_size=2), "pipeline_model_parallel_size=1"),
        (TINY, Layout(tensor_model_parallel_size=2, sequence_parallel=True), "sequence_parallel=false"),
        (EXPERTS, Layout(), None),
        (TINY, Layout(tensor_model_parallel_size=2), None),
    ],
)
def test_what_cannot_be_timed_is_said(source: ModelShape, layout: Layout, said: str | None) -> None:
    found = why_untimed(source, layout)
    assert (found is None) if said is None else (found is not None and said in found)
