"""Depth scores of a model on its layout: calibration samples and a task in, one number per block of layers out.

The sweeps themselves are `importance.depth` and `importance.removal`; here micro-batches come to this rank, and the
accuracy on multiple-choice questions (arXiv:2408.11796 chooses the block whose removal costs Winogrande least) is
counted from the same passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.config.importance import ACCURACY, DepthConfig, GreedyConfig
from minitron_nemo.divergence.cross_entropy import token_losses
from minitron_nemo.importance.depth import DepthEstimator, DepthScores, require_depth_fits
from minitron_nemo.importance.removal import LayerSwitches, Pass, Sweep
from minitron_nemo.parallel import (
    Groups,
    is_rank_zero,
    rank_zero_says,
)
from minitron_nemo.progress import Reporter
from minitron_nemo.resuming import OnePass, Unfinished, left_of
from minitron_nemo.runtime.likelihood import on_every_rank, shares_of
from minitron_nemo.runtime.step import forward_step, on_this_rank
from minitron_nemo.scores import GREEDY
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.questions import Question, accuracy


def estimate_depth(
    core: MCoreGPTModel,
    shape: ModelShape,
    batches: Iterable[dict[str, Tensor]],
    config: DepthConfig,
    *,
    questions: Sequence[Question] = (),
    micro_batch_size: int = 1,
    vocab_size: int | None = None,
    dropped: Collection[int] = (),
    total: int = 0,
    unfinished: Unfinished | None = None,
) -> DepthScores:
    """Every metric of `config`: metric -> block size n -> [L-n+1] float32, entry i for layers i .. i+n-1.

    The same on every layout and for every micro-batch size, up to float rounding, and equal on every rank. Larger means
    more important. Of an order of dropping (`config.greedy`) a layer's score is its place, from 0; layers that were not
    dropped all have the number of those that were.

    Args:
        batches: micro-batches of this data-parallel rank, tokens, labels, loss_mask, position_ids [b, s]; an order of
            dropping holds all of them in memory.
        questions: for the accuracy; all of them on every rank.
        micro_batch_size: options of questions that are run at once.
        vocab_size: real entries of the padded vocabulary; None: all are real.
        dropped: layers that are gone already; see `DepthEstimator`.
        total: number of micro-batches.
        unfinished: lets the run be stopped, and keeps what it has done; None: it goes to its end.
    Communicates: see `importance.depth`; `OnePass`.
    """
    if config.greedy.metric is not None:
        batches = list(batches)  # read once per drop
    scores: DepthScores = {}
    of = "".join([f" {config.block_sizes}", *(f" without {layer}" for layer in dropped)])
    if set(config.metrics) - {ACCURACY}:
        groups = Groups.from_megatron()
        estimator = DepthEstimator(core, shape, groups, config, forward_step, vocab_size=vocab_size, dropped=dropped)
        one_pass = None if unfinished is None else unfinished.one_pass(f"depth {config.metrics}{of}")
        scores = _scores_of(estimator, batches, total, one_pass)
    if ACCURACY in config.metrics:
        sweep = Sweep(shape.num_layers, config.block_sizes, dropped)
        task_pass = None if unfinished is None else unfinished.one_pass(f"depth task{of}")
        likelihoods = option_likelihoods(
            core, sweep.passes, questions, micro_batch_size, vocab_size=vocab_size, one_pass=task_pass
        )
        right = accuracy(questions, likelihoods, normalize=config.normalize)
        scores[ACCURACY] = {size: values.float().cpu() for size, values in sweep.by_block(right[0] - right).items()}
    scores = {metric: scores[metric] for metric in config.metrics}
    if config.greedy.metric is not None:
        assert isinstance(batches, list)
        task = {"questions": questions, "micro_batch_size": micro_batch_size, "unfinished": unfinished}
        order = greedy_layers(core, shape, batches, config, vocab_size=vocab_size, total=total, **task)
        places = torch.full((shape.num_layers,), float(len(order)))
        places[order] = torch.arange(len(order), dtype=torch.float32)
        scores[GREEDY] = {1: places}
    return scores


def _scores_of(
    estimator: DepthEstimator, batches: Iterable[dict[str, Tensor]], total: int, one_pass: OnePass | None
) -> DepthScores:
    with estimator, Reporter("depth", total, show=is_rank_zero()) as reporter:
        for done, batch in left_of(one_pass, batches, total, estimator):
            estimator.add(on_this_rank(batch))
            reporter.update(done)
        return estimator.finish()


def option_likelihoods(
    core: MCoreGPTModel,
    passes: Sequence[Pass],
    questions: Sequence[Question],
    rows: int,
    *,
    vocab_size: int | None = None,
    label: str = "depth task",
    key: str = "depth.task",
    one_pass: OnePass | None = None,
) -> Tensor:
    """Log-likelihood of every option's scored tokens in every pass, in nats.

    Args:
        rows: b of the micro-batches.
        vocab_size: real entries of the padded vocabulary; None: all are real.
        label: for the progress line.
        key: the user's config key that named the questions, for messages.
        one_pass: lets the run be stopped after any micro-batch; None: it goes to its end.
    Returns: [passes, options of all questions] float64, equal on every rank.
    Communicates: the passes' own; at the end cp and dp (sum) and pp (from the last stage).
    Raises: ValueError: a likelihood is not finite.
    """
    groups = Groups.from_megatron()
    continuations = [option for question in questions for option in question.options]
    device = next(core.parameters()).device
    found = torch.zeros(len(passes), len(continuations), dtype=torch.float64, device=device)
    shares, total = shares_of(core, continuations, rows)
    with LayerSwitches(core) as layers, Reporter(label, total, show=is_rank_zero()) as reporter:
        for done, (places, batch) in left_of(one_pass, shares, total, _Found(found)):
            local = on_this_rank(batch)
            where = torch.tensor(places, dtype=torch.int64, device=device)

            def see(number: int, logits: Tensor, local: Any = local, where: Tensor = where) -> None:
                losses = token_losses(logits, local["labels"], vocab_size=vocab_size, tp_group=groups.tp).double()
                sums = torch.where(local["loss_mask"] != 0, losses, 0.0).sum(1)  # [b]
                found[number, where] = -sums[: len(where)]

            layers.run(passes, local, forward_step, see)
            reporter.update(done)
    found = on_every_rank(found)
    require(
        bool(found.isfinite().all()),
        f"The log-likelihood of an option of {key} is not finite (NaN or infinity). Check the checkpoint and its "
        "dtype with the evaluate stage, or try trainer.precision=fp32.",
    )
    return found


@dataclass
class _Found:
    """`Sums` of likelihoods: those that are found so far."""

    likelihoods: Tensor

    def sums(self) -> dict[str, Tensor]:
        return {"likelihoods": self.likelihoods}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        self.likelihoods.copy_(sums["likelihoods"])


def greedy_layers(
    core: MCoreGPTModel,
    shape: ModelShape,
    batches: Sequence[dict[str, Tensor]],
    config: DepthConfig,
    **options: Any,
) -> list[int]:
    """The layers that `config.greedy` drops, in the order of dropping.

    Each time the least important one of those that remain goes, and importance is estimated again without it
    (arXiv:2508.14444 by squared error of the logits, arXiv:2511.16664 by the normalised one), so that layers that can
    stand in for each other do not all go. Of equal ones the first goes.

    Args:
        batches: as for `estimate_depth`; read once per drop.
        options: `questions`, `micro_batch_size`, `vocab_size`, `total`, `unfinished` of `estimate_depth`.
    Returns: layer indices from 0, of the intact model; equal on every rank.
    Communicates: see `estimate_depth`, once per drop.
    Raises: ValueError: more layers than the model can lose.
    """
    require_depth_fits(config, shape)
    greedy, have = config.greedy, shape.num_layers
    assert greedy.metric is not None, "an order of dropping was not asked for"
    task = config.task if greedy.metric == ACCURACY else None
    once = replace(config, metrics=[greedy.metric], block_sizes=[1], greedy=GreedyConfig(), task=task)
    remaining = list(range(greedy.keep_first, have - greedy.keep_last))
    dropped: list[int] = []
    while len(dropped) < greedy.drop:
        scores = estimate_depth(core, shape, batches, once, dropped=dropped, **options)[greedy.metric][1]
        least = rank_zero_says(min(remaining, key=lambda layer: float(scores[layer])))
        remaining.remove(least)
        dropped.append(least)
    return dropped
