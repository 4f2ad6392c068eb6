"""Predictors that are low-bit copies of a layer's own weights: of the gate, or of gate and up with the value score.

No training. The copies' grid and its fit are in `flashsparse.sparsity.low_bit`; the gate of a layer without one (OPT)
is its first linear layer, bias included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converter.predictors.products import matmul
from flashsparse.sparsity.low_bit import LowBit, quantize_rows
from flashsparse.sparsity.selection import scores_from_gate, scores_from_gate_up


@dataclass(frozen=True)
class Copies:
    """One layer's copies [I, d] and biases [I]. `norms` [I] (of the down columns) and `up` are for the value score."""

    gate: LowBit
    bias: np.ndarray | None = None
    norms: np.ndarray | None = None
    up: LowBit | None = None
    up_bias: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """The layer's tensors in a pack's predictor file, names without the layer."""
        named = _parts("gate", self.gate)
        if self.bias is not None:
            named["gate.bias"] = self.bias
        if self.up is not None:
            named |= _parts("up", self.up)
        if self.up_bias is not None:
            named["up.bias"] = self.up_bias
        if self.norms is not None:
            named["down_norm"] = self.norms
        return named

    def scores(self, name: str, param: float | None, x: np.ndarray) -> np.ndarray:
        """float32 [T, I] for FFN inputs x [T, d], rounded as at run time, and the model's activation."""
        gate = _linear(self.gate, self.bias, x)
        if self.norms is None:
            return scores_from_gate(name, param, gate)
        up = None if self.up is None else _linear(self.up, self.up_bias, x)
        return scores_from_gate_up(name, param, gate, up, self.norms)


def fit_gate_copy(
    gate: np.ndarray, bias: np.ndarray | None, bits: int, group: int, importance: np.ndarray | None = None
) -> Copies:
    """The low-bit copy of gate [I, d]; importance is E[x_j^2] [d] from calibration text.

    Raises UsageError for a layout that does not fit d.
    """
    return Copies(quantize_rows(gate, bits, group, importance), _vector(bias))


def fit_gate_up_copy(
    gate: np.ndarray,
    bias: np.ndarray | None,
    up: np.ndarray | None,
    up_bias: np.ndarray | None,
    norms: np.ndarray,
    bits: int,
    group: int,
    importance: np.ndarray | None = None,
) -> Copies:
    """Copies of gate and up [I, d] for the value score; norms [I] of the down columns. Without a gate there is no up.

    Raises UsageError for a layout that does not fit d.
    """
    up_copy = None if up is None else quantize_rows(up, bits, group, importance)
    gate_copy = quantize_rows(gate, bits, group, importance)
    return Copies(gate_copy, _vector(bias), _vector(norms), up_copy, _vector(up_bias))


def _vector(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.array(values, np.float32)


def _linear(copy: LowBit, bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    product = copy.product(x, matmul)
    if bias is not None:
        product += bias
    return product


def _parts(name: str, copy: LowBit) -> dict[str, np.ndarray]:
    return {f"{name}.weight": copy.words, f"{name}.scales": copy.scales, f"{name}.biases": copy.biases}
