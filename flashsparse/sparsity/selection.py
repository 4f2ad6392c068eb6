"""Scores into sets of neurons, and how good the sets are. The numpy reference of what the engine selects.

A neuron is selected when its score is not below the threshold, so a NaN is selected and bad numbers surface. Where the
scores come from is the predictors' matter, where the thresholds come from that of calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashsparse.errors import UsageError
from flashsparse.sparsity.activations import activate, has_zeros, intermediate

RULES = ("threshold", "topk", "topk_and_threshold")


def scores_from_gate(name: str, param: float | None, gate: np.ndarray) -> np.ndarray:
    """The score of pre-activations [T, I], exact or from a copy: themselves, or |silu(g)| where none is zero."""
    return gate if has_zeros(name) else np.abs(activate(name, param, gate))


def scores_from_gate_up(
    name: str, param: float | None, gate: np.ndarray, up: np.ndarray | None, norms: np.ndarray
) -> np.ndarray:
    """The value score |h| * ||down column|| [T, I] of approximate gate and up (|a| without up); norms [I]."""
    return np.abs(intermediate(name, param, gate, up)) * norms


def select(scores: np.ndarray, rule: str, threshold: float | None = None, k: int | None = None) -> np.ndarray:
    """bool [T, I]: the neurons that `rule` selects for each token.

    Raises UsageError for an unknown rule, one without the threshold or k it needs, and a k outside 0..I.
    """
    if rule not in RULES:
        raise UsageError(f"selection {rule!r}: expected one of {', '.join(RULES)}")
    if rule == "topk":
        return top(scores, _k(rule, k, scores.shape[1]))
    if threshold is None or np.isnan(threshold):
        raise UsageError(f"selection {rule}: found threshold {threshold}, expected a number")
    above = above_threshold(scores, threshold)
    return above if rule == "threshold" else above & top(scores, _k(rule, k, scores.shape[1]))


def above_threshold(scores: np.ndarray, threshold: float) -> np.ndarray:
    """bool [T, I]: scores >= threshold, and NaN."""
    return ~(scores < np.float32(threshold))


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """bool [T, I]: the k highest scores of each token; NaN is higher than all, ties go to the lower index."""
    width = scores.shape[1]
    if k == 0 or scores.shape[0] == 0:
        return np.zeros(scores.shape, bool)
    last = np.partition(scores, width - k, axis=1)[:, width - k, None]  # which puts NaN last
    unordered, all_nan = np.isnan(scores), np.isnan(last)
    above = (scores > last) | (unordered & ~all_nan)
    tied = (scores == last) | (unordered & all_nan)
    room = k - above.sum(axis=1, keepdims=True)
    return above | (tied & (np.cumsum(tied, axis=1) <= room))


def needed(hidden: np.ndarray, norms: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """bool [T, I]: the neurons whose output matters: |h| * ||down column|| is neither 0 nor below `threshold`.

    `threshold` is the layer's CETT threshold (Sparsing Law: inactive iff n_i < t), so that a neuron that fires with
    next to no effect is not counted as needed; 0 counts all that change the output.
    """
    values = np.abs(hidden) * norms
    return ~((values < np.float32(threshold)) | (values == 0))


def value_recall(predicted: np.ndarray, values: np.ndarray) -> float:
    """Share of the sum of values [T, I] that the predicted neurons hold; 1 when there is no value to keep."""
    total = float(values.sum(dtype=np.float64))
    return float(values.sum(where=predicted, dtype=np.float64)) / total if total else 1.0


@dataclass(frozen=True)
class Confusion:
    """Counts over tokens and neurons. They add up, over blocks of tokens and over layers."""

    hits: int = 0  # predicted and active
    active: int = 0
    predicted: int = 0
    pairs: int = 0  # tokens times neurons

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(
            self.hits + other.hits,
            self.active + other.active,
            self.predicted + other.predicted,
            self.pairs + other.pairs,
        )

    @property
    def recall(self) -> float:
        """mean # hits / mean # active over tokens (Deja Vu); 1 when nothing is active."""
        return self.hits / self.active if self.active else 1.0

    @property
    def precision(self) -> float:
        """1 when nothing is predicted."""
        return self.hits / self.predicted if self.predicted else 1.0

    @property
    def density(self) -> float:
        """Share of the neurons predicted."""
        return self.predicted / self.pairs if self.pairs else 0.0

    @property
    def true_density(self) -> float:
        """Share of the neurons active."""
        return self.active / self.pairs if self.pairs else 0.0


def confusion(predicted: np.ndarray, active: np.ndarray) -> Confusion:
    """Counts of two bool arrays of one shape."""
    hits = int(np.count_nonzero(predicted & active))
    return Confusion(hits, int(np.count_nonzero(active)), int(np.count_nonzero(predicted)), predicted.size)


def _k(rule: str, k: int | None, width: int) -> int:
    if k is None or not 0 <= k <= width:
        raise UsageError(f"selection {rule}: found k {k}, expected 0 to {width}")
    return k
