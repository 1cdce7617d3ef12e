"""Sums of activations on a CPU, compiled by numba: each value is read from memory once, and nothing is written back.

    act        an activation, contiguous; bf16 and float32 as they are, others as float32    [s, b, c]
    counts     which tokens count                                                            [b, s] bool
    sums       sum |a|, sum a, sum a^2 of each sample                                        [3, b, c] float64
    moments    sum and sum of squares over the samples of what these sums make               [2, 3, c] float64

torch needs a pass over memory for each of: the float32 copy, the absolute values, mean and variance. Beside a small
model's forward pass in bf16 those are a tenth of its time, these kernels less than half of that.

A kernel reads a value's bits as an unsigned integer: bf16 is the upper half of float32. It is compiled at the first
call of a process and kept on disk for the next ones (in `__pycache__`, or the user's cache where that is read-only).
Its threads are Python's, since numba's own do not survive a fork; which of them does what changes no number.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

STRIP = 2048  # channels: four float32 rows of a strip stay in a core's L1 cache, and a strip of a token is a page
BLOCK = 64  # tokens summed in float32 before they are added in float64: rounding below 2e-6
PARALLEL_ELEMENTS = 1 << 20  # of each thread at least: a quarter of a millisecond, more than handing it over costs


def _compiled(**options: Any) -> Callable[[Callable], Any]:
    """numba's njit; kept on disk, unless no folder can be written (a read-only installation without a home)."""

    def compiled(function: Callable) -> Any:
        try:
            return njit(function, cache=True, nogil=True, **options)
        except RuntimeError:
            return njit(function, nogil=True, **options)

    return compiled


def sums_of_tokens(activation: Tensor, counts: Tensor | None) -> Tensor:
    """sum |a|, sum a and sum a^2 of each sample over the tokens that count.

    Args:
        activation: [s, b, c], any float dtype.
        counts: [b, s] bool; None: every token counts.
    Returns:
        [3, b, c] float64.
    """
    bits = _bits(activation)
    seq_length, batch, channels = bits.shape
    sums = np.zeros((3, batch, channels))
    if counts is None:  # a token's samples lie beside each other: one long row is read fastest
        bits, of_rows = bits.reshape(seq_length, 1, batch * channels), sums.reshape(3, 1, batch * channels)
        marks = np.ones((1, seq_length), bool)
    else:
        of_rows, marks = sums, counts.contiguous().numpy()
    strips = bits.shape[1] * -(-bits.shape[2] // STRIP)
    _share(lambda first, last: _add_strips(bits, marks, first, last, of_rows), strips, bits.size)
    return torch.from_numpy(sums)


def head_norms(activation: Tensor, heads: int) -> Tensor:
    """L2 norm of each token's heads: [s, b, n*d] of n heads -> [s, b, n] float32."""
    bits = _bits(activation)
    norms = np.empty((*bits.shape[:2], heads), np.float32)
    _share(lambda first, last: _norms(bits, first, last, norms), bits.shape[0], bits.size)
    return torch.from_numpy(norms)


def add_samples(sums: Sequence[Tensor], num_tokens: Tensor, moments: Tensor) -> Tensor:
    """`statistics.add_samples`."""
    finite, tokens = np.empty((len(sums), num_tokens.numel()), bool), num_tokens.numpy()
    for place, (of_place, into) in enumerate(zip(sums, moments.numpy(), strict=True)):
        _add_samples(of_place.numpy(), tokens, into, finite[place])
    return torch.from_numpy(finite)


def _bits(activation: Tensor) -> np.ndarray:
    """[s, b, c] uint16 of bf16, or uint32 of float32; shares memory with a contiguous activation of these dtypes."""
    values = activation.detach() if activation.requires_grad else activation
    if not values.is_contiguous():
        values = values.contiguous()
    if values.dtype is torch.bfloat16:
        return values.view(torch.uint16).numpy()
    return (values if values.dtype is torch.float32 else values.float()).numpy().view(np.uint32)


def _share(work: Callable[[int, int], Any], units: int, elements: int) -> None:
    """Run `work(first, last)` over all units, split over as many threads as torch uses and the elements are worth."""
    threads = min(torch.get_num_threads(), units, elements // PARALLEL_ELEMENTS)
    if threads <= 1:
        work(0, units)
        return
    edges = [units * part // threads for part in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(work, edges[:-1], edges[1:]))


@functools.lru_cache(maxsize=1)
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """By process: a fork has no threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"importance-{pid}")


@_compiled()
def _float32(bits: np.unsignedinteger[Any], shift: np.uint32) -> np.float32:
    return np.uint32(np.uint32(bits) << shift).view(np.float32)


@_compiled(fastmath={"contract"})
def _add_strips(bits: np.ndarray, counts: np.ndarray, first: int, last: int, sums: np.ndarray) -> None:
    """Strips `first` to `last` (all strips of a sample, then those of the next) of the sums.

    Within a block a^2 is taken around the a of its middle token, so that the variance of a channel with a large
    constant part (norm outputs have them) survives. Not of the first: first tokens are outliers.
    """
    channels, shift = bits.shape[2], np.uint32(32 - 8 * bits.itemsize)
    per_sample = (channels + STRIP - 1) // STRIP
    centre = np.empty(STRIP, np.float32)
    absolute, plain, square = np.empty(STRIP, np.float32), np.empty(STRIP, np.float32), np.empty(STRIP, np.float32)
    for strip in range(first, last):
        sample, left = strip // per_sample, strip % per_sample * STRIP
        width = min(STRIP, channels - left)
        tokens = np.nonzero(counts[sample])[0]
        for begin in range(0, tokens.size, BLOCK):
            block = tokens[begin : begin + BLOCK]
            middle = bits[block[block.size // 2], sample, left : left + width]
            for j in range(width):
                centre[j] = _float32(middle[j], shift)
                absolute[j], plain[j], square[j] = 0.0, 0.0, 0.0
            fours = block.size // 4 * 4
            for i in range(0, fours, 4):  # four tokens at once: their rows come from memory side by side
                row_a = bits[block[i], sample, left : left + width]
                row_b = bits[block[i + 1], sample, left : left + width]
                row_c = bits[block[i + 2], sample, left : left + width]
                row_d = bits[block[i + 3], sample, left : left + width]
                for j in range(width):
                    a, b = _float32(row_a[j], shift), _float32(row_b[j], shift)
                    c, d = _float32(row_c[j], shift), _float32(row_d[j], shift)
                    absolute[j] += (abs(a) + abs(b)) + (abs(c) + abs(d))
                    a, b, c, d = a - centre[j], b - centre[j], c - centre[j], d - centre[j]
                    plain[j] += (a + b) + (c + d)
                    square[j] += (a * a + b * b) + (c * c + d * d)
            for token in block[fours:]:
                row = bits[token, sample, left : left + width]
                for j in range(width):
                    value = _float32(row[j], shift)
                    distance = value - centre[j]
                    absolute[j] += abs(value)
                    plain[j] += distance
                    square[j] += distance * distance
            for j in range(width):
                around, distances = np.float64(centre[j]), np.float64(plain[j])
                sums[0, sample, left + j] += absolute[j]
                sums[1, sample, left + j] += distances + block.size * around
                sums[2, sample, left + j] += square[j] + around * (2 * distances + block.size * around)


@_compiled(fastmath={"contract", "reassoc"})  # reassoc: a sum over d in any order, so that it uses vectors
def _norms(bits: np.ndarray, first: int, last: int, norms: np.ndarray) -> None:
    """Tokens `first` to `last` of the norms."""
    heads, shift = norms.shape[2], np.uint32(32 - 8 * bits.itemsize)
    per_head = bits.shape[2] // heads
    for token in range(first, last):
        for sample in range(bits.shape[1]):
            for head in range(heads):
                total = np.float32(0)
                row = bits[token, sample, head * per_head : (head + 1) * per_head]
                for j in range(per_head):
                    value = _float32(row[j], shift)
                    total += value * value
                norms[token, sample, head] = np.sqrt(total)


@_compiled()
def _add_samples(sums: np.ndarray, num_tokens: np.ndarray, moments: np.ndarray, finite: np.ndarray) -> None:
    """The samples of one place."""
    first, second = moments[0], moments[1]
    for sample in range(num_tokens.size):
        share, total = 1 / max(num_tokens[sample], 1.0), 0.0
        absolute, plain, square = sums[0, sample], sums[1, sample], sums[2, sample]
        for j in range(absolute.size):
            mean = plain[j] * share
            variance = square[j] * share - mean * mean
            variance = 0.0 if variance < 0 else variance  # a NaN stays
            mean_abs, l2 = absolute[j] * share, np.sqrt(square[j])
            first[0, j] += mean_abs
            first[1, j] += l2
            first[2, j] += variance
            second[0, j] += mean_abs * mean_abs
            second[1, j] += l2 * l2
            second[2, j] += variance * variance
            total += mean_abs + l2 + variance  # none is negative: no infinity cancels another
        finite[sample] = np.isfinite(total)
