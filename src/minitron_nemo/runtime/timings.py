"""How long the parts of a model take on the machine at hand: its attention, its MLP, and what stands once.

A model of one layer is run as text is generated (generation.py): a prompt of s tokens in one pass, then single tokens
after it. Hooks on the layer and on its MLP take the times, with the device's queue empty at each.

    mlp        the layer's MLP or experts
    attention  the rest of the layer, its norms among it
    rest       embedding, final norm and output layer

Communication: what the model does (tp), whose slowest rank counts; all ranks, which agree on the first's.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo import platform
from minitron_nemo.parallel import Groups, agree, all_reduce_max

PARTS = ("attention", "mlp", "rest")
PROMPT, TOKEN = "prompt", "token"
Timings = dict[str, float]
"""`prompt attention`, `token mlp` and so on, in seconds."""


@torch.no_grad()
def timings_of(core: MCoreGPTModel, *, batch_size: int, seq_length: int, repeats: int = 5) -> Timings:
    """Medians over the repeats, the same on every rank.

    Args:
        core: a model of one layer on a layout without pipeline, sequence and context parallelism, in evaluation mode.
        batch_size: prompts that are read at once.
        seq_length: tokens of each; so many are in the cache when a single token is read.
    Communicates: as the module.
    """
    core.eval()
    watch = _Watch()
    layer = core.decoder.layers[0]
    watch.see("model", core)
    watch.see("layer", layer)
    watch.see("mlp", layer.mlp)
    try:
        for repeat in range(repeats + 1):
            _generate_one(core, batch_size, seq_length, watch)
            if repeat == 0:  # kernels were chosen and memory was taken
                watch.seconds.clear()
    finally:
        watch.remove()
    names = sorted(watch.seconds)
    medians = torch.tensor([statistics.median(watch.seconds[name]) for name in names], dtype=torch.float64)
    slowest = all_reduce_max(medians.to(platform.device()), group=Groups.from_megatron().tp)
    whole = dict(zip(names, agree(slowest).tolist(), strict=True))
    timings: Timings = {}
    for kind in (PROMPT, TOKEN):
        model, layers, mlp = (whole[f"{kind} {module}"] for module in ("model", "layer", "mlp"))
        timings |= {f"{kind} mlp": mlp, f"{kind} attention": layers - mlp, f"{kind} rest": model - layers}
    return {name: max(0.0, seconds) for name, seconds in timings.items()}


def _generate_one(core: MCoreGPTModel, batch_size: int, seq_length: int, watch: _Watch) -> None:
    context, device = StaticInferenceContext(batch_size, seq_length + 1), platform.device()
    for kind, tokens, position in ((PROMPT, seq_length, 0), (TOKEN, 1, seq_length)):
        watch.kind = kind
        positions = torch.arange(position, position + tokens, device=device).repeat(batch_size, 1)
        core(torch.zeros_like(positions), positions, None, inference_context=context, runtime_gather_output=True)
        context.sequence_len_offset += tokens
        context.enable_decode_mode()


class _Watch:
    """Seconds of every pass through the modules it sees."""

    def __init__(self) -> None:
        self.kind = PROMPT
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._handles: list[Any] = []

    def see(self, name: str, module: torch.nn.Module) -> None:
        began = 0.0

        def before(*_: Any) -> None:
            nonlocal began
            torch.cuda.synchronize()
            began = time.perf_counter()

        def after(*_: Any) -> None:
            torch.cuda.synchronize()
            self.seconds[f"{self.kind} {name}"].append(time.perf_counter() - began)

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
