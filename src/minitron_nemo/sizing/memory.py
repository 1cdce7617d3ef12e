"""Bytes that a rank's tensors take at the fullest moment of a step, by what they are for.

    weights       in the dtype of the forward pass; a teacher's whose layers are on the host, two of its layers
    gradients     float32, of every parameter that is trained, on each of its replicas (Megatron-core's DDP buffer)
    optimizer     float32 weights under bf16 and two moments, shared out over data-parallel ranks where the machine can
    activations   of the micro-batches on their way: on pipeline stage i of p at most p - i
    logits        what the loss holds on the last stage
    messages      between pipeline stages: student's and teacher's stream side by side
    at work       the largest of what stands for a moment: a layer's gradients, and what is formed again for them; the
                  teacher's pass; the gradient of the embedding

One rank a pipeline stage is reckoned, as the others of its stage hold as much, and the fullest is told. What training
stores, and how, is that of nemo/trainer.py, nemo/optim.py and nemo/models.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minitron_nemo.divergence.fused_linear import LOGITS_BYTES
from minitron_nemo.divergence.token_rows import CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS_OF_RANKS
from minitron_nemo.sizing.activations import (
    FLOAT32,
    Flow,
    at_work_backward,
    at_work_forward,
    norm_bytes,
    of_layers,
)
from minitron_nemo.sizing.jobs import CROSS_ENTROPY, DIVERGENCE, NONE, Job, Model
from minitron_nemo.sizing.machine import Machine
from minitron_nemo.sizing.parts import Part

PIECES = ("weights", "teacher", "gradients", "optimizer", "activations", "logits", "messages", "at work")
_PIECES_IN_FLOAT32 = 3
"""Of a chunk's logits that forward KL has at once (divergence/fused_linear.py)."""


@dataclass(frozen=True)
class Memory:
    """Of the fullest rank."""

    stage: int
    """Its pipeline stage, from 0."""
    pieces: dict[str, int]
    """One of PIECES -> bytes."""

    @property
    def total(self) -> int:
        return sum(self.pieces.values())


def memory_of(job: Job, machine: Machine) -> Memory:
    """Of the fullest rank of a job whose layout divides its models and the machine's ranks."""
    stages = range(job.layout.pipeline_model_parallel_size)
    return max((of_stage(job, machine, stage) for stage in stages), key=lambda memory: memory.total)


def of_stage(job: Job, machine: Machine, stage: int) -> Memory:
    pairs = [(model, Part(model.shape, job.layout, stage)) for model in job.models]
    standing = dict.fromkeys(PIECES, 0)
    for model, part in pairs:
        piece = "teacher" if model.role == "teacher" else "weights"
        standing[piece] += job.element * _on_device(model, part)
        if model.trained:
            standing["gradients"] += FLOAT32 * part.num_held_parameters
            standing["optimizer"] += _optimizer_bytes(part, job, machine)
    if job.batch is None:
        return Memory(stage, standing)
    moments = [_added(standing, moment) for moment in _moments(job, machine, stage, pairs)]
    return Memory(stage, max(moments, key=lambda pieces: sum(pieces.values())))


def _added(standing: dict[str, int], moment: dict[str, int]) -> dict[str, int]:
    return {piece: value + moment.get(piece, 0) for piece, value in standing.items()}


def _on_device(model: Model, part: Part) -> int:
    """Parameters; of one whose layers are on the host the tables and two layers (distillation/offload.py)."""
    if not model.offloaded:
        return part.num_held_parameters
    return min(part.num_held_parameters, part.num_table_parameters + 2 * part.num_layer_parameters)


def _optimizer_bytes(part: Part, job: Job, machine: Machine) -> int:
    """Adam's. Routed experts have fewer replicas than the rest: ranks of one expert group hold different ones."""
    each = (2 if job.element == FLOAT32 else 3) * FLOAT32
    if not machine.distributed_optimizer:
        return each * part.num_held_parameters
    layout = job.layout
    replicas = machine.ranks // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    experts = part.num_expert_parameters
    shares = [(part.num_held_parameters - experts, replicas), (experts, replicas // layout.expert_model_parallel_size)]
    return sum(each * -(-number // over) for number, over in shares)


def _moments(job: Job, machine: Machine, stage: int, pairs: list[tuple[Model, Part]]) -> Iterator[dict[str, int]]:
    """What stands beside weights and optimizer at the moments of a step that can be the fullest."""
    assert job.batch is not None
    flow = Flow.of(job.layout, job.batch, element=job.element, fused=machine.fused)
    last = stage == job.layout.pipeline_model_parallel_size - 1
    on_their_way = min(job.micro_batches(machine.ranks), job.layout.pipeline_model_parallel_size - stage)
    messages = _message_bytes(job, flow, stage, on_their_way, pairs)
    passing = max((at_work_forward(part, flow) for model, part in pairs if not model.trained), default=0)
    if not job.trains:
        logits = sum(_loss_bytes(job, machine, flow, pairs)) if last else 0
        yield {"messages": messages, "at work": passing}
        yield {"messages": messages, "logits": logits, "at work": sum(flow.stream(part) for _, part in pairs)}
        return
    kept, working = 0, 0
    for model, part in pairs:
        if model.trained:
            of_this, again = of_layers(part, flow, job.recomputation)
            kept += of_this + (norm_bytes(part, flow) if last else 0)
            working = max(working, again + at_work_backward(part, flow) + _fresh_gradient(part, flow))
    before = {"activations": (on_their_way - 1) * kept, "messages": messages}
    now = before | {"activations": on_their_way * kept}
    yield before | {"at work": passing}
    logits, waiting = _loss_bytes(job, machine, flow, pairs) if last else (0, 0)
    teachers = sum(flow.stream(part) for model, part in pairs if not model.trained) if last else 0
    yield now | {"logits": logits + waiting + teachers}
    yield now | {"logits": waiting, "at work": working}
    if stage == 0:
        tables = (part.padded_vocab_size * part.hidden_size for model, part in pairs if model.trained)
        yield before | {"at work": flow.element * max(tables)}


def _fresh_gradient(part: Part, flow: Flow) -> int:
    """Of a weight, before it is added to the buffer of all; transformer-engine's products add to it at once."""
    return 0 if flow.fused else flow.element * part.hidden_size * max(part.fc1_size, part.qkv_projection_size)


def _message_bytes(job: Job, flow: Flow, stage: int, on_their_way: int, pairs: list[tuple[Model, Part]]) -> int:
    """One received for each micro-batch on its way, one sent, and in training a gradient each way; what was sent is let
    go (deallocate_pipeline_outputs)."""
    one = sum(flow.stream(part) for _, part in pairs)
    ways = 2 if job.trains else 1
    received = 0 if stage == 0 else on_their_way + ways - 1
    sent = 0 if stage == job.layout.pipeline_model_parallel_size - 1 else ways
    return one * (received + sent)


def _loss_bytes(job: Job, machine: Machine, flow: Flow, pairs: list[tuple[Model, Part]]) -> tuple[int, int]:
    """On the last stage: what the loss holds while it is formed, and what then waits for the backward pass."""
    if job.loss == NONE:
        return 0, 0
    rows = pairs[0][1].padded_vocab_size
    streams = sum(part.hidden_size for _, part in pairs) * flow.element
    gathered = flow.tokens * streams if flow.local_tokens < flow.tokens else 0
    if job.loss == CROSS_ENTROPY:
        logits = flow.tokens * rows * (FLOAT32 if flow.element == FLOAT32 else flow.element + FLOAT32)
        gradient = 0 if flow.fused else flow.element * rows * pairs[0][1].hidden_size
        return logits + gathered + gradient, 0
    compared = 2 if job.loss == DIVERGENCE and len(pairs) > 1 else 1
    longest = max(1, LOGITS_BYTES // (compared * rows * flow.element))
    chunks = -(-flow.tokens // longest)
    tokens = -(-flow.tokens // chunks)
    elements = CHUNK_ELEMENTS if machine.fused else _cpu_elements(job)
    in_float32 = _PIECES_IN_FLOAT32 * FLOAT32 * min(tokens, max(1, elements // rows)) * rows
    waiting = 0
    for model, part in pairs:
        if model.trained:
            summed = FLOAT32 if chunks > 1 else flow.element
            waiting += part.hidden_size * (rows * summed + flow.tokens * flow.element)
    return compared * tokens * rows * flow.element + in_float32 + gathered, waiting


def _cpu_elements(job: Job) -> int:
    return CPU_CHUNK_ELEMENTS if job.layout.tensor_model_parallel_size == 1 else CPU_CHUNK_ELEMENTS_OF_RANKS
