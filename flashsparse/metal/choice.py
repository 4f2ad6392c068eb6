"""Which neurons a layer computes, worked out on the GPU: `flashsparse.choice` for arrays that stay there.

A choice costs one read-back: the list of neurons and its length, which the host needs to look up slots and to read.
Scores come from `metal_kernels`, from MLX's products for low-rank predictors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np

from metal_kernels import candidates, select, value

if TYPE_CHECKING:
    from flashsparse.kernels.metal import Matrix, MetalKernels
    from flashsparse.metal.refills import Timeline


@dataclass
class MetalChoice:
    """ids: ascending int32, what some token needs. On the GPU: activated float32 [T, I], exact gates; kept uint8 [T, I]
    in the order of `ids`, which of them each token needs. bits: uint32 [T, words] of the same by neuron, with T > 1.
    """

    ids: np.ndarray
    records: int
    activated: mx.array | None = None
    kept: mx.array | None = None
    bits: np.ndarray | None = None

    @cached_property
    def mask(self) -> np.ndarray | None:
        """uint8 [T, I], for `likely_next`."""
        if self.bits is None:
            return None
        return np.unpackbits(self.bits.view(np.uint8), axis=1, bitorder="little")[:, : self.records]

    def pairs(self, tokens: int) -> int:
        """How many (token, neuron) pairs are needed."""
        return tokens * len(self.ids) if self.mask is None else int(np.count_nonzero(self.mask))


class MetalChooser(Protocol):
    """One layer's."""

    def choose(self, x: mx.array) -> MetalChoice:
        """What the tier computes for x [T, d]."""

    def whole(self, x: mx.array) -> MetalChoice:
        """What gives the dense model's result."""


@dataclass
class Everything:
    """Every record, which carries its own gate row. Needs no read-back."""

    records: int

    def choose(self, x: mx.array) -> MetalChoice:
        return MetalChoice(np.arange(self.records, dtype=np.int32), self.records)

    whole = choose


def listed(timeline: Timeline, bits: mx.array, records: int, activated: mx.array | None, masked: bool) -> MetalChoice:
    """The choice that bits [T, words] stand for, read back. `masked`: tokens leave out what others need."""
    ids, count, kept = select.compact(bits, records)
    several = bits.shape[0] > 1
    timeline.wait(ids, count, *([bits] if several else []))
    found = np.array(ids, copy=False)[: int(np.array(count, copy=False)[0])]
    words = np.array(bits, copy=False) if several else None
    return MetalChoice(found, records, activated, kept if several and masked else None, words)


@dataclass
class Gate:
    """The exact active set: the scoring matrix is resident, as it is stored."""

    kernels: MetalKernels
    matrix: Matrix
    bias: mx.array | None
    records: int

    def choose(self, x: mx.array) -> MetalChoice:
        activated, bits = self.activated(x)
        return listed(self.kernels.timeline, bits, self.records, activated, masked=False)

    whole = choose

    def activated(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Activated gates [T, I] and the bits of those that are not zero."""
        matrix, record = self.matrix, self.kernels.record
        return select.gate(
            matrix.data,
            x,
            record.activation,
            record.param,
            scales=matrix.scales,
            biases=matrix.biases,
            quant_bits=matrix.bits,
            bias=self.bias,
        )


@dataclass
class Search:
    """Every neuron that a compact copy of the scoring matrix cannot exclude; records tell which of them are active."""

    kernels: MetalKernels
    copy: candidates.CompactCopy
    param: float | None
    records: int

    def choose(self, x: mx.array) -> MetalChoice:
        bits = candidates.candidates(self.copy, x, self.param)
        return listed(self.kernels.timeline, bits, self.records, None, masked=True)

    whole = choose


# x [T, d] and a threshold -> scores float32 [T, I], and the bits of those not below it
Scorer = Callable[[mx.array, float], tuple[mx.array, mx.array]]


@dataclass
class Predict:
    """Neurons whose score reaches `threshold` (-inf: any) and, with `k`, is among the token's k highest."""

    kernels: MetalKernels
    score: Scorer
    threshold: float
    k: int | None
    records: int

    def choose(self, x: mx.array) -> MetalChoice:
        return listed(self.kernels.timeline, self.bits(x), self.records, None, masked=True)

    def whole(self, x: mx.array) -> MetalChoice:
        return Everything(self.records).choose(x)

    def bits(self, x: mx.array) -> mx.array:
        """uint32 [T, words]: the neurons selected."""
        scores, bits = self.score(x, self.threshold)
        return bits if self.k is None else select.topk(scores, self.k, self.threshold)


@dataclass
class PredictGate:
    """The same where the scoring matrix is resident: the score is exact (`magnitude`: |act| of it), and so are the
    activations. Neurons that are zero are left out too."""

    kernels: MetalKernels
    gate: Gate
    product: Matrix
    threshold: float
    k: int | None
    magnitude: bool

    def choose(self, x: mx.array) -> MetalChoice:
        activated, active = self.gate.activated(x)
        scores = mx.abs(activated) if self.magnitude else self.kernels.linear(self.product, self.gate.bias, x)
        kept = select.topk(scores, self.k or self.gate.records, self.threshold)
        return listed(self.kernels.timeline, kept & active, self.gate.records, activated, masked=True)

    def whole(self, x: mx.array) -> MetalChoice:
        return self.gate.whole(x)


def by_copy(gate: value.Copy, magnitude: bool) -> Scorer:
    """The gate's pre-activation by a low-bit copy of it; `magnitude`: |silu| of that."""

    def score(x: mx.array, threshold: float) -> tuple[mx.array, mx.array]:
        rounded = select.round_tokens(x, group_of(gate))
        return select.score(rounded, *gate.parts, threshold, bits=gate.bits, bias=gate.bias, magnitude=magnitude)

    return score


def by_value(kernels: MetalKernels, gate: value.Copy, up: value.Copy | None, norms: mx.array) -> Scorer:
    """|act(gate)| |up| norm by low-bit copies of both."""

    def score(x: mx.array, threshold: float) -> tuple[mx.array, mx.array]:
        record, rounded = kernels.record, select.round_tokens(x, group_of(gate))
        return value.value(rounded, gate, up, norms, threshold, record.activation, record.param)

    return score


def by_factors(kernels: MetalKernels, fc1: Matrix, fc2: Matrix, bias: mx.array | None, relu: bool) -> Scorer:
    """fc2 (fc1 x) + bias, with a ReLU between when `relu`."""

    def score(x: mx.array, threshold: float) -> tuple[mx.array, mx.array]:
        middle = kernels.linear(fc1, None, x)
        scores = kernels.linear(fc2, bias, mx.maximum(middle, 0) if relu else middle)
        return scores, select.topk(scores, scores.shape[1], threshold)

    return score


def group_of(copy: value.Copy) -> int:
    """Columns that share a scale."""
    return copy.weight.shape[1] * 32 // copy.bits // copy.scales.shape[1]
