"""Which neurons a layer computes for its input: every one, the exact active set or a superset, or what is predicted.

Owns the tiers' decisions; scores come from the predictors, reading and computing the chosen records is the streamed
FFN's. A token's neurons do not depend on the tokens that it is computed with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from flashsparse.compact import CompactGate
    from flashsparse.kernels import Kernels
    from flashsparse.sparsity.predictors import ExactGate, Predictor
    from flashsparse.weights import Weight


@dataclass(frozen=True)
class Choice:
    """Valid until the next choice of any layer.

    ids: ascending int32, the neurons that some token needs. activated: float32 [T, I], exact activations where the
    gate is resident, zero for neurons that are left out. mask: uint8 [T, I], which neurons each token needs; None when
    `activated` tells, or when every token needs all of `ids`.
    """

    ids: np.ndarray
    activated: np.ndarray | None = None
    mask: np.ndarray | None = None

    def pairs(self, tokens: int) -> int:
        """How many (token, neuron) pairs are needed."""
        needed = self.activated if self.mask is None else self.mask.view(bool)
        return tokens * len(self.ids) if tokens == 1 or needed is None else int(np.count_nonzero(needed))

    def selected(self, tokens: int, records: int) -> np.ndarray:
        """A new bool [T, I]: the same as an array."""
        if self.activated is not None:
            return self.activated != 0
        if self.mask is not None:
            return self.mask.astype(bool)
        result = np.zeros((tokens, records), bool)
        result[:, self.ids] = True
        return result


class Chooser(Protocol):
    """One layer's."""

    def choose(self, x: np.ndarray) -> Choice:
        """What the tier computes for x [T, d]."""

    def whole(self, x: np.ndarray) -> Choice:
        """What gives the dense model's result: every neuron, but those that are known to be zero."""


@dataclass
class Whole:
    """Every record, which carries its own gate row."""

    records: int

    def choose(self, x: np.ndarray) -> Choice:
        return Choice(np.arange(self.records, dtype=np.int32))

    whole = choose


@dataclass
class Exact:
    """The exact active set: the scoring matrix is resident. `scores` [chunk, I] is scratch."""

    kernels: Kernels
    scoring: Weight
    bias: np.ndarray | None
    scores: np.ndarray

    def choose(self, x: np.ndarray) -> Choice:
        activated = self.scores[: len(x)]
        self.kernels.linear(self.scoring, self.bias, x, activated)
        self.kernels.activate(activated)
        return Choice(self.kernels.active(activated), activated)

    whole = choose

    def guess(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """Magnitudes [I] for a state x [1, d] near the layer's input, and the least that counts. See prefetch.py."""
        activated = self.scores[:1]
        self.kernels.linear(self.scoring, self.bias, x, activated)
        self.kernels.activate(activated)
        return np.abs(activated[0], out=activated[0]), float(np.finfo(np.float32).smallest_subnormal)


@dataclass
class Searched:
    """Every neuron that a compact copy of the scoring matrix cannot exclude; records tell which of them are active.

    The result is that of the exact active set: the activation of the others is zero. `mask` [chunk, I] is scratch.
    """

    kernels: Kernels
    gate: CompactGate
    mask: np.ndarray

    def choose(self, x: np.ndarray) -> Choice:
        mask, ids = self.mask[: len(x)], np.empty(self.mask.shape[1], np.int32)
        return Choice(ids[: self.kernels.candidates(self.gate, x, mask, ids)], mask=mask)

    whole = choose

    def guess(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """1 for neurons [I] that a state x [1, d] near the layer's input cannot exclude, else 0. See prefetch.py."""
        self.choose(x)
        return self.mask[0].astype(np.float32), 1.0


@dataclass
class Predicted:
    """Neurons whose score reaches `threshold` (-inf: any) and, with `k`, is among the token's k highest.

    scores and mask [chunk, I] are scratch.
    """

    kernels: Kernels
    predictor: Predictor
    threshold: float
    k: int | None
    scores: np.ndarray
    mask: np.ndarray

    def choose(self, x: np.ndarray) -> Choice:
        return Choice(self._select(x), mask=self.mask[: len(x)])

    def whole(self, x: np.ndarray) -> Choice:
        return Whole(self.scores.shape[1]).choose(x)

    def guess(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """Scores [I] of a state x [1, d] near the layer's input, and the one that selects. See prefetch.py."""
        scores = self.scores[0]
        self.predictor.score(x, self.scores[:1])
        if self.k is None:
            return scores, self.threshold
        return scores, max(self.threshold, float(np.partition(scores, -self.k)[-self.k]))

    def _select(self, x: np.ndarray) -> np.ndarray:
        scores = self.scores[: len(x)]
        self.predictor.score(x, scores)
        ids = np.empty(scores.shape[1], np.int32)
        return ids[: self.kernels.select(scores, self.threshold, self.k, self.mask[: len(x)], ids)]


@dataclass
class PredictedGate(Predicted):
    """The same where the scoring matrix is resident: the score is exact, and so are the activations."""

    predictor: ExactGate

    def choose(self, x: np.ndarray) -> Choice:
        self._select(x)
        activated = self.predictor.activated[: len(x)]
        np.copyto(activated, 0, where=self.mask[: len(x)] == 0)
        return Choice(self.kernels.active(activated), activated)

    def whole(self, x: np.ndarray) -> Choice:
        return Exact(self.kernels, self.predictor.gate, self.predictor.bias, self.predictor.activated).choose(x)
