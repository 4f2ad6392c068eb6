"""Two thin matrices in place of a gate: truncated SVD, the same in the metric of the inputs, and regression.

logits = fc2 act(fc1 x) + bias, act being nothing or ReLU. All fits here are closed forms in float64; `train` has the
one by gradients. Regression (reduced rank) is for inputs other than the gate's own: another layer's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from converter.predictors.products import matmul
from flashsparse.errors import ConvertError, UsageError

_EXACT = 1024  # matrices up to this size are decomposed whole
_ITERATIONS = 6
DAMPING = 1e-4  # of the mean input power, added to every direction: directions never seen still count a little


@dataclass(frozen=True)
class LowRank:
    """fc1 [r, d], fc2 [I, r], bias [I] or None, as float32; `relu` between the two."""

    fc1: np.ndarray
    fc2: np.ndarray
    bias: np.ndarray | None = None
    relu: bool = False

    @property
    def rank(self) -> int:
        return int(self.fc1.shape[0])

    def logits(self, x: np.ndarray) -> np.ndarray:
        """float32 [T, I] of inputs [T, d]."""
        z = matmul(x, self.fc1.T)
        if self.relu:
            np.maximum(z, 0, out=z)
        out = matmul(z, self.fc2.T)
        if self.bias is not None:
            out += self.bias
        return out

    def tensors(self) -> dict[str, np.ndarray]:
        """The layer's tensors in a pack's predictor file, names without the layer. ConvertError beyond float16."""
        named = {"fc1.weight": _half("fc1", self.fc1), "fc2.weight": _half("fc2", self.fc2)}
        if self.bias is not None:
            named["fc2.bias"] = self.bias.astype(np.float32)
        return named

    def stored(self) -> LowRank:
        """Itself as the engine will see it, rounded to float16: what thresholds must be calibrated on."""
        named = {name: values.astype(np.float32) for name, values in self.tensors().items()}
        return replace(self, fc1=named["fc1.weight"], fc2=named["fc2.weight"])


class Moments:
    """Sums over tokens, added block by block: of x [d] and x x' [d, d], and of targets g [I] and x g' [d, I] if any."""

    def __init__(self, inputs: int, outputs: int = 0) -> None:
        self.tokens = 0
        self.x, self.xx = np.zeros(inputs), np.zeros((inputs, inputs))
        self.g, self.xg = np.zeros(outputs), np.zeros((inputs, outputs))

    def add(self, x: np.ndarray, g: np.ndarray | None = None) -> None:
        """Some tokens' inputs [T, d] and targets [T, I] (which Moments with outputs need every time)."""
        self.tokens += x.shape[0]
        self.x += x.sum(axis=0, dtype=np.float64)
        self.xx += matmul(x.T, x)
        if g is not None:
            self.g += g.sum(axis=0, dtype=np.float64)
            self.xg += matmul(x.T, g)

    def importance(self) -> np.ndarray:
        """E[x_j^2], float64 [d]."""
        return np.diagonal(self.xx) / max(self.tokens, 1)


def truncated_svd(weight: np.ndarray, rank: int, bias: np.ndarray | None = None) -> LowRank:
    """The best approximation of weight [I, d] of that rank in the Frobenius norm; a gate's bias is kept whole."""
    return _truncate(np.asarray(weight, np.float64), None, rank, bias)


def whitened_svd(weight: np.ndarray, rank: int, moments: Moments, bias: np.ndarray | None = None) -> LowRank:
    """The approximation of that rank with the least mean squared error of the gate over the inputs of `moments`.

    With a bias in the gate the fit is of the centred inputs, and the predictor's bias takes up the mean's error.
    """
    wide = np.asarray(weight, np.float64)
    centred = bias is not None
    fit = _truncate(wide, input_covariance(moments, centred), rank, bias)
    if bias is None:
        return fit
    mean = moments.x / moments.tokens
    return replace(fit, bias=(bias + wide @ mean - fit.fc2 @ (fit.fc1 @ mean)).astype(np.float32))


def reduced_rank_regression(moments: Moments, rank: int) -> LowRank:
    """The rank-limited linear map with a bias from x to g of least mean squared error (damped), in closed form."""
    covariance = input_covariance(moments, centred=True)
    mean_x, mean_g = moments.x / moments.tokens, moments.g / moments.tokens
    cross = moments.xg / moments.tokens - np.outer(mean_x, mean_g)
    fit = _truncate(np.linalg.solve(covariance, cross).T, covariance, rank, mean_g)
    return replace(fit, bias=(mean_g - fit.fc2 @ (fit.fc1 @ mean_x)).astype(np.float32))


def rectified(fit: LowRank) -> LowRank:
    """The same logits with ReLU between and twice the rank: z = relu(z) - relu(-z). A start for training."""
    fc1, fc2 = np.concatenate([fit.fc1, -fit.fc1]), np.concatenate([fit.fc2, -fit.fc2], axis=1)
    return replace(fit, fc1=fc1, fc2=fc2, relu=True)


def balanced(fc1: np.ndarray, fc2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matrices as float32, each component's two norms made equal, so that both stay well inside float16.

    The logits stay what they are, with ReLU between too, as the factors are positive.
    """
    first, second = np.linalg.norm(fc1, axis=1), np.linalg.norm(fc2, axis=0)
    counts = (first > 0) & (second > 1e-12 * second.max())
    factor = np.sqrt(np.divide(first, second, out=np.ones_like(first), where=counts))
    return (fc1 / factor[:, None]).astype(np.float32), (fc2 * factor).astype(np.float32)


def check_rank(rank: int, inputs: int, outputs: int) -> None:
    """Raises UsageError for a rank outside 1..min(d, I)."""
    if not 1 <= rank <= min(inputs, outputs):
        raise UsageError(f"rank {rank}: expected 1 to {min(inputs, outputs)}")


def input_covariance(moments: Moments, centred: bool, damping: float = DAMPING) -> np.ndarray:
    """E[x x'], less the mean's part when centred, damped so that it is positive definite."""
    if moments.tokens == 0:
        raise UsageError("no tokens to fit a predictor on: found 0, expected some")
    covariance = moments.xx / moments.tokens
    if centred:
        mean = moments.x / moments.tokens
        covariance -= np.outer(mean, mean)
    power = float(np.trace(covariance)) / len(covariance)
    covariance[np.diag_indices_from(covariance)] += damping * power if power > 0 else 1.0
    return covariance


def _truncate(weight: np.ndarray, covariance: np.ndarray | None, rank: int, bias: np.ndarray | None) -> LowRank:
    """Keeps the leading right singular vectors V of weight @ L (L L' = covariance): W L V V' L^-1."""
    check_rank(rank, weight.shape[1], weight.shape[0])
    gram = weight.T @ weight
    root = None if covariance is None else np.linalg.cholesky(covariance)
    if root is not None:
        gram = root.T @ gram @ root
    vectors = _leading(gram, rank)
    fc2 = weight @ (vectors if root is None else root @ vectors)
    fc1 = (vectors if root is None else np.linalg.solve(root.T, vectors)).T
    kept = None if bias is None else np.asarray(bias, np.float32)
    return LowRank(*balanced(fc1, fc2), kept)


def _leading(gram: np.ndarray, rank: int) -> np.ndarray:
    """The leading eigenvectors [d, rank] of a symmetric matrix [d, d].

    Exact for small ones and large ranks; else by subspace iteration (a few products, where a full decomposition takes
    minutes at d = 4096), whose error in the approximated matrix is then within about a percent of the best.
    """
    size = len(gram)
    if size <= _EXACT or rank > size // 3:
        return np.asarray(np.linalg.eigh(gram)[1][:, ::-1][:, :rank])
    basis = np.random.default_rng(0).standard_normal((size, rank + max(16, rank // 4)))
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(gram @ basis)[0]
    vectors = np.linalg.eigh(basis.T @ (gram @ basis))[1]
    return np.asarray(basis @ vectors[:, ::-1][:, :rank])


def _half(name: str, values: np.ndarray) -> np.ndarray:
    largest = float(np.abs(values).max())
    if not largest <= 65504:  # NaN fails too
        raise ConvertError(f"predictor's {name}: found a weight of {largest}, expected at most float16's 65504")
    return values.astype(np.float16)
