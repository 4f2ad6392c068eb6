"""The neurons that a compact gate cannot exclude, on the GPU: no active one is left out. docs/exact.md has the bound.

The native kernels decide in float64, these in float32 with what that rounds added to the bound (2^-21 of each term), so
they name what the native ones name and a few more: MARGIN of the active ones at most, in layers like those of models.
A group whose scale or step is below 2^-100 counts as unbounded, so that a GPU that flushes subnormal numbers to zero
misses nothing either. Which candidates are active is `sparse_ffn.hidden`'s, from the records.

By design (not measured on a Mac): the high bits are read once a token, 64 bytes a lane and group in loads of 16, eight
lanes a row; the low bits of rows left open only (`candidate_bytes`). Two integer operations and a multiply-add a weight
and 8 bits: memory and arithmetic are about even on an M1. 128 bytes of threadgroup memory, 256 threads, I / 32
threadgroups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.launch import SIMD, kernel
from metal_kernels.select import _ints, words_of

GROUP = 64  # columns that share a scale
MARGIN = 0.02


@dataclass(frozen=True)
class CompactCopy:
    """A gate [I, d] in 8 + 4 bits, d padded to groups of 64: high int8 [I, groups * 64], low uint8 [I, groups * 32].

    scales: bf16 as uint16 [I, groups]; errors float32 [I, 3]; bias float32 [I] or None, added to the gate.
    """

    high: mx.array
    low: mx.array
    scales: mx.array
    errors: mx.array
    bias: mx.array | None = None


def candidates(copy: CompactCopy, x: mx.array, param: float | None = None) -> mx.array:
    """Bits uint32 [T, words] of the neurons whose activation may differ from zero for x [T, d].

    `param`: FATReLU's threshold, None for the activations that are zero up to zero. A token that holds NaN or Inf has
    every neuron.
    """
    tokens, d = x.shape
    neurons, groups = copy.scales.shape
    if groups != -(-d // GROUP):
        raise ValueError(f"scales: found {groups} groups, expected {-(-d // GROUP)} for {d} columns")
    words, figures = words_of(neurons), _figures(d, param)
    rounded = _rounded(x, figures, groups)
    extra = [] if copy.bias is None else [copy.bias]
    built = kernel(
        "candidates",
        ("q", "sums", "steps", "norms", "bounds", "high", "low", "scales", "errors", "limits", "figures")
        + (("bias",) if extra else ()),
        ("bits",),
        (),
        (f"HAS_BIAS={len(extra)}",),
    )
    parts = (copy.high, copy.low, copy.scales, copy.errors)
    (made,) = built(
        inputs=[*rounded, *parts, _ints(neurons, words), figures, *extra],
        output_shapes=[(tokens, words)],
        output_dtypes=[mx.uint32],
        grid=(words * 256, tokens, 1),
        threadgroup=(256, 1, 1),
    )
    return made


def _rounded(x: mx.array, figures: mx.array, groups: int) -> list[mx.array]:
    """q int16 [T, groups * 64], and sums (int32), steps, norms and bounds (float32) [T, groups] of it."""
    tokens = x.shape[0]
    built = kernel("candidates_round", ("x", "figures"), ("q", "sums", "steps", "norms", "bounds"))
    made: list[mx.array] = built(
        inputs=[x, figures],
        output_shapes=[(tokens, groups * GROUP)] + [(tokens, groups)] * 4,
        output_dtypes=[mx.int16, mx.int32, mx.float32, mx.float32, mx.float32],
        grid=(SIMD, groups, tokens),
        threadgroup=(SIMD, 4, 1),
    )
    return made


@cache
def _figures(d: int, param: float | None) -> mx.array:
    """gamma, the factor for rounding in the bound, what underflow takes, and the limit: float32, rounded up or down.

    A gate's sums here are at most d / 8 + 48 roundings deep, whatever the order of simd_sum; the copy's and those of
    the integers of x take the rest.
    """
    groups = -(-d // GROUP)
    n = (d // 8 + 48 + 2 * (groups // 8 + 16) + 16) * 2.0**-24
    limit = 0.0 if param is None else param - abs(param) * 2.0**-21
    slack, tiny = 1 + (groups + 64) * 2.0**-23, (d + 4096 * groups) * 2.0**-125
    return mx.array([n / (1 - n) * (1 + 2.0**-20), slack * (1 + 2.0**-20), tiny, limit], mx.float32)


def candidate_bytes(neurons: int, d: int, tokens: int, opened: int) -> int:
    """Bytes of the copy that `candidates` reads, with the low bits of `opened` pairs of token and neuron."""
    groups = math.ceil(d / GROUP)
    return tokens * neurons * (groups * (GROUP + 2) + 12) + opened * groups * (GROUP // 2 + 2)


def candidates_reference(copy: CompactCopy, x: mx.array, param: float | None = None) -> mx.array:
    """bool [T, I] in plain MLX operators: the bound with the copy's own errors only, in whole rows of float32.

    What it names `candidates` names too, unless rounding decides: it checks how the kernel reads a copy, not its bound.
    """
    neurons, groups = copy.scales.shape
    steps = copy.scales.view(mx.bfloat16).astype(mx.float32)
    low = copy.low.reshape(neurons, groups, GROUP // 2)
    sixteenths = mx.concatenate([low & 15, low >> 4], axis=2).astype(mx.float32) - 8
    values = (copy.high.reshape(neurons, groups, GROUP).astype(mx.float32) + sixteenths / 16) * steps[..., None]
    wide = mx.pad(x.astype(mx.float32), [(0, 0), (0, groups * GROUP - x.shape[1])])
    norms = mx.sqrt((wide.reshape(len(x), groups, GROUP) ** 2).sum(axis=2)) @ steps.T
    score = wide @ values.reshape(neurons, -1).T
    score = score if copy.bias is None else score + copy.bias
    return ~(score + copy.errors[:, 1] * norms <= (0.0 if param is None else param))
