"""Values of neurons by copies of gate and up, on the GPU, against the predictor of the engine and MLX's operators."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flashsparse import native
from flashsparse.sparsity.low_bit import LowBit, quantize_rows
from metal_kernels import select
from metal_kernels.value import TOLERANCE, Copy, value, value_reference
from tests.metal.layers import ACTIVATIONS, PARAM
from tests.metal.test_select import kept_of, native_scores, same

pytestmark = pytest.mark.usefixtures("metal")


def metal_copy(copy: LowBit, bias: np.ndarray | None) -> Copy:
    words, scales, biases = (mx.array(part) for part in (copy.words, copy.scales, copy.biases))
    return Copy(words, scales, biases, copy.bits, None if bias is None else mx.array(bias))


def engine_values(
    gate: LowBit, up: LowBit | None, biases: list, norms: np.ndarray, x: np.ndarray, name: str
) -> np.ndarray:
    """What flashsparse.sparsity.predictors.GateUpCopy computes with the native kernels."""
    out = native_scores(gate, x, biases[0])
    native.activate(out, native.ACTIVATIONS[name], PARAM)
    out = np.abs(out)
    if up is not None:
        lifted = native_scores(up, x, biases[1])
        out *= np.abs(np.maximum(lifted, 0) if name == "drelu" else lifted)
    return out * norms


def check(bits: int, group: int, rows: int, d: int, tokens: int, name: str, gated: bool, biased: bool, bad: float = 0):
    rng = np.random.default_rng(bits * group + rows)
    copies = [quantize_rows(rng.standard_normal((rows, d)).astype(np.float32), bits, group, search=False) for _ in "gu"]
    biases = [rng.standard_normal(rows).astype(np.float32) if biased else None for _ in "gu"]
    norms, x = rng.random(rows).astype(np.float32), rng.standard_normal((tokens, d)).astype(np.float32)
    if bad != 0:
        x[0, 3] = bad
    up = copies[1] if gated else None
    with np.errstate(invalid="ignore"):
        expected = engine_values(copies[0], up, biases, norms, x, name)
    finite = expected[np.isfinite(expected)]
    threshold = float(np.median(finite)) if len(finite) else 0.0
    gate = metal_copy(copies[0], biases[0])
    lifted = metal_copy(copies[1], biases[1]) if gated else None
    rounded = select.round_tokens(mx.array(x), group)
    scores, kept = value(rounded, gate, lifted, mx.array(norms), threshold, name, PARAM)
    found = np.array(scores)
    if name == "silu":
        assert np.array_equal(np.isnan(found), np.isnan(expected))
        assert (np.abs(found - expected)[~np.isnan(expected)] <= TOLERANCE * finite.max(initial=1)).all()
    else:
        assert same(found, expected)
    assert np.array_equal(kept_of(kept, rows), ~(found < np.float32(threshold)))
    if bits > 1 and bad == 0:
        mlx = np.array(value_reference(mx.array(x), gate, lifted, mx.array(norms), name, PARAM))
        assert np.abs(found - mlx).max() <= 1e-5 * max(1e-30, np.abs(mlx).max()) or name == "fatrelu"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [32, 64])
def test_values_have_the_native_kernels_bits(bits: int, group: int) -> None:
    check(bits, group, 45, 640, 3, "drelu", gated=True, biased=bits == 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(bits: int, name: str, gated: bool) -> None:
    check(bits, 64, 33, 192, 2, name, gated, biased=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_keeps_every_neuron(bad: float) -> None:
    check(3, 64, 40, 128, 2, "relu", gated=True, biased=False, bad=bad)


def test_copies_must_agree() -> None:
    rounded = select.round_tokens(mx.zeros((1, 64)), 64)
    two = Copy(mx.zeros((4, 4), mx.uint32), mx.zeros((4, 1)), mx.zeros((4, 1)), 2)
    three = Copy(mx.zeros((4, 6), mx.uint32), mx.zeros((4, 1)), mx.zeros((4, 1)), 3)
    with pytest.raises(ValueError, match="up copy of 3 bits"):
        value(rounded, two, three, mx.zeros((4,)), 0.0, "relu")
    with pytest.raises(ValueError, match="expected 1 to 4"):
        value(rounded, Copy(*two.parts, 5), None, mx.zeros((4,)), 0.0, "relu")
