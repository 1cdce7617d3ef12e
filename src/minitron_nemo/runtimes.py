"""Which shapes other programs take, and which of them run well there.

    opens      transformers builds a family's model from config.json, or its config class refuses the shape
    suits      tensor cores, llama.cpp's quantization and tensor parallelism each like dims of their own multiples

Pure arithmetic over the tables below.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from minitron_nemo.checks import Mistake, nearest_multiples, require
from minitron_nemo.shape import ModelShape

# ---- what opens ------------------------------------------------------------------------------------------------------

_HIDDEN_IN_HEADS = {"llama": "transformers 5 (seen in 5.23; 4.57 opens it)"}
"""Family -> whose config class wants hidden_size to be a multiple of num_attention_heads even where head_dim says how
wide a head is (huggingface/transformers issue 46082)."""

_SAME_MATHEMATICS = {"llama": ("mistral",)}
"""Family -> families whose model computes the same from the same weights, where there are no biases of linears."""


def wants_whole_heads(family: str) -> bool:
    """Whether a model of this family opens only where hidden_size is a multiple of num_attention_heads."""
    return family in _HIDDEN_IN_HEADS


def opening_problem(shape: ModelShape) -> str | None:
    """Who does not open a model of this shape and family, and why; None where nobody is known to refuse it."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if not wants_whole_heads(shape.family) or hidden % heads == 0:
        return None
    refusing = _HIDDEN_IN_HEADS[shape.family]
    return (
        f"a {shape.family} of hidden_size={hidden} and num_attention_heads={heads} is not opened by {refusing}: its "
        "config class wants the first to be a multiple of the second"
    )


def require_opens(target: ModelShape, source: ModelShape) -> None:
    """ValueError where the student would not open and its teacher does."""
    problem = opening_problem(target)
    if problem is None or opening_problem(source) is not None:
        return
    hidden, heads = target.hidden_size, target.num_attention_heads
    near = [size for size in nearest_multiples(hidden, heads).split(", ") if int(size) <= source.hidden_size]
    fitting = [str(n) for n in _heads_of(target, source) if hidden % n == 0]
    ways = [f"target.hidden_size={' or '.join(near)}"] * bool(near)
    ways += [f"target.num_attention_heads={' or '.join(fitting[:4])}"] * bool(fitting)
    near_by = f"Nearest that open: {', or '.join(ways) or 'none'}."
    raise Mistake(f"{problem[0].upper()}{problem[1:]}. {near_by}{renaming(target)}")


def renaming(shape: ModelShape) -> str:
    """The way out that leaves the dims as they are, as a sentence; empty where there is none."""
    names = " or ".join(_relatives(shape))
    if not names:
        return ""
    return (
        f" Or call it a {names}, which computes the same and is opened: prune.family={names}, and where the student is "
        f"there already export_hf.family={names}."
    )


def nearest_that_opens(wanted: ModelShape, source: ModelShape, steps: Mapping[str, int]) -> ModelShape | None:
    """The shape nearest to `wanted` that opens; None where none does.

    Args:
        source: what limits the dims.
        steps: dims that may change -> what they must be multiples of; only hidden_size and num_attention_heads matter.
    """
    if opening_problem(wanted) is None:
        return wanted
    hidden_step, head_step = steps.get("hidden_size"), steps.get("num_attention_heads")
    heads = [wanted.num_attention_heads]
    if head_step is not None:
        heads = [count for count in _heads_of(wanted, source) if count % head_step == 0]
    pairs = [(wanted.hidden_size, count) for count in heads if wanted.hidden_size % count == 0]
    if hidden_step is not None:
        for count in heads:
            multiple = math.lcm(hidden_step, count)
            below = wanted.hidden_size // multiple * multiple
            pairs += [(size, count) for size in (below, below + multiple) if 0 < size <= source.hidden_size]

    def distance(pair: tuple[int, int]) -> float:
        return abs(math.log(pair[0] / wanted.hidden_size)) + abs(math.log(pair[1] / wanted.num_attention_heads))

    uncut = {dim: getattr(source, dim) for dim in steps}  # a cut that was asked for stays one, where it can
    cut = [(h, n) for h, n in pairs if h != uncut.get("hidden_size") and n != uncut.get("num_attention_heads")]
    pairs = cut or pairs
    if not pairs:
        return None
    hidden, count = min(pairs, key=lambda pair: (distance(pair), pair))
    return dataclasses.replace(wanted, hidden_size=hidden, num_attention_heads=count)


def as_family(shape: ModelShape, family: str | None) -> ModelShape:
    """The same model under another family's name; None keeps its own.

    Raises: ValueError: that family computes something else.
    """
    if family is None or family == shape.family:
        return shape
    names = _relatives(shape)
    known = f"It can be {' or '.join((*names, shape.family))}." if names else f"Leave it out, or set {shape.family}."
    biases = ", with biases" if shape.add_bias_linear or shape.add_qkv_bias else ""
    require(
        family in names,
        f"family={family} is another model than this {shape.family}{biases}: the same weights would mean something "
        f"else. {known}",
    )
    return dataclasses.replace(shape, family=family)


def _relatives(shape: ModelShape) -> tuple[str, ...]:
    """Families that compute the same as this model."""
    return () if shape.add_bias_linear or shape.add_qkv_bias else _SAME_MATHEMATICS.get(shape.family, ())


def _heads_of(shape: ModelShape, source: ModelShape) -> range:
    """Numbers of heads that fit the groups, up to what the source's groups have."""
    groups = shape.num_query_groups
    return range(groups, groups * source.heads_per_group + 1, groups)


# ---- what suits ------------------------------------------------------------------------------------------------------

WIDE_DIMS = ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
"""Dims of matrices' rows and columns, which hardware likes in multiples."""
DEFAULT_MULTIPLE = 64
"""Of wide dims that nobody named in numbers: bf16 tiles of tensor cores are 64 wide and more."""
_TENSOR_CORES, _TENSOR_CORES_AT_LEAST = 16, 8  # 32 bytes of bf16; below 16 bytes no tensor core is used
_K_QUANTS, _SMALL_QUANTS = 256, 32  # QK_K, and the blocks of q8_0, q5_0 and q4_0
_TENSOR_PARALLEL = (2, 4, 8)


def default_multiple(source: ModelShape, dim: str) -> int:
    """What a share of a wide dim is rounded to: 64, or the largest power of two in the source's, if that is smaller."""
    size = getattr(source, dim)
    return min(DEFAULT_MULTIPLE, size & -size) if dim in WIDE_DIMS else 1


def suits(shape: ModelShape) -> dict[str, str]:
    """Runtime -> a sentence on how well the shape fits it."""
    return {
        "tensor cores": _of_tensor_cores(shape),
        "llama.cpp K-quants": _of_k_quants(shape),
        "tensor parallelism": _of_tensor_parallelism(shape),
    }


def _wide_sizes(shape: ModelShape) -> dict[str, int]:
    return {dim: getattr(shape, dim) for dim in shape.prunable_dims if dim in WIDE_DIMS}


def _no_multiples(sizes: Mapping[str, int], of: int) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size % of)


def _of_tensor_cores(shape: ModelShape) -> str:
    sizes = _wide_sizes(shape)
    if slow := _no_multiples(sizes, _TENSOR_CORES_AT_LEAST):
        return f"slow: {slow} no multiple of {_TENSOR_CORES_AT_LEAST}"
    if some := _no_multiples(sizes, _TENSOR_CORES):
        return f"not at full speed: {some} no multiple of {_TENSOR_CORES}"
    return f"full speed: {', '.join(sizes)} multiples of {_TENSOR_CORES}"


def _of_k_quants(shape: ModelShape) -> str:
    rows = _wide_sizes(shape) | {"num_attention_heads x kv_channels": shape.query_projection_size}
    if unquantized := _no_multiples(rows, _SMALL_QUANTS):
        return f"rows of {unquantized} stay in 16 bits: no multiple of {_SMALL_QUANTS}"
    if others := _no_multiples(rows, _K_QUANTS):
        return f"rows of {others} get larger quants (q4_0, q5_0, q8_0): no multiple of {_K_QUANTS}"
    return f"every row: multiples of {_K_QUANTS}"


def _of_tensor_parallelism(shape: ModelShape) -> str:
    """As vLLM splits: heads and neurons divide; groups do, or are held more than once."""
    split = {dim: size for dim, size in _wide_sizes(shape).items() if dim != "hidden_size"}
    split["num_attention_heads"], groups = shape.num_attention_heads, shape.num_query_groups
    divides = [size for size in _TENSOR_PARALLEL if not _no_multiples(split, size)]
    fitting = [size for size in divides if groups % size == 0 or size % groups == 0]
    missing = [size for size in _TENSOR_PARALLEL if size not in fitting]
    words = f"sizes {', '.join(map(str, fitting))}" if fitting else "1 only"
    if not missing:
        return words
    hindrance = _no_multiples(split, missing[0]) or f"num_query_groups={groups}"
    return f"{words}; not {', '.join(map(str, missing))} ({hindrance})"
