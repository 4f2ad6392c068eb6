"""Predictors that are low-bit copies of a layer's own weights: of the gate, or of gate and up with the value score.

No training. The copies' grid and its fit are in `flashsparse.sparsity.low_bit`; the gate of a layer without one (OPT)
is its first linear layer, bias included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from converter.model import LayerWeights
from converter.predictors.compensated import quantize_compensated
from converter.predictors.low_rank import Moments, input_covariance
from converter.predictors.products import matmul
from flashsparse.sparsity.low_bit import LowBit, check_layout, quantize_rows
from flashsparse.sparsity.selection import scores_from_gate, scores_from_gate_up

Inputs = Moments | np.ndarray | None
_MEAN_KEPT = 0.01  # of the mean's power where a bias takes up its error: other text has a slightly different mean
_RANGE = 16.0  # rows are weighed by at most this, and at least its inverse
_DIGITS = 2.0**-10  # a scale that rounding changes by more, because 16 bits hold it no better, is left as it is


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


def weighed(copy: Copies, weights: LayerWeights, name: str, param: float | None) -> Copies:
    """A gate copy whose scores are in proportion to what a neuron is worth rather than to its gate, at no cost.

    A neuron's value is act(g) |u| ||down||, and |u| is about in proportion to the norm of its up row: rows are
    multiplied with the product of both norms (relu2: its root), through their scales and biases. Signs stay, so this is
    for scores of which only the order and the sign count; other activations' copies come back as they are.
    """
    if name not in ("relu", "relu2", "drelu", "fatrelu") or (name == "fatrelu" and param):
        return copy
    norms = weights.down_norms.astype(np.float64)
    if weights.gate is not None:
        norms = norms * np.linalg.norm(weights.up, axis=1)
    worth = _relative(np.sqrt(norms) if name == "relu2" else norms)
    gate = copy.gate
    worth = np.where(_holds(gate.scales, worth) & _holds(gate.biases, worth), worth, np.float32(1))
    scales, biases = (_times(part, worth) for part in (gate.scales, gate.biases))
    bias = None if copy.bias is None else copy.bias * worth
    return replace(copy, gate=replace(gate, scales=scales, biases=biases), bias=bias)


def _times(part: np.ndarray, worth: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (part.astype(np.float32) * worth[:, None]).astype(part.dtype)


def _holds(part: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """bool [I]: whether a row's product keeps its digits in the part's own type."""
    exact = part.astype(np.float64) * worth[:, None]
    found: np.ndarray = np.isclose(_times(part, worth), exact, rtol=_DIGITS, atol=0).all(axis=1)
    return found


def _relative(worth: np.ndarray) -> np.ndarray:
    """float32, over their mean, within what scales in 16 bits hold without losing digits."""
    mean = worth.mean()
    if not (np.isfinite(mean) and mean > 0):
        return np.ones(len(worth), np.float32)
    return np.clip(worth / mean, 1 / _RANGE, _RANGE).astype(np.float32)


def fit_gate_copy(
    gate: np.ndarray, bias: np.ndarray | None, bits: int, group: int, inputs: Inputs = None, compensate: bool = True
) -> Copies:
    """The low-bit copy of gate [I, d].

    `inputs` are the FFN inputs' moments from calibration text, with which rounding errors are made to cancel (see
    `compensated`; a gate's bias then takes up what is left on average), or only their E[x_j^2] [d], which weighs the
    errors; None: all weights count alike. Without `compensate` moments only weigh. Raises UsageError for a layout that
    does not fit d.
    """
    return Copies(*_fit(gate, bias, bits, group, inputs, compensate))


def fit_gate_up_copy(
    gate: np.ndarray,
    bias: np.ndarray | None,
    up: np.ndarray | None,
    up_bias: np.ndarray | None,
    norms: np.ndarray,
    bits: int,
    group: int,
    inputs: Inputs = None,
    compensate: bool = True,
) -> Copies:
    """Copies of gate and up [I, d], each fitted as `fit_gate_copy` does, with norms [I] of the down columns.

    A model without a gate has no up. Raises UsageError for a layout that does not fit d.
    """
    gate_copy, gate_bias = _fit(gate, bias, bits, group, inputs, compensate)
    if up is None:
        return Copies(gate_copy, gate_bias, _vector(norms))
    return Copies(gate_copy, gate_bias, _vector(norms), *_fit(up, up_bias, bits, group, inputs, compensate))


def _fit(
    weight: np.ndarray, bias: np.ndarray | None, bits: int, group: int, inputs: Inputs, compensate: bool
) -> tuple[LowBit, np.ndarray | None]:
    if not isinstance(inputs, Moments):
        return quantize_rows(weight, bits, group, inputs), _vector(bias)
    if not compensate:
        return quantize_rows(weight, bits, group, inputs.importance()), _vector(bias)
    check_layout(weight.shape[1], bits, group)  # before the costly part
    moment = input_covariance(inputs, False, 0.0)
    if bias is None:
        return quantize_compensated(weight, bits, group, moment), None
    mean = (inputs.x / inputs.tokens).astype(np.float32)
    moment -= (1 - _MEAN_KEPT) * np.outer(mean, mean)
    copy = quantize_compensated(weight, bits, group, moment)
    return copy, _vector(bias + weight @ mean - _dense_times(copy, mean))


def _dense_times(copy: LowBit, x: np.ndarray) -> np.ndarray:
    """The copy times one unrounded vector [d], in blocks of rows."""
    return np.concatenate([copy.dequantize(row, row + 1024) @ x for row in range(0, len(copy.words), 1024)])


def _vector(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.array(values, np.float32)


def _linear(copy: LowBit, bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    product = copy.product(x, matmul)
    if bias is not None:
        product += bias
    return product


def _parts(name: str, copy: LowBit) -> dict[str, np.ndarray]:
    return {f"{name}.weight": copy.words, f"{name}.scales": copy.scales, f"{name}.biases": copy.biases}
