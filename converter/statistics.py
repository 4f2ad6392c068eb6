"""What calibration measures in one layer, token block by token block: streaming sums, never a layer's activations.

Definitions: Deja Vu (arXiv 2310.17157) for head norms and the similarity of hidden states, LLM in a flash (2312.11514)
for windows and co-activation, Sparsing Law (2411.02335) for the outputs of neurons. Which tokens are walked, and where
the results are kept, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from converter.model import LayerWeights
from converter.walk import Block
from flashsparse.pack.manifest import Activation
from flashsparse.sparsity.activations import activate, active, has_zeros

LOOKBACKS = (1, 2, 4, 5, 8, 16)  # tokens
HOTTEST = 256  # neurons of which co-activation is counted
SAMPLED_TOKENS = 2048  # tokens on which it is counted

Activity = Callable[[np.ndarray], np.ndarray]  # pre-activations g [t, I] -> bool [t, I]


def activity_rule(activation: Activation, threshold: float | None = None) -> Activity | None:
    """Which neurons count as active: act(g) != 0, or |act(g)| > threshold. None: not defined (silu, no threshold)."""
    name, param = activation.name, activation.param
    if threshold is not None:
        return lambda g: np.abs(activate(name, param, g)) > threshold
    return (lambda g: active(name, param, g)) if has_zeros(name) else None


class Moments:
    """Mean and standard deviation (of the population) of each column over rows that come in blocks.

    Blocks are merged with Chan's formula, so that a small spread around a large mean keeps its digits.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean, self._squares = np.zeros(size), np.zeros(size)

    def update(self, values: np.ndarray) -> None:
        """values [t, size]."""
        count = len(values)
        mean = values.mean(axis=0, dtype=np.float64)
        deviations = values - mean.astype(values.dtype)
        squares = np.einsum("ti,ti->i", deviations, deviations)
        shift = mean - self.mean
        total = self.count + count
        self._squares += squares + shift * shift * (self.count * count / max(total, 1))
        self.mean += shift * (count / max(total, 1))
        self.count = total

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self._squares / max(self.count, 1))


class Persistence:
    """How active sets follow each other within a window.

    For lookback k, over the tokens that have k before them in their window: `persistence` is the share of their active
    neurons (all tokens' together) that were active in one of those k; the token itself does not count. `union` is the
    mean share of the layer's neurons that were active in one of k consecutive tokens. `jaccard` is the mean over pairs
    of neighbouring tokens of |both| / |either|; pairs of two empty sets are left out.
    """

    def __init__(self, neurons: int) -> None:
        self.neurons = neurons
        self.lookbacks = np.array(LOOKBACKS)
        self._most = max(LOOKBACKS)
        self._age = np.empty(0, np.uint8)  # tokens since a neuron was last active; most + 1: longer, or never
        self._position, self._before = 0, 0
        self._hits, self._active = np.zeros(len(LOOKBACKS), np.int64), np.zeros(len(LOOKBACKS), np.int64)
        self._union, self._unions = np.zeros(len(LOOKBACKS), np.int64), np.zeros(len(LOOKBACKS), np.int64)
        self._jaccard, self._pairs = 0.0, 0

    def update(self, active_now: np.ndarray, start: int) -> None:
        """bool [t, I] of the tokens from `start` on; 0 begins a window."""
        if start == 0:
            self._age = np.full(self.neurons, self._most + 1, np.uint8)
            self._position, self._before = 0, 0
        for row in active_now:
            self._token(row)

    def _token(self, row: np.ndarray) -> None:
        size = int(row.sum())
        within = np.cumsum(np.bincount(self._age[row], minlength=self._most + 2))[self.lookbacks]
        judged = self._position >= self.lookbacks
        self._hits += np.where(judged, within, 0)
        self._active += np.where(judged, size, 0)
        either = size + self._before - int(within[0])
        if self._position and either:
            self._jaccard += int(within[0]) / either
            self._pairs += 1
        np.minimum(self._age + 1, self._most + 1, out=self._age)
        self._age[row] = 1
        full = self._position + 1 >= self.lookbacks
        self._union += np.where(full, np.cumsum(np.bincount(self._age, minlength=self._most + 2))[self.lookbacks], 0)
        self._unions += full
        self._position, self._before = self._position + 1, size

    def result(self) -> dict[str, np.ndarray]:
        """`persistence` and `union` by lookback, `jaccard` [1]; NaN where no token could be judged."""
        with np.errstate(invalid="ignore"):
            return {
                "persistence": self._hits / self._active,
                "union": self._union / (self._unions * self.neurons),
                "jaccard": np.array([self._jaccard]) / self._pairs,
            }


class Coactivation:
    """How often the hottest neurons are active together: at most HOTTEST of them, on at most SAMPLED_TOKENS tokens.

    The tokens are spread evenly over all; their sets are kept as bits (at most 2.8 MB at 11,008 neurons), since which
    neurons are the hottest is known only at the end.
    """

    def __init__(self, neurons: int, tokens: int) -> None:
        self.neurons = neurons
        self.step = max(1, -(-tokens // SAMPLED_TOKENS))
        self._seen = 0
        self._bits: list[np.ndarray] = []

    def update(self, active_now: np.ndarray) -> None:
        """bool [t, I]."""
        first = -self._seen % self.step
        self._bits.append(np.packbits(active_now[first :: self.step], axis=1))
        self._seen += len(active_now)

    def result(self, frequency: np.ndarray) -> dict[str, np.ndarray]:
        """`coactivation_ids` int32 [n], hottest first (ties: lower id), and `coactivation` [n, n] counts of tokens.

        The diagonal counts the sampled tokens on which the neuron itself is active.
        """
        ids = np.argsort(-frequency, kind="stable")[:HOTTEST]
        sets = np.unpackbits(np.concatenate(self._bits), axis=1, count=self.neurons)[:, ids].astype(np.float32)
        counts = (sets.T @ sets).astype(np.int32)
        return {"coactivation_ids": ids.astype(np.int32), "coactivation": counts}


class Similarity:
    """Mean cosine of two vectors per token; tokens with a zero vector are left out."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, a: np.ndarray, b: np.ndarray) -> None:
        """a and b [t, d]."""
        lengths = np.sqrt(np.einsum("td,td->t", a, a) * np.einsum("td,td->t", b, b), dtype=np.float64)
        some = lengths > 0
        self._sum += float((np.einsum("td,td->t", a, b)[some] / lengths[some]).sum())
        self._count += int(some.sum())

    @property
    def mean(self) -> float:
        return self._sum / self._count if self._count else float("nan")


class LayerStatistics:
    """Everything that is measured in one layer. A collector (`converter.calibrate`): begin, visit, output, end.

    The tensors of `end`, over all tokens unless said otherwise:
    `frequency` [I] share of tokens on which a neuron is active; `persistence`, `union` [6] by LOOKBACKS and `jaccard`
    [1], `coactivation`, `coactivation_ids`: see the classes; all of these only where active is defined.
    `value_mean`, `value_std` [I] of v_i = |h_i| * ||down column i||_2; `ffn_norm` [2] mean and standard deviation of
    the norm of the FFN's output; `head_norm_mean`, `head_norm_std` [H] of each head's attention output before the
    output projection; `similarity` [2] mean cosine of the residual entering the layer with the one leaving it, and with
    the one that the FFN reads (before its norm); `x_mean`, `x_square` [d] mean of x and of x^2, the FFN's input; with
    `covariance` also `x_second_moment` [d, d], mean of x x^T.
    """

    name = "statistics"

    def __init__(self, activity: Activity | None, tokens: int, covariance: bool = False) -> None:
        self.activity, self.tokens, self.covariance = activity, tokens, covariance

    def options(self) -> dict[str, Any]:
        """What a resumed calibration must agree on."""
        return {"covariance": self.covariance}

    def begin(self, layer: int, weights: LayerWeights) -> None:
        """Starts a layer."""
        neurons, d = weights.up.shape
        self._norms = weights.down_norms
        self._fired = np.zeros(neurons, np.int64)
        self._persistence, self._coactivation = Persistence(neurons), Coactivation(neurons, self.tokens)
        self._values, self._ffn, self._x = Moments(neurons), Moments(1), Moments(d)
        self._heads: Moments | None = None
        self._through, self._attention = Similarity(), Similarity()
        self._second = np.zeros((d, d), np.float32) if self.covariance else None

    def visit(self, block: Block) -> None:
        """Takes in a block."""
        if self.activity is not None:
            now = self.activity(block.gate)
            self._fired += np.count_nonzero(now, axis=0)
            self._persistence.update(now, block.start)
            self._coactivation.update(now)
        self._values.update(np.abs(block.hidden) * self._norms)
        self._heads = self._heads or Moments(block.head_norms.shape[1])
        self._heads.update(block.head_norms)
        self._attention.update(block.before, block.middle)
        self._x.update(block.x)
        if self._second is not None:
            self._second += block.x.T @ block.x

    def output(self, block: Block, ffn: np.ndarray, after: np.ndarray) -> None:
        """Takes in what the layer made of a block: the FFN's output and the residual that leaves, [t, d]."""
        self._ffn.update(np.linalg.norm(ffn, axis=1, keepdims=True))
        self._through.update(block.before, after)

    def end(self, layer: int) -> dict[str, np.ndarray]:
        """The layer's tensors by name; float32 unless they are counts."""
        assert self._heads is not None
        x = self._x
        found = self._activity() | {
            "value_mean": self._values.mean,
            "value_std": self._values.std,
            "ffn_norm": np.concatenate([self._ffn.mean, self._ffn.std]),
            "head_norm_mean": self._heads.mean,
            "head_norm_std": self._heads.std,
            "similarity": np.array([self._through.mean, self._attention.mean]),
            "x_mean": x.mean,
            "x_square": x.mean**2 + x.std**2,
        }
        if self._second is not None:
            found["x_second_moment"] = self._second / np.float32(max(x.count, 1))
        return {name: values if values.dtype == np.int32 else values.astype("<f4") for name, values in found.items()}

    def _activity(self) -> dict[str, np.ndarray]:
        if self.activity is None:
            return {}
        frequency = self._fired / max(self._values.count, 1)
        return {"frequency": frequency, **self._persistence.result(), **self._coactivation.result(frequency)}
