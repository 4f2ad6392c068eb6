"""Which neurons a layer computes, worked out on the GPU: `flashsparse.choice` for arrays that stay there.

A choice costs one read-back: the list of neurons and its length, which the host needs to look up slots and to read.
Hints for later layers come back with it (`guess`); a token that is planned whole has no choices (`named`). Scores come
from `metal_kernels`, from MLX's products for low-rank predictors.
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


@dataclass
class Named:
    """What a chooser names, on the GPU. bits: uint32 [T, words]; activated float32 [T, I], exact gates.

    `masked`: tokens leave out what others need.
    """

    bits: mx.array
    activated: mx.array | None = None
    masked: bool = True


class MetalChooser(Protocol):
    """One layer's."""

    def choose(self, x: mx.array) -> MetalChoice:
        """What the tier computes for x [T, d]."""

    def whole(self, x: mx.array) -> MetalChoice:
        """What gives the dense model's result."""


class Reading(MetalChooser, Protocol):
    """A chooser whose list is made on the GPU and read back."""

    def named(self, x: mx.array) -> Named:
        """What `choose` reads back."""

    def guess(self, x: mx.array) -> mx.array:
        """For a state x [1, d] near the layer's input: what `likely` takes, once read back. Decides nothing."""

    def likely(self, guessed: np.ndarray) -> tuple[np.ndarray, float]:
        """Scores [I], and the score from which on a neuron is likely to be needed."""


@dataclass
class Everything:
    """Every record, which carries its own gate row. Needs no read-back."""

    records: int

    def choose(self, x: mx.array) -> MetalChoice:
        return MetalChoice(np.arange(self.records, dtype=np.int32), self.records)

    whole = choose


def listed(timeline: Timeline, named: Named, records: int) -> MetalChoice:
    """The choice that was named, read back."""
    bits = named.bits
    ids, count, kept = select.compact(bits, records)
    several = bits.shape[0] > 1
    timeline.wait(ids, count, *([bits] if several else []))
    found = np.array(ids, copy=False)[: int(np.array(count, copy=False)[0])]
    words = np.array(bits, copy=False) if several else None
    return MetalChoice(found, records, named.activated, kept if several and named.masked else None, words)


def ranked(scores: np.ndarray, threshold: float, k: int | None) -> tuple[np.ndarray, float]:
    """Scores [I], and the one that selects."""
    if k is None:
        return scores, threshold
    return scores, max(threshold, float(np.partition(scores, -k)[-k]))


@dataclass
class Gate:
    """The exact active set: the scoring matrix is resident, as it is stored."""

    kernels: MetalKernels
    matrix: Matrix
    bias: mx.array | None
    records: int

    def choose(self, x: mx.array) -> MetalChoice:
        return listed(self.kernels.timeline, self.named(x), self.records)

    whole = choose

    def named(self, x: mx.array) -> Named:
        activated, bits = self.activated(x)
        return Named(bits, activated, masked=False)

    def guess(self, x: mx.array) -> mx.array:
        return mx.abs(self.activated(x)[0])

    def likely(self, guessed: np.ndarray) -> tuple[np.ndarray, float]:
        return guessed[0], float(np.finfo(np.float32).smallest_subnormal)

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
        return listed(self.kernels.timeline, self.named(x), self.records)

    whole = choose

    def named(self, x: mx.array) -> Named:
        return Named(self.guess(x))

    def guess(self, x: mx.array) -> mx.array:
        return candidates.candidates(self.copy, x, self.param)

    def likely(self, guessed: np.ndarray) -> tuple[np.ndarray, float]:
        """1 for those that cannot be excluded, else 0."""
        return np.unpackbits(guessed.view(np.uint8), bitorder="little")[: self.records].astype(np.float32), 1.0


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
        return listed(self.kernels.timeline, self.named(x), self.records)

    def whole(self, x: mx.array) -> MetalChoice:
        return Everything(self.records).choose(x)

    def named(self, x: mx.array) -> Named:
        scores, bits = self.score(x, self.threshold)
        return Named(bits if self.k is None else select.topk(scores, self.k, self.threshold))

    def guess(self, x: mx.array) -> mx.array:
        return self.score(x, self.threshold)[0]

    def likely(self, guessed: np.ndarray) -> tuple[np.ndarray, float]:
        return ranked(guessed[0], self.threshold, self.k)


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
        return listed(self.kernels.timeline, self.named(x), self.gate.records)

    def whole(self, x: mx.array) -> MetalChoice:
        return self.gate.whole(x)

    def named(self, x: mx.array) -> Named:
        activated, active = self.gate.activated(x)
        scores = self._scores(x, activated)
        return Named(select.topk(scores, self.k or self.gate.records, self.threshold) & active, activated)

    def guess(self, x: mx.array) -> mx.array:
        return self._scores(x, self.gate.activated(x)[0] if self.magnitude else x)

    def likely(self, guessed: np.ndarray) -> tuple[np.ndarray, float]:
        return ranked(guessed[0], self.threshold, self.k)

    def _scores(self, x: mx.array, activated: mx.array) -> mx.array:
        return mx.abs(activated) if self.magnitude else self.kernels.linear(self.product, self.gate.bias, x)


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
