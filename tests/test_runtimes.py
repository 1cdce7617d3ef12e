"""Which shapes other programs take: refusals as their programs refuse, and dims they run well."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from minitron_nemo.hf.config import hf_config
from minitron_nemo.runtimes import as_family, nearest_that_opens, opening_problem, require_opens, suits
from minitron_nemo.shape import ModelShape
from support.transformers5 import transformers5

SOURCE = ModelShape("llama", 2, 32, 80, 8, 2, 6, 512)
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 20, "moe_router_topk": 2}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "nemotron": {"normalization": "LayerNorm1p", "activation": "squared_relu", "gated_linear_unit": False},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "mixtral": MOE,
    "qwen3_moe": MOE | {"qk_layernorm": True},
}
OPEN_EACH = """
import json, sys
from transformers import CONFIG_MAPPING
said = {}
for name, config in json.loads(sys.argv[1]).items():
    try:
        CONFIG_MAPPING[config["model_type"]](**config)
        said[name] = True
    except Exception:
        said[name] = False
print(json.dumps(said))
"""


def test_what_is_said_to_open_is_what_transformers_5_opens() -> None:
    shapes = {
        f"{family} {hidden}/{heads}": dataclasses.replace(
            SOURCE, family=family, hidden_size=hidden, num_attention_heads=heads, **fields
        )
        for family, fields in OF_FAMILY.items()
        for hidden, heads in ((32, 8), (18, 4), (17, 4), (24, 6))
    }
    configs = {name: hf_config(shape) for name, shape in shapes.items()}
    for config in configs.values():
        CONFIG_MAPPING[config["model_type"]](**config)  # transformers 4.57 opens every one
    opened = transformers5(OPEN_EACH, json.dumps(configs))
    assert opened == {name: opening_problem(shape) is None for name, shape in shapes.items()}
    assert not all(opened.values())


def test_a_shape_that_would_not_open_is_refused_with_those_that_do_and_the_way_out() -> None:
    target = SOURCE.pruned_to(hidden_size=18, num_attention_heads=4)
    with pytest.raises(ValueError) as caught:
        require_opens(target, SOURCE)
    assert str(caught.value) == (
        "A llama of hidden_size=18 and num_attention_heads=4 is not opened by transformers 5 (seen in 5.23; 4.57 opens "
        "it): its config class wants the first to be a multiple of the second. Nearest that open: "
        "target.hidden_size=16 or 20, or target.num_attention_heads=2 or 6. Or call it a mistral, which computes the "
        "same and is opened: prune.family=mistral, and where the student is there already export_hf.family=mistral."
    )
    require_opens(as_family(target, "mistral"), SOURCE)
    require_opens(target.pruned_to(ffn_hidden_size=40), target)  # as its source, which somebody opens already


@pytest.mark.parametrize(
    ("given", "family"), [({}, "qwen2"), ({"add_bias_linear": True}, "mistral"), ({"add_qkv_bias": True}, "mistral")]
)
def test_a_family_that_computes_something_else_is_refused(given: dict[str, Any], family: str) -> None:
    with pytest.raises(ValueError, match=f"family={family} is another model than this llama"):
        as_family(dataclasses.replace(SOURCE, **given), family)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({"hidden_size": 1}, (20, 4)),
        ({"hidden_size": 16}, (16, 4)),
        ({"num_attention_heads": 2}, None),  # 19 is no multiple of 2, 4, 6 or 8
        ({"hidden_size": 7, "num_attention_heads": 2}, (28, 4)),
        ({}, None),
    ],
)
def test_the_nearest_shape_that_opens_moves_only_what_may_move(
    steps: dict[str, int], expected: tuple[int, int] | None
) -> None:
    found = nearest_that_opens(SOURCE.pruned_to(hidden_size=19, num_attention_heads=4), SOURCE, steps)
    assert (None if found is None else (found.hidden_size, found.num_attention_heads)) == expected


LLAMA_8B = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256)


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        (
            {},
            {
                "tensor cores": "full speed: hidden_size, ffn_hidden_size multiples of 16",
                "llama.cpp K-quants": "every row: multiples of 256",
                "tensor parallelism": "sizes 2, 4, 8",
            },
        ),
        (
            {"hidden_size": 2880, "ffn_hidden_size": 8984, "num_attention_heads": 24},
            {
                "tensor cores": "not at full speed: ffn_hidden_size=8984 no multiple of 16",
                "llama.cpp K-quants": "rows of ffn_hidden_size=8984 stay in 16 bits: no multiple of 32",
                "tensor parallelism": "sizes 2, 4, 8",
            },
        ),
        (
            {"hidden_size": 2867, "ffn_hidden_size": 9216, "num_attention_heads": 12, "num_query_groups": 3},
            {
                "tensor cores": "slow: hidden_size=2867 no multiple of 8",
                "llama.cpp K-quants": "rows of hidden_size=2867 stay in 16 bits: no multiple of 32",
                "tensor parallelism": "1 only; not 2, 4, 8 (num_query_groups=3)",
            },
        ),
        (
            {"hidden_size": 2880, "num_attention_heads": 16, "num_query_groups": 4},
            {
                "tensor cores": "full speed: hidden_size, ffn_hidden_size multiples of 16",
                "llama.cpp K-quants": "rows of hidden_size=2880 get larger quants (q4_0, q5_0, q8_0): no multiple of "
                "256",
                "tensor parallelism": "sizes 2, 4, 8",
            },
        ),
    ],
)
def test_which_runtimes_the_dims_suit_is_said(dims: dict[str, int], said: dict[str, str]) -> None:
    assert suits(LLAMA_8B.pruned_to(**dims)) == said
