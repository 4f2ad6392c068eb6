"""The predictors that a frontier compares: for each its bytes and, per layer, what scores inputs.

Every fit is the converter's; scores are rounded as the engine's are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.predictors.data import LayerData
from converter.model import Model
from converter.predictors.copies import fit_gate_copy, fit_gate_up_copy, weighed
from converter.predictors.low_rank import LowRank, truncated_svd, whitened_svd
from converter.predictors.train import Settings, labels, train
from flashsparse.sparsity.activations import activate, has_zeros
from flashsparse.sparsity.low_bit import fitting_group
from flashsparse.sparsity.selection import scores_from_gate

Scorer = Callable[[np.ndarray], np.ndarray]  # FFN inputs [t, d] -> scores [t, I]


@dataclass(frozen=True)
class Fitted:
    """One predictor for all layers. `share`: its bytes relative to the FFN's in 16 bits; `trained`: by gradients."""

    name: str
    share: float
    layers: Sequence[Scorer]
    trained: bool = False


def fits(model: Model, data: Sequence[LayerData], ranks: Sequence[int], epochs: int) -> Iterator[Fitted]:
    """All predictors, one at a time: the oracle, low-bit copies, low-rank ones with and without training."""
    kit = _Kit(model, data)
    yield kit.oracle()
    for bits in (1, 2, 3, 4):
        yield kit.copy(f"gate copy, {bits} bit, plain", bits, plain=True)
        yield kit.copy(f"gate copy, {bits} bit", bits)
    for bits in (1, 2):
        yield kit.copy(f"gate and up copies, {bits} bit", bits, up=True)
    for rank in ranks:
        yield kit.low_rank(f"SVD, rank {rank}", [_plain(layer, rank) for layer in data])
        yield kit.low_rank(f"weighted SVD, rank {rank}", [_weighted(layer, rank) for layer in data])
    for rank in ranks if epochs else ():
        yield kit.trained(f"Deja Vu, rank {rank}", rank, "active", epochs, start=False)
        yield kit.trained(f"value labels, rank {rank}, from weighted SVD", rank, "value", epochs, start=True)


def default_copy(model: Model, data: Sequence[LayerData], bits: int = 2) -> Fitted:
    """The default of `convert --tier predict`."""
    return _Kit(model, data).copy(f"gate copy, {bits} bit", bits)


def _plain(layer: LayerData, rank: int) -> LowRank:
    return truncated_svd(layer.weights.scoring, rank, layer.weights.scoring_bias)


def _weighted(layer: LayerData, rank: int) -> LowRank:
    return whitened_svd(layer.weights.scoring, rank, layer.moments, layer.weights.scoring_bias)


class _Kit:
    def __init__(self, model: Model, data: Sequence[LayerData]) -> None:
        self.model, self.data = model, data
        self.name, self.param = model.activation.name, model.activation.param
        self.group = fitting_group(model.hidden_size)
        matrices = 3 if model.gated else 2
        self.ffn_bytes = 2 * matrices * model.hidden_size * model.intermediate_size * model.layers

    def oracle(self) -> Fitted:
        def scorer(layer: LayerData) -> Scorer:
            weights, bias = layer.weights.scoring, layer.weights.scoring_bias
            return lambda x: scores_from_gate(self.name, self.param, x @ weights.T + (0 if bias is None else bias))

        return Fitted("oracle: the gate itself", 0.0, [scorer(layer) for layer in self.data])

    def copy(self, name: str, bits: int, up: bool = False, plain: bool = False) -> Fitted:
        made = []
        for layer in self.data:
            w = layer.weights
            known = None if plain else layer.moments
            if up:
                made.append(
                    fit_gate_up_copy(
                        w.scoring,
                        w.scoring_bias,
                        w.up if w.gate is not None else None,
                        w.up_bias if w.gate is not None else None,
                        layer.norms,
                        bits,
                        self.group,
                        inputs=known,
                    )
                )
            else:
                copy = fit_gate_copy(w.scoring, w.scoring_bias, bits, self.group, inputs=known)
                made.append(copy if plain else weighed(copy, w, self.name, self.param))
        size = sum(sum(t.nbytes for t in copies.tensors().values()) for copies in made)
        layers = [lambda x, c=copies: c.scores(self.name, self.param, x) for copies in made]
        return Fitted(name, size / self.ffn_bytes, layers)

    def low_rank(self, name: str, made: Sequence[LowRank]) -> Fitted:
        return self._factored(name, [one.stored() for one in made], trained=False)

    def trained(self, name: str, rank: int, kind: str, epochs: int, start: bool) -> Fitted:
        settings = Settings(epochs=epochs)
        made = []
        for layer in self.data:
            a = activate(self.name, self.param, layer.gate)
            kind_here = kind if has_zeros(self.name) else "value"
            wanted = labels(kind_here, a, layer.hidden, layer.norms)
            begin = _weighted(layer, rank) if start else None
            bias = None if layer.weights.scoring_bias is None or start else np.zeros(len(layer.norms), np.float32)
            made.append(train(layer.x, wanted, rank, start=begin, bias=bias, settings=settings).predictor.stored())
        return self._factored(name, made, trained=True)

    def _factored(self, name: str, made: Sequence[LowRank], trained: bool) -> Fitted:
        size = sum(sum(t.nbytes for t in one.tensors().values()) for one in made)
        return Fitted(name, size / self.ffn_bytes, [one.logits for one in made], trained)
