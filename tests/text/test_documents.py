"""Documents of one sample do not see each other, on any layout."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.parallel import Groups
from minitron_nemo.text.documents import documents_of, documents_on_rank, indices_on_rank, pad_documents
from minitron_nemo.weights import stream_full_parameters
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, build_gpt, causal_mask
from support.ranks import Ranks

LENGTHS = [8, 12, 4]  # of the sample's documents; multiples of 2 cp


def sample() -> dict[str, Tensor]:
    """[1, s]"""
    tokens = torch.randint(60, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "loss_mask": (tokens % 3 > 0).float(),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }


def step_together() -> tuple[Tensor, dict[str, Tensor]]:
    """On a rank: the sample's loss over all ranks and its gradients, full, by name."""
    batch = sample()
    documents = documents_of(batch["position_ids"] == 0)
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    build = build_context_parallel_gpt if size > 1 else build_gpt
    model = build(TINY)
    here = documents_on_rank(batch, documents, rank=rank, size=size)
    losses = model(
        here["tokens"],
        here["position_ids"],
        causal_mask(here["tokens"].shape[1]),
        labels=here["labels"],
        packed_seq_params=here["packed_seq_params"],
    )
    loss = (losses * here["loss_mask"]).sum()
    loss.backward()
    loss, context = loss.detach(), parallel_state.get_context_parallel_group()
    torch.distributed.all_reduce(loss, group=context)
    for name, parameter in model.named_parameters():
        if model.config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        torch.distributed.all_reduce(parameter.grad, group=context)
        assert parameter.grad is not None, name
        parameter.data.copy_(parameter.grad)
    return loss, {name: each.clone() for name, each in stream_full_parameters(model, TINY, Groups.from_megatron())}


def step_one_by_one() -> tuple[Tensor, dict[str, Tensor]]:
    """The same on one rank, each document run by itself."""
    batch, model, total = sample(), build_gpt(TINY), torch.zeros(())
    for tokens, labels, mask in zip(
        *(batch[key].split(LENGTHS, 1) for key in ("tokens", "labels", "loss_mask")), strict=True
    ):
        length = tokens.shape[1]
        losses = model(tokens, torch.arange(length)[None], causal_mask(length), labels=labels)
        total = total + (losses * mask).sum()
    total.backward()
    return total.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", ["single", "tp2", "tp2-sp", "cp2"])
def test_documents_of_a_sample_train_as_if_each_were_alone(ranks: Ranks, layout: str) -> None:
    [(loss, gradients)] = ranks("single").run(step_one_by_one)
    for found_loss, found in ranks(layout).run(step_together):
        assert_close(found_loss, loss, rtol=1e-5, atol=0)
        assert found.keys() == gradients.keys()
        for name, expected in gradients.items():
            scale = float(expected.abs().max())
            assert_close(
                found[name], expected, rtol=0, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_every_token_is_on_one_context_parallel_rank() -> None:
    boundaries = torch.tensor([0, 8, 20, 24])
    on_ranks = [indices_on_rank(boundaries, rank, 2) for rank in range(2)]
    assert [len(index) for index in on_ranks] == [12, 12]
    assert on_ranks[0].tolist() == [0, 1, 6, 7, 8, 9, 10, 17, 18, 19, 20, 23]
    assert sorted(torch.cat(on_ranks).tolist()) == list(range(24))


def test_filled_documents_keep_their_tokens_until_the_sample_is_full() -> None:
    batch = {
        "tokens": torch.tensor([11, 12, 13, 21, 22, 31, 32, 33]),
        "labels": torch.tensor([12, 13, 99, 22, 99, 32, 33, 34]),
        "loss_mask": torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1]),
        "position_ids": torch.tensor([0, 1, 2, 0, 1, 0, 1, 2]),
    }
    filled = pad_documents(batch, 4)
    assert filled["tokens"].tolist() == [11, 12, 13, 0, 21, 22, 0, 0]
    assert filled["labels"].tolist() == [12, 13, 99, 0, 22, 99, 0, 0]
    assert filled["loss_mask"].tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert filled["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert pad_documents(batch, 1)["tokens"].tolist() == batch["tokens"].tolist()
