"""Training of a low-rank predictor as Deja Vu published it, by hand-written gradients in numpy.

Two bias-free linear layers, weighted binary cross-entropy, AdamW, early stopping on recall. Added to the published
recipe, all off by default: ReLU between (PowerInfer, ProSparse), a bias (a gate with one cannot do without), a start
from a closed form. The published test split took X[-i] for X[i], which has the first training row among the test rows;
it is not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from converter.predictors.low_rank import LowRank, check_rank
from converter.predictors.products import matmul
from flashsparse.errors import NumericError, UsageError
from flashsparse.sparsity.selection import Confusion, above_threshold, confusion

LABELS = ("active", "value", "clip")
VALUE_SHARE = 0.4  # of the true density: what the value labels' top share is by default
CLIP_SHARE = 0.15  # of all neurons (ProSparse's "clip15")
_SAMPLE = 1 << 24  # elements a label threshold is taken from

Parameters = dict[str, np.ndarray]  # fc1 [r, d], fc2 [I, r], bias [I] if any


@dataclass(frozen=True)
class Settings:
    """Deja Vu's, for MLP predictors. `floor` is added to mean(y) in the negatives' weight."""

    rate: float = 1e-3
    decay: float = 0.01
    batch: int = 1024
    epochs: int = 20
    patience: int = 5
    enough: float = 0.99
    held_out: float = 0.05
    floor: float = 0.005
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """The predictor on the held-out tokens after one epoch, at the training's own threshold, logit 0."""

    loss: float
    counts: Confusion


@dataclass(frozen=True)
class Trained:
    """The predictor of the epoch with the best held-out recall (`best`, from 0), and all epochs run."""

    predictor: LowRank
    best: int
    epochs: tuple[Epoch, ...] = field(repr=False)

    @property
    def counts(self) -> Confusion:
        return self.epochs[self.best].counts


def labels(
    kind: str, activation: np.ndarray, hidden: np.ndarray, norms: np.ndarray, share: float | None = None
) -> np.ndarray:
    """bool [T, I]: what the predictor shall say, from a = act(g) and h [T, I] and the down columns' norms [I].

    active: a != 0. value: the `share` of the layer's (token, neuron) pairs with the largest |h| * norm, by default 0.4
    times the share of active pairs. clip: the `share` with the largest |a|, by default 0.15. Zeros are never positive.
    Raises UsageError for another kind, a share outside (0, 1], and "active" where everything is.
    """
    if kind == "active":
        found = activation != 0
        if found.all():
            raise UsageError(
                'labels "active": found every neuron active, expected an activation with zeros; try "value"'
            )
        return found
    if kind not in LABELS:
        raise UsageError(f"labels {kind!r}: expected one of {', '.join(LABELS)}")
    if kind == "clip":
        return _top_share(np.abs(activation), CLIP_SHARE if share is None else share)
    density = np.count_nonzero(activation) / max(activation.size, 1)
    if not density:  # a dead layer
        return np.zeros(activation.shape, bool)
    return _top_share(np.abs(hidden) * norms, VALUE_SHARE * density if share is None else share)


def train(
    x: np.ndarray,
    wanted: np.ndarray,
    rank: int,
    relu: bool = False,
    start: LowRank | None = None,
    bias: np.ndarray | None = None,
    settings: Settings | None = None,
    progress: Callable[[int, Epoch], None] | None = None,
) -> Trained:
    """Trains a predictor of `wanted` bool [T, I] from inputs x [T, d]; same seed, same result on one machine.

    `start` replaces the random start (of the same rank; with `relu` see `rectified`). `bias` [I] adds a bias that is
    trained from there; a start's own bias does too. Raises UsageError for a rank or start that does not fit or fewer
    than two tokens, NumericError when the training diverges.
    """
    settings = settings or Settings()
    if len(x) != len(wanted) or len(x) < 2:
        raise UsageError(f"training on {len(x)} inputs and {len(wanted)} label rows: expected two or more of each")
    rng = np.random.default_rng(settings.seed)
    parameters = _start(start, x.shape[1], wanted.shape[1], rank, relu, rng)
    if bias is not None:
        parameters["bias"] = np.array(bias, np.float32)
    train_rows, test_rows = split(len(x), settings.held_out, rng)
    optimizer = AdamW(parameters, settings.rate, settings.decay)
    history: list[Epoch] = []
    best, kept = 0, parameters
    for number in range(settings.epochs):
        _one_epoch(optimizer, x, wanted, rng.permutation(train_rows), relu, settings)
        history.append(_evaluate(parameters, x, wanted, test_rows, relu, settings))
        if progress is not None:
            progress(number, history[-1])
        if number == 0 or history[-1].counts.recall > history[best].counts.recall:
            best, kept = number, {name: values.copy() for name, values in parameters.items()}
        if history[best].counts.recall > settings.enough or number - best >= settings.patience:
            break
    return Trained(LowRank(kept["fc1"], kept["fc2"], kept.get("bias"), relu), best, tuple(history))


def split(tokens: int, held_out: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Token indices to train on and to judge on, disjoint, both sorted and neither empty."""
    order = rng.permutation(tokens)
    judged = min(max(1, round(tokens * held_out)), tokens - 1)
    return np.sort(order[judged:]), np.sort(order[:judged])


def negative_weight(wanted: np.ndarray, floor: float) -> float:
    """The negatives' weight in a batch of labels; positives weigh 1."""
    return float(np.count_nonzero(wanted)) / wanted.size + floor


def loss(logits: np.ndarray, wanted: np.ndarray, floor: float) -> float:
    """The weighted binary cross-entropy, mean over tokens and neurons."""
    entropy = np.logaddexp(0, np.where(wanted, -logits, logits))
    entropy *= np.where(wanted, 1, negative_weight(wanted, floor))
    return float(entropy.mean(dtype=np.float64))


def gradients(parameters: Parameters, x: np.ndarray, wanted: np.ndarray, relu: bool, floor: float) -> Parameters:
    """d loss / d parameters for a batch x [B, d], wanted bool [B, I], in the parameters' type."""
    z = matmul(x, parameters["fc1"].T)
    if relu:
        np.maximum(z, 0, out=z)
    error = _error(_logits(parameters, z), wanted, floor)  # d loss / d logits
    found = {"fc2": matmul(error.T, z)}
    if "bias" in parameters:
        found["bias"] = error.sum(axis=0)
    back = matmul(error, parameters["fc2"])
    if relu:
        back *= z > 0
    found["fc1"] = matmul(back.T, x)
    return found


class AdamW:
    """Adam with decoupled weight decay (on matrices only), updating `parameters` in place; torch's update rule."""

    def __init__(self, parameters: Parameters, rate: float, decay: float) -> None:
        self.parameters, self.rate, self.decay = parameters, rate, decay
        self.first = {name: np.zeros_like(values) for name, values in parameters.items()}
        self.second = {name: np.zeros_like(values) for name, values in parameters.items()}
        self.steps = 0

    def step(self, found: Parameters, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> None:
        """One update by the gradients `found`, which are used up."""
        self.steps += 1
        first_bias, second_bias = (1 - beta**self.steps for beta in betas)
        for name, gradient in found.items():
            values, first, second = self.parameters[name], self.first[name], self.second[name]
            if values.ndim == 2:
                values *= 1 - self.rate * self.decay
            first += (1 - betas[0]) * (gradient - first)
            np.square(gradient, out=gradient)
            gradient -= second
            gradient *= 1 - betas[1]
            second += gradient
            np.sqrt(second, out=gradient)
            gradient /= np.sqrt(second_bias)
            gradient += epsilon
            np.divide(first, gradient, out=gradient)
            gradient *= self.rate / first_bias
            values -= gradient


def _start(
    start: LowRank | None, inputs: int, outputs: int, rank: int, relu: bool, rng: np.random.Generator
) -> Parameters:
    """The start's parameters, or torch's default for linear layers: uniform within 1 / sqrt(inputs of the layer)."""
    check_rank(rank, inputs, outputs)
    if start is None:
        fc1 = rng.uniform(-1, 1, (rank, inputs)) / np.sqrt(inputs)
        fc2 = rng.uniform(-1, 1, (outputs, rank)) / np.sqrt(rank)
        return {"fc1": fc1.astype(np.float32), "fc2": fc2.astype(np.float32)}
    if start.fc1.shape != (rank, inputs) or start.fc2.shape != (outputs, rank) or start.relu != relu:
        found = f"fc1 {list(start.fc1.shape)}, fc2 {list(start.fc2.shape)}, relu {start.relu}"
        raise UsageError(f"start of a training of rank {rank} for {inputs} to {outputs}, relu {relu}: found {found}")
    named = {"fc1": start.fc1, "fc2": start.fc2} | ({} if start.bias is None else {"bias": start.bias})
    return {name: np.array(values, np.float32) for name, values in named.items()}


def _logits(parameters: Parameters, z: np.ndarray) -> np.ndarray:
    logits = matmul(z, parameters["fc2"].T)
    if "bias" in parameters:
        logits += parameters["bias"]
    return logits


def _error(logits: np.ndarray, wanted: np.ndarray, floor: float) -> np.ndarray:
    """(sigmoid - y) * weight / elements, in place of the logits."""
    np.negative(logits, out=logits)
    with np.errstate(over="ignore"):  # exp gives inf, the sigmoid then 0
        np.exp(logits, out=logits)
    logits += 1
    np.reciprocal(logits, out=logits)
    logits -= wanted
    weight = negative_weight(wanted, floor)
    scaled = wanted.astype(logits.dtype)
    scaled *= (1 - weight) / wanted.size
    scaled += weight / wanted.size
    logits *= scaled
    return logits


def _one_epoch(
    optimizer: AdamW, x: np.ndarray, wanted: np.ndarray, order: np.ndarray, relu: bool, settings: Settings
) -> None:
    for start in range(0, len(order), settings.batch):
        rows = order[start : start + settings.batch]
        batch = np.asarray(x[rows], np.float32)
        optimizer.step(gradients(optimizer.parameters, batch, wanted[rows], relu, settings.floor))


def _evaluate(
    parameters: Parameters, x: np.ndarray, wanted: np.ndarray, rows: np.ndarray, relu: bool, settings: Settings
) -> Epoch:
    """Raises NumericError for logits that are not finite."""
    predictor = LowRank(parameters["fc1"], parameters["fc2"], parameters.get("bias"), relu)
    total, counts = 0.0, Confusion()
    for start in range(0, len(rows), settings.batch):
        part = rows[start : start + settings.batch]
        logits, labels = predictor.logits(np.asarray(x[part], np.float32)), wanted[part]
        counts += confusion(above_threshold(logits, 0.0), labels)
        total += loss(logits, labels, settings.floor) * len(part)
    if not np.isfinite(total):
        raise NumericError(f"training a predictor: found a loss of {total}, expected a number; lower the learning rate")
    return Epoch(total / len(rows), counts)


def _top_share(values: np.ndarray, share: float) -> np.ndarray:
    if not 0 < share <= 1:
        raise UsageError(f"label share {share}: expected more than 0, at most 1")
    sample = values[:: max(1, values.size // _SAMPLE)].ravel()
    last = min(int(len(sample) * (1 - share)), len(sample) - 1)
    limit = np.partition(sample, last)[last]
    return (values >= limit) & (values > 0)
