"""The calibration set between two layers, as the teacher says it and as the student does.

    teacher, student    residual streams of a micro-batch    [s/cp, b, h], [s/(cp*tp), b, h] under sequence parallelism

One pass over the intact model shows each pipeline stage what enters its first layer, and with what else its layers are
called (rotary embeddings, documents); from there on both streams are taken through the layers one by one. The
student's lives in the teacher's width (kept_stream.py). On an accelerator the streams wait on the host.

Communication: the pass as it does; after it, pp: the teacher's stream behind a run of dropped layers to the stage of
the kept layer before it; later the student's stream from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitron_nemo import run_record
from minitron_nemo.activations.hooks import hooks_until_the_end, on_output
from minitron_nemo.activations.tokens import AnnouncedBatch, TokenMask, mark_tokens_over
from minitron_nemo.parallel import Groups, gather_objects, group_rank, group_size, receive_from, send_to
from minitron_nemo.pruning.second_moments import CalibrationPass, announced_batch

FITTED, HELD_OUT = 0, 1
"""Parts of the calibration set: what layers are fitted to, and what ridges can be chosen by."""


@dataclass
class MicroBatch:
    """One of the calibration set on this rank, at a place between two layers."""

    mask: TokenMask
    beside: dict[str, Any]
    """What layers are called with beside the stream."""
    teacher: Tensor
    student: Tensor
    part: int = FITTED
    """Of the calibration set: FITTED or HELD_OUT."""


class TwoStreams:
    """Both streams of every micro-batch on this pipeline stage."""

    def __init__(
        self, batches: list[MicroBatch], behind: dict[int, list[Tensor]], device: torch.device, parts: int
    ) -> None:
        self._batches, self._device = batches, device
        self.parts = parts
        """1: all is fitted; 2: some is held out. Equal on every rank."""
        self.behind = behind
        """By a kept layer of this stage: the teacher's stream behind the dropped layers after it, which end on another
        stage."""

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def announced(self) -> Iterator[tuple[MicroBatch, Tensor, Tensor, AnnouncedBatch]]:
        """(micro-batch, teacher's stream, student's, what says which tokens count), both streams on the device."""
        current = announced_batch()
        for batch in self._batches:
            current.announce(batch.mask)
            yield batch, batch.teacher.to(self._device), batch.student.to(self._device), current
            run_record.is_at_work()

    def advance_teacher(self, through: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
        for batch in self._batches:
            batch.teacher = through(batch.teacher.to(self._device), batch.beside).cpu()

    def hand_student_over(self, stage: int, groups: Groups) -> None:
        """From pipeline stage `stage` to the one after it, if there is one. Communicates: pp, between the two."""
        has_next = stage + 1 < group_size(groups.pp)
        if groups.pp is None or not has_next or group_rank(groups.pp) not in (stage, stage + 1):
            return
        for batch in self._batches:
            here = batch.student.to(self._device)
            if group_rank(groups.pp) == stage:
                send_to(here.contiguous(), to=stage + 1, group=groups.pp).wait()
            else:
                batch.student = receive_from(torch.empty_like(here), source=stage, group=groups.pp).cpu()


def capture(
    gpt: Any,
    runs: Sequence[tuple[int, int]],
    groups: Groups,
    run: CalibrationPass,
    student: Callable[[Tensor], Tensor],
    held_out: float,
) -> TwoStreams:
    """Take the calibration set up to the first layer of this stage.

    Args:
        gpt: bare GPTModel of this rank.
        runs: (kept layer, last layer of the run dropped after it).
        run: called once.
        student: from the teacher's stream behind the embedding to the student's.
        held_out: share of the micro-batches, over the data-parallel ranks, that nothing is fitted to.
    Communicates: see the module's text; pp, the stages' layer indices.
    """
    layers = {layer.layer_number - 1: layer for layer in gpt.decoder.layers}
    stages = enumerate(gather_objects(list(layers), group=groups.pp))
    stage_of = {layer: stage for stage, of_stage in stages for layer in of_stage}
    device = next(gpt.parameters()).device
    masks: list[TokenMask] = []
    entering: list[tuple[Tensor, dict[str, Any]]] = []
    crossing = [(before, last) for before, last in runs if stage_of[before] != stage_of[last]]
    leaving: dict[int, list[Tensor]] = {last: [] for _, last in crossing if last in layers}

    def announce(batch: dict[str, Tensor]) -> None:
        masks.append(mark_tokens_over(batch["loss_mask"], groups=[groups.cp], device=device))

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        beside = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "context")}
        entering.append((_kept(stream), _shared(beside, entering[-1][1] if entering else {})))

    with hooks_until_the_end() as handles:
        first = gpt.decoder.layers[0]
        handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))
        for last, seen in leaving.items():
            handles.append(layers[last].register_forward_hook(on_output(partial(_add, seen))))
        run(announce)
    behind = _send_back(crossing, stage_of, leaving, [stream for stream, _ in entering], device, groups)
    ranks, rank = group_size(groups.dp), group_rank(groups.dp)

    def part_of(index: int) -> int:
        number = index * ranks + rank
        return HELD_OUT if int((number + 1) * held_out) > int(number * held_out) else FITTED

    batches = [
        MicroBatch(mask, beside, stream, student(stream.to(device)).cpu(), part_of(index))
        for index, (mask, (stream, beside)) in enumerate(zip(masks, entering, strict=True))
    ]
    return TwoStreams(batches, behind, device, parts=2 if held_out > 0 else 1)


def _add(seen: list[Tensor], stream: Tensor) -> None:
    seen.append(_kept(stream))


def _kept(stream: Tensor) -> Tensor:
    return stream.detach().to("cpu", copy=True)  # the schedule frees what it sends on


def _shared(beside: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """Tensors of the micro-batch before where they are the same."""

    def one(name: str, value: Any) -> Any:
        before = last.get(name)
        if isinstance(value, Tensor) and isinstance(before, Tensor) and value.shape == before.shape:
            return before if torch.equal(value, before) else value
        return value

    return {name: one(name, value) for name, value in beside.items() if value is not None or name == "attention_mask"}


def _send_back(
    crossing: Sequence[tuple[int, int]],
    stage_of: dict[int, int],
    leaving: dict[int, list[Tensor]],
    like: list[Tensor],
    device: torch.device,
    groups: Groups,
) -> dict[int, list[Tensor]]:
    """Of the runs that begin on this stage and end on another: the streams behind them. Communicates: pp."""
    behind: dict[int, list[Tensor]] = {}
    for before, last in crossing:
        assert groups.pp is not None
        if group_rank(groups.pp) == stage_of[last]:
            for stream in leaving.pop(last):
                send_to(stream.to(device), to=stage_of[before], group=groups.pp).wait()
        elif group_rank(groups.pp) == stage_of[before]:
            buffers = (torch.empty_like(stream, device=device) for stream in like)
            behind[before] = [receive_from(buffer, source=stage_of[last], group=groups.pp).cpu() for buffer in buffers]
    return behind
