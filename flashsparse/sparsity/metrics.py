"""Sparsity metrics: which neurons a threshold skips, what skipping costs, and how published methods choose thresholds.

Owns the formulas for one layer's arrays, in numpy. Collecting those arrays from a model and searching for thresholds
that reach a perplexity are the converter's. Words: g gate pre-activation, a = act(g), u up, h = a * u (not gated: a),
c_i = ||down column i||.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

QUANTITIES = ("gate", "value", "hidden")  # what a threshold is compared with: |a|, |h| * c, |h|
METRICS = {"topk": "gate", "fat": "gate", "pplp": "value", "cats": "gate", "teal": "hidden"}  # metric -> quantity
ZERO = 1e-18  # added to FAT's threshold, so that threshold 0 skips exact zeros
EVERYTHING = float(np.finfo(np.float32).max)  # the threshold that skips every neuron
DEAD = 0.001  # a neuron active in less than this share of the tokens is dead
CANDIDATES = 65536
TOP = 0.99  # quantile at which the candidates end
SUBSAMPLE = 1 << 20
BLOCK = 256  # tokens whose tails are multiplied at once
HISTOGRAM_BINS = 10_000
TAIL = 0.01  # share of the values on each side that TEAL's histogram puts into one outlier bin

Array = npt.NDArray[np.float32]


def magnitude(quantity: str, activated: Array, hidden: Array, norms: Array) -> Array:
    """What `quantity`'s thresholds are compared with. activated, hidden [T, I], norms c [I] -> [T, I], not negative."""
    if quantity == "gate":
        return np.abs(activated)
    return np.abs(hidden) * norms if quantity == "value" else np.abs(hidden)


def active(magnitudes: Array, threshold: float) -> npt.NDArray[np.bool_]:
    """True where a neuron is computed: not below the threshold, and not exactly zero. NaN counts as active."""
    return ~(magnitudes < np.float32(threshold)) & (magnitudes != 0)


def fat_threshold(epsilon: float) -> float:
    """FAT-eps: skipped iff |a| < eps + 1e-18, so eps = 0 skips exact zeros (Sparsing Law, FATReLU)."""
    return epsilon + ZERO


def top_k_mask(activated: Array, fraction: float) -> npt.NDArray[np.bool_]:
    """Top-k as published (Sparsing Law): int(size * (1 - fraction)) smallest |a| of the whole array are skipped.

    All tokens of the array compete with each other. Among equal magnitudes the earlier are skipped first.
    """
    skipped = np.argsort(np.abs(activated), axis=None, kind="stable")[: int(activated.size * (1 - fraction))]
    mask = np.ones(activated.size, np.bool_)
    mask[skipped] = False
    return mask.reshape(activated.shape)


def top_k_threshold(ascending: Array, fraction: float) -> float:
    """The threshold that keeps what Top-k keeps on the magnitudes given, ascending; what ties with it is kept too."""
    return _ranked(ascending, int(ascending.size * (1 - fraction)))


def cats_threshold(ascending: Array, share: float) -> float:
    """CATS: the `share`-quantile of |act(gate)| (published for SiLU), from magnitudes in ascending order.

    The same rule as Top-k at fraction 1 - share when both take their threshold from the same tokens.
    """
    return _ranked(ascending, int(ascending.size * share))


def _ranked(ascending: Array, skipped: int) -> float:
    return float(ascending[skipped]) if skipped < ascending.size else EVERYTHING


def teal_threshold(hidden: Array, share: float) -> float:
    """TEAL's t = icdf(0.5 + share / 2) for the input of the down projection, h [T, I]: |h| < t is skipped.

    The distribution is a histogram of 10,000 bins with 1 % on each side in one outlier bin, linear inside a bin. The
    formula assumes symmetry around zero; values of one sign (ReLU without up projection) are mirrored first. An outlier
    bin says nothing of the values in it, so a share that ends there is an exact quantile (published: linear too, which
    skips nearly all of them). TEAL also skips input channels of q, k, v, gate and up: those are no neurons, so they are
    not offered here.
    """
    values = np.asarray(hidden, np.float32).reshape(-1)
    if values.min(initial=0) >= 0 or values.max(initial=0) <= 0:
        values = np.concatenate([values, -values])
    below = 0.5 + share / 2
    found = float(np.quantile(values, below)) if below > 1 - TAIL else inverse_cdf(*histogram(values), below)
    return max(0.0, found)


def histogram(values: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """(counts, edges): 10,000 equal bins between the 1 % and the 99 % quantile, and an outlier bin on each side."""
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    # Values equal to `high` belong below it: it is 0 in a layer with next to no active neurons, and all its zeros are.
    high = np.nextafter(np.float32(high), np.float32(np.inf))
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    edges = np.concatenate([[min(low, values.min())], edges, [max(high, values.max())]])
    counts, _ = np.histogram(values, edges)
    return counts, edges


def inverse_cdf(counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64], share: float) -> float:
    """The value below which `share` of a histogram lies, linear inside a bin."""
    total = np.concatenate([[0], np.cumsum(counts)]) / max(1, counts.sum())
    bin_ = min(int(np.searchsorted(total, share, side="left")), len(counts))
    if bin_ == 0:
        return float(edges[0])
    inside = (share - total[bin_ - 1]) / (total[bin_] - total[bin_ - 1])
    return float(edges[bin_ - 1] + inside * (edges[bin_] - edges[bin_ - 1]))


def dead_neurons(counts: npt.NDArray[np.integer], tokens: int) -> int:
    """How many neurons are active in less than 0.1 % of the tokens; counts [I] are tokens per neuron."""
    return int((counts < DEAD * tokens).sum())


@dataclass(eq=False)
class Searched:
    """What a search over a layer's thresholds learned, kept while its weights are not: see Cett."""

    whole: npt.NDArray[np.float64]  # ||down h|| of each token [T]
    candidates: Array  # ascending thresholds
    known: dict[int, float] = field(default_factory=dict)  # index of a candidate -> its CETT


class Cett:
    """CETT of one layer (Sparsing Law): the mean over tokens of ||sum_D h_i down_i|| / ||down h||, D = {n_i <= t}.

    hidden h [T, I], down [d, I], norms c [I]; n = |h| * c. Tokens whose output is zero have no ratio and are left out.
    `searched` is what an earlier search over the same layer left.
    """

    def __init__(self, hidden: Array, down: Array, norms: Array, searched: Searched | None = None) -> None:
        self.hidden, self.down, self.norms = hidden, down, norms
        self.searched = searched or Searched(self._lengths(math.inf), threshold_candidates(hidden, norms))

    def at(self, threshold: float) -> float:
        """CETT with the tail {n <= threshold}; 0 when every token's output is zero."""
        whole = self.searched.whole
        some = whole > 0
        return float((self._lengths(threshold)[some] / whole[some]).mean()) if some.any() else 0.0

    def largest_threshold(self, target: float) -> float:
        """The largest candidate whose CETT is at most `target`; 0 (nothing skipped) when there is none.

        Binary search over the candidates. CETT need not rise with the threshold, since truncated vectors can cancel:
        a bounded scan behind the point found looks for a larger one. At run time a neuron is skipped iff n < t.
        """
        candidates = self.searched.candidates
        found = self._last(-1, len(candidates), target)
        for step in (2, 4, 8, 16, 32, 64):
            further = found + step
            if further < len(candidates) and self._candidate(further) <= target:
                found = self._last(further, len(candidates), target)
        return float(candidates[found]) if found >= 0 else 0.0

    def _last(self, low: int, high: int, target: float) -> int:
        """The last index of low..high - 1 within the target, if the ones within it come first; `low` when none is."""
        while high - low > 1:
            middle = (low + high) // 2
            if self._candidate(middle) <= target:
                low = middle
            else:
                high = middle
        return low

    def _candidate(self, index: int) -> float:
        known = self.searched.known
        if index not in known:
            known[index] = self.at(float(self.searched.candidates[index]))
        return known[index]

    def _lengths(self, threshold: float) -> npt.NDArray[np.float64]:
        """||sum of the tail's contributions|| of each token [T]."""
        lengths = [np.empty(0)]
        for start in range(0, len(self.hidden), BLOCK):
            h = np.asarray(self.hidden[start : start + BLOCK])
            tail = np.where(np.abs(h) * self.norms <= np.float32(threshold), h, np.float32(0))
            lengths.append(np.linalg.norm(tail @ self.down.T, axis=1).astype(np.float64))
        return np.concatenate(lengths)


def threshold_candidates(hidden: Array, norms: Array, count: int = CANDIDATES) -> Array:
    """`count` values, equally spaced between the smallest n = |h| * c and the 0.99 quantile of a strided subsample.

    Exact zeros are left out of the quantile (published: kept), or a layer with less than 1 % of its neurons active
    would have no range to search.
    """
    size = hidden.size
    stride = max(1, size // SUBSAMPLE)
    while math.gcd(stride, hidden.shape[1]) > 1:  # a common factor would sample the same neurons in every token
        stride += 1
    picked = np.arange(0, size, stride)
    sample = np.abs(np.asarray(hidden).reshape(-1)[picked]) * norms[picked % hidden.shape[1]]
    low = min((float((np.abs(part) * norms).min()) for part in _blocks(hidden)), default=0.0)
    high = float(np.quantile(sample[sample > 0], TOP)) if (sample > 0).any() else low
    return np.linspace(low, max(low, high), count).astype(np.float32)


def _blocks(rows: Array) -> list[Array]:
    return [np.asarray(rows[start : start + BLOCK]) for start in range(0, len(rows), BLOCK)]
