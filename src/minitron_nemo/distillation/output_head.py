"""What a model's logits are made of, without the logits: what its output layer reads, and the layer's weight.

    hidden   after the final layernorm        [s/cp, b, h], [s/(cp*tp), b, h] with sequence parallel
    weight   tied: of the embedding           [v/tp, h]

Communication: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.models.gpt import GPTModel
from torch import Tensor


@contextmanager
def without_logits(model: GPTModel) -> Iterator[None]:
    """Inside, the last stage's part gives what its output layer would read."""
    post_process = model.post_process
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = post_process


def output_weight(model: GPTModel) -> Tensor:
    """[v/tp, h] of the output layer, the embedding's where they are tied."""
    tied = model.share_embeddings_and_output_weights
    weight: Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return weight
