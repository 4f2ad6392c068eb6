"""What a frontier is measured on: each layer's inputs and values on calibration text, and masked runs on other text.

Holds the calibration sample of every layer in memory, so this is for models of a few hundred million parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converter.model import LayerWeights, Model
from converter.predictors.low_rank import Moments
from converter.text import read_ids
from converter.walk import Block, OnLayer, Visit, losses, walk, windows_of
from flashsparse.sparsity.activations import active
from flashsparse.sparsity.selection import Confusion, confusion

TOKENS = 512  # whose logits are held at once

Select = Callable[[int, np.ndarray], np.ndarray]  # (layer, FFN inputs [t, d]) -> bool [t, I]


@dataclass
class LayerData:
    """One layer on the calibration text: T tokens. `before` [T, d] enters the layer, `x` [T, d] enters its FFN."""

    weights: LayerWeights
    norms: np.ndarray
    moments: Moments
    before: np.ndarray
    x: np.ndarray
    gate: np.ndarray
    hidden: np.ndarray
    active: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """|h| * ||down column||, [T, I]."""
        return np.abs(self.hidden) * self.norms

    @property
    def density(self) -> float:
        """Share of the neurons that are truly active."""
        return float(self.active.mean())


@dataclass(frozen=True)
class Outcome:
    """A masked run against the dense one: the perplexity's change in percent, its standard error in points.

    kl: KL(dense || masked), nats, mean over tokens; it also speaks for a model whose perplexity means nothing.
    """

    change: float
    error: float
    kl: float
    counts: Confusion
    per_layer: tuple[Confusion, ...]
    value_recall: float


def text_windows(model: Model, path: Path, tokens: int, window: int) -> list[np.ndarray]:
    """The first `tokens` tokens of a text, in windows."""
    return windows_of(read_ids(model.tokenizer(), [path], tokens)[0], window)


def collect(model: Model, windows: Sequence[np.ndarray], sample: int) -> list[LayerData]:
    """Every layer on the calibration text; gates and values of `sample` tokens evenly spread, moments of all."""
    gathered = _Gathered(model, sum(map(len, windows)), sample)
    walk(model, windows, gathered.visit, on_layer=gathered.begin, on_done=gathered.end).close()
    return gathered.layers


class _Gathered:
    def __init__(self, model: Model, tokens: int, sample: int) -> None:
        self.model, self.layers = model, list[LayerData]()
        self._stride = max(1, tokens // sample)
        self._parts: list[list[np.ndarray]] = []

    def begin(self, index: int, weights: LayerWeights) -> None:
        empty = np.empty((0, 0), np.float32)
        moments = Moments(self.model.hidden_size)
        self.layers.append(LayerData(weights, weights.down_norms, moments, empty, empty, empty, empty, empty))
        self._parts = [[] for _ in range(4)]

    def visit(self, block: Block) -> None:
        layer = self.layers[-1]
        layer.moments.add(block.x)
        for kept, values in zip(self._parts, (block.before, block.x, block.gate, block.hidden), strict=True):
            kept.append(values[:: self._stride].copy())

    def end(self, index: int) -> None:
        layer = self.layers[index]
        layer.before, layer.x, layer.gate, layer.hidden = (np.concatenate(part) for part in self._parts)
        layer.active = active(self.model.activation.name, self.model.activation.param, layer.gate)


class Judge:
    """Runs the model on held-out text, dense once and then masked as often as asked."""

    def __init__(self, model: Model, windows: Sequence[np.ndarray]) -> None:
        self.model, self.windows = model, windows
        self.dense, self._states = self._run(None)

    def run(self, select: Select) -> Outcome:
        """Every layer masked at once, by sets named from that layer's own (already masked) input."""
        counts = [Confusion() for _ in range(self.model.layers)]
        kept, total = 0.0, 0.0
        norms: list[np.ndarray] = []
        name, param = self.model.activation.name, self.model.activation.param

        def begin(index: int, weights: LayerWeights) -> None:
            norms.append(weights.down_norms)

        def visit(block: Block) -> np.ndarray:
            nonlocal kept, total
            chosen = select(block.layer, block.x)
            counts[block.layer] += confusion(chosen, active(name, param, block.gate))
            values = np.abs(block.hidden) * norms[block.layer]
            kept += float(values.sum(where=chosen, dtype=np.float64))
            total += float(values.sum(dtype=np.float64))
            return chosen

        found, states = self._run(visit, begin)
        difference = found - self.dense
        ratio = float(np.exp(difference.mean()))
        error = float(difference.std() / np.sqrt(len(difference)))
        every = sum(counts, Confusion())
        share = kept / total if total else 1.0
        return Outcome(100 * (ratio - 1), 100 * error, self._kl(states), every, tuple(counts), share)

    def _run(self, visit: Visit | None, begin: OnLayer | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Nats of every predicted token, and the last states [n, d]."""
        states = walk(self.model, self.windows, visit, on_layer=begin)
        try:
            return losses(self.model, states, self.windows), np.concatenate(list(states))
        finally:
            states.close()

    def _kl(self, states: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(states), TOKENS):
            part = slice(start, start + TOKENS)
            dense, masked = (log_softmax(self.model.logits(each[part])) for each in (self._states, states))
            total += float((np.exp(dense) * (dense - masked)).sum(dtype=np.float64))
        return total / len(states)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n, V]"""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
