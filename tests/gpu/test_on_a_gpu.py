"""What only an accelerator can show, each beside the same at a tiny size on the CPU, so that the test itself has run.

None of the `cuda` cases has ever run: docs/gpu.md says so, and which functions wait for which test. `make test-gpu`
runs them and the tests of other rooms that take an accelerator's path where there is one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from minitron_nemo import engine, platform
from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.config.launcher import TORCHRUN, LauncherConfig
from minitron_nemo.config.throughput import ThroughputConfig, TimedModel
from minitron_nemo.config.trainer import Layout
from minitron_nemo.distillation.offload import keep_on_host
from minitron_nemo.divergence.streamed import divergence
from minitron_nemo.evaluation.throughput import measure
from minitron_nemo.hf.config import hf_config
from minitron_nemo.launcher import torchrun
from minitron_nemo.parallel import Groups
from minitron_nemo.platform.memory import available_bytes, held_bytes
from minitron_nemo.platform.peak import peak_tflops_here
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.timings import timings_of
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.throughput import timed_model, write_shape
from minitron_nemo.weights import load_full_parameters
from support.megatron import TINY, TINY_EXPERTS, build_gpt, random_parameter, run_gpt, smaller, start_alone
from support.tiny import TinyChain


@dataclass(frozen=True)
class Place:
    """Where a test runs, and how much of what only a GPU has room for."""

    device: str
    rows: int
    vocab_size: int
    teacher: ModelShape
    rtol: float
    """Of the largest value; transformer-engine's float32 products are TF32."""


CPU = Place("cpu", 13, 51, TINY, 1e-5)
# 2.2e9 logits, more than 32 bits count
CUDA = Place("cuda", 16_640, 131_072, smaller(TINY, num_layers=8, hidden_size=1024, ffn_hidden_size=4096), 2e-2)


@pytest.fixture(
    params=[
        pytest.param(CPU, id="cpu"),
        pytest.param(
            CUDA, id="cuda", marks=pytest.mark.skipif(not platform.has_accelerator(), reason="no accelerator")
        ),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    if request.param is CPU and platform.has_accelerator():
        pytest.skip("the twin of a machine without an accelerator")
    start_alone()
    return request.param  # type: ignore[no-any-return]


def assert_near(found: Tensor, expected: Tensor, rtol: float) -> None:
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert difference <= rtol, f"{difference:.2e} of the largest"


# ---- kernels ---------------------------------------------------------------------------------------------------------


def test_kl_and_its_gradient_are_right_beyond_two_to_the_31_logits(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_TRITON", "1")  # where there is a GPU
    torch.manual_seed(0)
    shape = (place.rows, 1, place.vocab_size)
    student, teacher = (torch.randn(shape, dtype=torch.bfloat16, device=place.device) for _ in range(2))
    student.requires_grad_()
    losses = divergence(student, teacher, DivergenceConfig(kind="forward_kl"), tp_group=None)
    losses.divergence.sum().backward()
    gradient = student.grad
    assert gradient is not None
    for rows in (slice(0, 5), slice(-5, None)):  # the last ones lie past the 2**31st
        mine = student.detach()[rows].double().requires_grad_()
        log_s, log_t = mine.log_softmax(-1), teacher[rows].double().log_softmax(-1)
        expected = (log_t.exp() * (log_t - log_s)).sum(-1)
        expected.sum().backward()
        assert mine.grad is not None
        assert_near(losses.divergence[rows], expected, 1e-5)
        assert_near(gradient[rows], mine.grad, 1e-2)  # bf16 holds it to 2**-8


# ---- layer specs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, TINY_EXPERTS], ids=["dense", "experts"])
def test_the_machines_layers_compute_what_the_local_ones_do(place: Place, shape: ModelShape) -> None:
    """On a GPU transformer-engine's, with grouped experts and the alltoall dispatcher; without one the local ones."""
    prepare_layout(Layout(), shape, seed=0)
    core = engine.new_core(shape, Layout(), torch.float32)
    load_full_parameters(core, shape, Groups(), lambda name: random_parameter(name, shape))
    local = build_gpt(shape).to(place.device)
    tokens = torch.arange(14, device=place.device).reshape(2, 7)
    with torch.no_grad():
        found, expected = (run_gpt(model.to(place.device).eval(), tokens) for model in (core, local))
    assert found is not None and expected is not None
    assert_near(found, expected, place.rtol)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_teacher_on_the_host_takes_two_layers_of_the_device(place: Place) -> None:
    shape = place.teacher
    model = build_gpt(shape, dtype=torch.bfloat16).requires_grad_(False)
    layer = max(sum(p.numel() * p.itemsize for p in each.parameters() if p.dim() > 1) for each in model.decoder.layers)
    keep_on_host(model.decoder.layers, device=torch.device(place.device))
    model.to(place.device)
    tokens = torch.arange(14, device=place.device).reshape(2, 7)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()  # the two buffers stand already, or come with the first layer
    with torch.no_grad():
        for _ in range(3):
            assert run_gpt(model, tokens) is not None
    activations = 64 * tokens.numel() * max(shape.ffn_hidden_size, shape.padded_vocab_size) * 4
    assert torch.cuda.max_memory_allocated() - before <= 2.1 * layer + activations


def test_a_model_is_timed_and_its_memory_is_what_it_holds(place: Place, tmp_path: Path) -> None:
    config = ThroughputConfig(
        dtype="fp32", batch_size=2, prompt_tokens=6, new_tokens=5, repeats=1, warmup=0, max_batch_size=4
    )
    folder = write_shape(tmp_path / "it", hf_config(place.teacher))
    clock = itertools.accumulate([0, 1, 2] * 2).__next__
    same, largest = measure([timed_model(folder, TimedModel(str(folder)), config)], config, clock)["rows"]
    assert (same["batch_size"], largest["batch_size"]) == (2, 4)
    if place.device == "cuda":
        assert 4 * same["parameters"] <= same["peak_memory_bytes"] <= largest["peak_memory_bytes"]
    assert available_bytes() > held_bytes()


def test_a_layer_is_timed_as_a_search_does(place: Place) -> None:
    shape = smaller(place.teacher, num_layers=1)
    prepare_layout(Layout(), shape, seed=0)
    found = timings_of(engine.new_core(shape, Layout(), torch.float32), batch_size=2, seq_length=8, repeats=2)
    assert found["prompt mlp"] > 0 and found["token mlp"] > 0 and len(found) == 6


# ---- random numbers --------------------------------------------------------------------------------------------------


def draw(place: Place) -> Tensor:
    """A mask of dropout; on a CPU what the device's generator would give, as dropout there takes the CPU's own."""
    if place.device == "cuda":
        return torch.nn.functional.dropout(torch.ones(500, device=place.device), 0.5)
    generator = torch.Generator()
    generator.set_state(torch.cuda.get_rng_state())
    return torch.rand(500, generator=generator)


def test_dropout_differs_between_tensor_parallel_ranks_and_comes_again_with_its_seed(place: Place) -> None:
    def masks(rank: int) -> tuple[Tensor, Tensor]:
        """In a region that is split over tensor parallelism, and in one that is not."""
        tensor_parallel.model_parallel_cuda_manual_seed(7, tp_rank=rank, ep_rank=0, etp_rank=0)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            split = draw(place)
        return split, draw(place)

    (split, whole), (other_split, other_whole), (again, whole_again) = masks(0), masks(1), masks(0)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    assert torch.equal(split, again) and torch.equal(whole, whole_again) and torch.equal(whole, other_whole)
    assert not torch.equal(split, other_split) and not torch.equal(split, whole)


# ---- the machine and the chain ---------------------------------------------------------------------------------------


def test_the_platform_says_what_is_there(place: Place) -> None:
    on_gpu = place.device == "cuda"
    assert platform.device().type == place.device and platform.supports_distributed_optimizer() is on_gpu
    assert platform.backend() == ("nccl" if on_gpu else "gloo")
    assert on_gpu or peak_tflops_here() is None
    assert f"--nproc-per-node={'gpu' if on_gpu else 1}" in torchrun(LauncherConfig(TORCHRUN), "prune", [])


def test_a_whole_chain_ends_in_an_export_that_transformers_agrees_with(place: Place, tiny_chain: TinyChain) -> None:
    """Layout, trainer, distributed optimizer and loaders of the machine; the export compares logits itself."""
    export = open_artifact(Path(tiny_chain.run_dir) / "export", verify=True)
    assert export.metrics["max_relative_logit_difference"] <= 1e-4
