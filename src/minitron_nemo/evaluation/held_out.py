"""Held-out loss of each source of a blend, and how far the model is from its teacher there.

    loss        cross-entropy, mean over the tokens that count         nats per token
    kl          KL(teacher || model) of the next token, the same mean  nats per token

Text is read source by source, in order, in the same windows on every layout. A teacher runs ahead of the model over
each micro-batch, on the same ranks; the logits of neither are formed whole (`divergence/fused_linear.py`).

Communication: what both models do; all ranks, for the sums of a source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo import engine, platform
from minitron_nemo.checks import require
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.resuming import Unfinished
from minitron_nemo.runtime.forward import TeacherStates, loss_sums, summed
from minitron_nemo.runtime.model_artifact import ModelInput
from minitron_nemo.text.token_files import TokenStream
from minitron_nemo.text.windows import batches


@dataclass(frozen=True)
class HeldOut:
    """Sums [loss in nats, tokens, and with a teacher KL in nats] float64 of each source, by name."""

    sums: dict[str, torch.Tensor]

    def metrics(self) -> dict[str, Any]:
        """Of all together, and under `sources` of each."""
        total = _means(torch.stack(list(self.sums.values())).sum(0))
        sources = {name: _means(sums) for name, sums in self.sums.items()}
        return total | {"perplexity": math.exp(total["held_out_loss"]), "sources": sources}


def _means(sums: torch.Tensor) -> dict[str, Any]:
    loss, tokens, *kl = sums.tolist()
    return {"held_out_loss": loss / tokens, "tokens": int(tokens)} | ({"kl": kl[0] / tokens} if kl else {})


def measure_held_out(
    core: MCoreGPTModel,
    source: ModelInput,
    texts: Mapping[str, str],
    config: EvaluateConfig,
    unfinished: Unfinished,
    *,
    teacher: ModelInput | None,
    label: str,
) -> HeldOut:
    """Every rank calls, with its part of the model of `source`, and gets the same.

    Args:
        texts: by source the path of its held-out text, as `text.blend.held_out_sources` gives it.
        label: of the progress line.
    Raises: Interrupted: told to stop. ValueError: fewer samples than sources, more than there are, or the teacher has
        another vocabulary.
    """
    teaching = None
    if teacher is not None:
        require(
            teacher.shape.padded_vocab_size == source.shape.padded_vocab_size,
            f"evaluate.teacher={teacher.path} has a padded vocabulary of {teacher.shape.padded_vocab_size}, and "
            f"evaluate.model={source.path} one of {source.shape.padded_vocab_size}; KL compares them token by token. "
            "Give the teacher the model was pruned from, or leave evaluate.teacher out.",
        )
        dtype = platform.dtype_of(config.trainer.precision)
        teaching = TeacherStates(engine.open_core(teacher, config.trainer, dtype))
    found = {}
    for name, samples in _samples(texts, config).items():
        held_out = batches(
            texts[name],
            config.trainer.seq_length,
            config.trainer.micro_batch_size,
            samples,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
        one_pass = unfinished.one_pass("held-out loss" + (f" of {name}" if len(texts) > 1 else ""))
        said = f"{label}, {name}" if len(texts) > 1 else label
        options: dict[str, Any] = {"label": said, "total": len(held_out), "one_pass": one_pass, "teacher": teaching}
        sums = loss_sums(core, held_out, source.vocab_size, **options)
        found[name] = summed(sums, values=2 if teacher is None else 3)
    return HeldOut(found)


def _samples(texts: Mapping[str, str], config: EvaluateConfig) -> dict[str, int | None]:
    """Of each source so many samples; None: all there are. Shared out by their numbers of windows, one at least."""
    wanted = config.num_samples
    if wanted is None or len(texts) == 1:
        return dict.fromkeys(texts, wanted)
    windows = {name: TokenStream(path).windows(config.trainer.seq_length) for name, path in texts.items()}
    available = sum(windows.values())
    require(
        len(texts) <= wanted <= available,
        f"evaluate.num_samples={wanted} must be between {len(texts)}, one of each source, and {available}, the windows "
        f"of trainer.seq_length={config.trainer.seq_length} in {', '.join(texts)}.",
    )
    shares = {name: max(1, wanted * size // available) for name, size in windows.items()}
    while (left := wanted - sum(shares.values())) != 0:  # to whom is owed most; from whom has most too much
        owed = {name: wanted * size / available - shares[name] for name, size in windows.items()}
        open_ = [name for name in owed if (shares[name] < windows[name] if left > 0 else shares[name] > 1)]
        chosen = max(open_, key=owed.__getitem__) if left > 0 else min(open_, key=owed.__getitem__)
        shares[chosen] += 1 if left > 0 else -1
    return dict(shares)
