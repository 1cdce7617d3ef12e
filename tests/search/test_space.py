"""Which shapes a search looks at: the papers' grids, and what it says where nobody is left."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from minitron_nemo.checks import Mistake
from minitron_nemo.config.search import ConstraintsConfig
from minitron_nemo.published import PUBLISHED
from minitron_nemo.search.constraints import constraints_of, feasible
from minitron_nemo.search.space import Space
from minitron_nemo.shape import ModelShape

TINY = ModelShape(
    family="llama",
    num_layers=5,
    hidden_size=48,
    ffn_hidden_size=112,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    padded_vocab_size=320,
)
EXPERTS = ModelShape(
    family="qwen3_moe",
    num_layers=3,
    hidden_size=40,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    padded_vocab_size=320,
    qk_layernorm=True,
    num_moe_experts=8,
    moe_ffn_hidden_size=24,
    moe_router_topk=2,
)
# arXiv:2407.14679, table 9 (NeurIPS layout); its 4680 reads 4608, the size its table 19 lists
GRID_8B = {
    "num_layers": {"from": 29, "to": 32, "step": 1},
    "num_attention_heads": [32, 48],
    "ffn_expansion": [2.5, 3, 3.5, 4],
    "hidden_size": [4096, 4608, 5120, 5632, 6144],
}
GRID_4B = GRID_8B | {"num_attention_heads": [24, 32, 48], "hidden_size": [2560, 3072, 3584, 4096, 4608]}
PUBLISHED_8B = {  # table 19: layers, heads, neurons, hidden size
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096),
    (31, 32, 12800, 5120), (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096),
    (30, 32, 12800, 5120), (30, 32, 16128, 4608), (30, 48, 13824, 4608), (30, 48, 16384, 4096),
    (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip


EVERYTHING = {
    "num_layers": [2, 5],
    "hidden_size": {"from": 16, "to": 48, "multiple_of": 12},
    "num_query_groups": [1, 2],
    "num_attention_heads": [2, 3, 4, 6],
    "ffn_hidden_size": {"from": 0.5, "step": 28},
}


def of(source: ModelShape, dims: dict, **constraints: object) -> list[ModelShape]:
    found = feasible(Space.of(source, dims), constraints_of(ConstraintsConfig(**constraints), source))
    shapes = list(found.shapes())
    assert len(shapes) == found.count
    return shapes


def dims_of(shape: ModelShape) -> tuple[int, int, int, int]:
    return shape.num_layers, shape.num_attention_heads, shape.ffn_hidden_size, shape.hidden_size


def test_the_papers_8b_space_has_their_fifteen_candidates() -> None:
    assert {
        dims_of(shape) for shape in of(PUBLISHED["Nemotron-4 15B"], GRID_8B, parameters=["7.8B", "8.5B"])
    } == PUBLISHED_8B


def test_the_papers_4b_space_has_eighteen_candidates_the_published_model_among_them() -> None:
    found = [dims_of(shape) for shape in of(PUBLISHED["Nemotron-4 15B"], GRID_4B, parameters=["3.8B", "4.2B"])]
    assert len(found) == 18
    assert (32, 24, 9216, 3072) in found


@pytest.mark.parametrize(
    ("source", "dims"),
    [
        (TINY, EVERYTHING),
        (EXPERTS, {"num_moe_experts": [1, 2, 5, 8], "moe_ffn_hidden_size": [8, 24], "hidden_size": [24, 40]}),
    ],
)
def test_arrays_count_what_one_model_counts(source: ModelShape, dims: dict) -> None:
    """Every candidate once, and those alone that pruning can make; each cost as its shape has it."""
    space = Space.of(source, dims)
    [columns] = list(space.chunks())
    costs = ("num_parameters", "num_non_embedding_parameters", "num_active_parameters")
    counted = {name: getattr(columns, name) for name in costs}
    counted["flops"], counted["cache"] = columns.flops_per_token(96), columns.kv_bytes_per_token()
    made = []
    arrays = [np.broadcast_to(np.asarray(values), columns.numbers.shape) for values in counted.values()]
    for number, *values in zip(columns.numbers, *arrays, strict=True):
        shape = space.shape(int(number))
        made.append(shape)
        expected = [*(getattr(shape, name) for name in costs), shape.flops_per_token(96), shape.kv_bytes_per_token()]
        assert [int(value) for value in values] == expected
    possible = set()
    for values in itertools.product(*space.dims.values()):
        try:
            possible.add(source.pruned_to(**dict(zip(space.dims, map(int, values), strict=True))))
        except Mistake:
            continue
    groups = {shape for shape in possible if shape.heads_per_group <= source.heads_per_group}
    assert set(made) == groups and len(made) == len(groups)


def test_constraints_hold_together() -> None:
    dims = {"hidden_size": [24, 36, 48], "ffn_hidden_size": [28, 56, 84, 112], "num_attention_heads": [2, 4, 6]}
    whole = TINY.num_parameters
    found = of(
        TINY,
        dims,
        parameters=[None, 0.8],
        non_embedding_parameters=["5K", None],
        memory="200KB",
        batch_size=2,
        seq_length=64,
        tensor_parallel=2,
        multiple_of={"ffn_hidden_size": 56},
        predicates=["search.test_space.wide_enough"],
    )
    expected = [
        shape
        for h, f, n in itertools.product(*dims.values())
        if (shape := TINY.pruned_to(hidden_size=h, ffn_hidden_size=f, num_attention_heads=n)).num_parameters
        <= 0.8 * whole
        and shape.num_non_embedding_parameters >= 5000
        and 2 * shape.num_parameters + 128 * shape.kv_bytes_per_token() <= 200_000
        and f % 56 == 0
        and wide_enough(shape)
        and h % n == 0
    ]
    assert found == expected and 0 < len(expected) < 36


def wide_enough(shape: ModelShape) -> bool:
    return shape.hidden_size > 24


HIDDEN = {"hidden_size": [24, 36]}


@pytest.mark.parametrize(
    ("dims", "constraints", "said"),
    [
        (HIDDEN, {"parameters": ["1K", "2K"]}, r"'2K'\] is met by none of the 2 .* nearest have .*\(hidden_size=24\)"),
        (HIDDEN, {"multiple_of": {"hidden_size": 32}}, "multiple_of.hidden_size=32 is met by none of the 2 "),
        ({"num_attention_heads": [1, 5]}, {}, "None of the 2 shapes .*heads must fill"),
        ({"hidden_size": [24, 60]}, {}, "reaches 60, and the source's hidden_size is 48"),
        ({"hiden_size": [24]}, {}, "did you mean hidden_size"),
        ({"hidden_size": {"to": 48}}, {}, "must have from"),
        ({"hidden_size": {"from": 12, "too": 48, "step": 12}}, {}, "too is not known"),
        ({"ffn_expansion": [2], "ffn_hidden_size": [28]}, {}, "the same dim"),
        ({}, {}, "empty"),
        (HIDDEN, {"parameters": "4.5X"}, "constraints.parameters=4.5X is not a number"),
        (HIDDEN, {"predicates": ["search.test_space.nobody"]}, "nobody is not there"),
        (HIDDEN, {"multiple_of": {"hiden_size": 8}}, "did you mean hidden_size"),
    ],
)
def test_what_cannot_be_is_said_with_the_way_out(dims: dict, constraints: dict, said: str) -> None:
    with pytest.raises(Mistake, match=said):
        of(TINY, dims, **constraints)
