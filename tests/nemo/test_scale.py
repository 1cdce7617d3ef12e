"""A step of a distillation asks no more of a rank when there are more ranks: counted at 8 and at 256 of them."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest

from support.door import environment
from support.megatron import TINY
from support.patience import run_patiently

FEW, MANY = 8, 256
STAGES = 2
MICRO_BATCHES = 2
SMALL = 64
"""Bytes of all parts of a loss and their tokens, as float64."""


def case(world: int, stage: int) -> dict[str, Any]:
    """On 2 tensor-parallel ranks and 2 stages, so that 2 and 64 of them are data-parallel."""
    student = dataclasses.replace(TINY, hidden_size=16, ffn_hidden_size=28)
    trainer = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": STAGES,
        "sequence_parallel": True,
        "seq_length": TINY.seq_length,
        "micro_batch_size": 1,
        "global_batch_size": world // 4 * MICRO_BATCHES,
    }
    models = {"teacher": TINY.to_dict(), "student": student.to_dict()}
    return models | {"trainer": trainer, "world": world, "rank": stage * world // STAGES}


@pytest.fixture(scope="module")
def counted() -> dict[tuple[int, int], dict[str, Any]]:
    """(ranks, stage) -> what the stage's first rank did in a step."""
    asked = [(world, stage) for world in (FEW, MANY) for stage in range(STAGES)]
    command = [sys.executable, "-m", "support.fake_ranks", json.dumps([case(*each) for each in asked])]
    done = run_patiently(command, env=environment())
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))


pytestmark = [pytest.mark.slow, pytest.mark.parametrize("stage", range(STAGES))]


def test_more_ranks_change_no_message_of_a_step(counted: Any, stage: int) -> None:
    """Also those of the data-parallel group: the whole gradients and weights, which its ranks share out."""
    few, many = counted[FEW, stage], counted[MANY, stage]
    assert few["sent"].keys() == {"tp", "pp", "dp", "world"}
    assert few["sent"]["dp"]["reduce-scatter"][1] > 0 and few["sent"]["tp"]["all-gather"][1] > 0
    assert many["sent"] == few["sent"]


def test_what_all_ranks_say_to_each_other_in_a_step_is_a_few_numbers(counted: Any, stage: int) -> None:
    to_all = counted[MANY, stage]["sent"]["world"]
    assert to_all.keys() <= {"all-reduce", "send", "receive"}  # nothing is gathered; NeMo sends the loss to rank 0
    calls, size = to_all["all-reduce"]
    assert calls == 3 and size <= SMALL + 8  # parts of the loss; whether to stop; the norm of the gradient


def test_more_ranks_keep_no_more_activations_and_fewer_moments(counted: Any, stage: int) -> None:
    few, many = counted[FEW, stage], counted[MANY, stage]
    assert many["activations"] == few["activations"] > 0
    assert 0 < many["held"] < few["held"]


def test_more_ranks_make_the_host_wait_for_no_more_values(counted: Any, stage: int) -> None:
    assert counted[MANY, stage]["reads"] == counted[FEW, stage]["reads"] != {}


def test_more_ranks_take_no_more_steps_to_start(counted: Any, stage: int) -> None:
    """As many collectives and questions to the store; Megatron gathers what groups of parameters each rank has."""
    few, many = counted[FEW, stage], counted[MANY, stage]
    calls = [{g: {kind: n for kind, (n, _) in k.items()} for g, k in each["start"].items()} for each in (few, many)]
    assert calls[0] == calls[1]
    assert sum(many["store"].values()) == sum(few["store"].values())
    assert many["start"]["world"]["all-gather of objects"][1] < MANY * 500


def test_no_group_is_built_beside_those_of_the_backend(counted: Any, stage: int) -> None:
    """One of gloo would connect every data-parallel rank to every other."""
    assert counted[MANY, stage]["backends"] == ["fake"]
