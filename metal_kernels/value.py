"""The score |act(gate)| |up| norm of each neuron by low-bit copies of gate and up, on the GPU, and its reference.

What the score means is the predictor's (`--predictor gate-up-copy`); tokens are rounded by `select.round_tokens`.

Equal bits to the native kernels' and numpy's for every activation but silu, whose exponential differs:
|metal - reference| <= TOLERANCE times the value there.

By design (not measured on a Mac): as `select.score`, with both copies read in one pass: `value_bytes`. Integer
multiply-adds limit it, one a weight. 128 bytes of threadgroup memory, 256 threads, I / 32 threadgroups.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.launch import kernel
from metal_kernels.records import ACTIVATIONS
from metal_kernels.select import _float, _ints, score_bytes, score_reference, words_of
from metal_kernels.sparse_ffn import activate

TOLERANCE = 2e-6


@dataclass(frozen=True)
class Copy:
    """A low-bit copy of a matrix [I, d]: weight uint32 [I, d * bits / 32], scales and biases [I, d / group].

    `bias` float32 [I] is the layer's own, added to the product.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    bias: mx.array | None = None

    @property
    def parts(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.weight, self.scales, self.biases


def value(
    rounded: tuple[mx.array, mx.array, mx.array],
    gate: Copy,
    up: Copy | None,
    norms: mx.array,
    threshold: float,
    activation: str,
    param: float = 0.0,
) -> tuple[mx.array, mx.array]:
    """Values float32 [T, I], and the bits [T, words] of those not below the threshold (NaN is not below).

    `rounded`: of `select.round_tokens`, with the copies' group. norms float32 [I]: of the down columns. ValueError for
    copies of unequal shape or of other than 1 to 4 bits.
    """
    tokens, d = rounded[0].shape
    neurons, words = gate.weight.shape[0], words_of(gate.weight.shape[0])
    if not 1 <= gate.bits <= 4:
        raise ValueError(f"copies of {gate.bits} bits: expected 1 to 4")
    if up is not None and (up.bits != gate.bits or up.scales.shape != gate.scales.shape):
        raise ValueError(f"an up copy of {up.bits} bits, scales {up.scales.shape}: expected those of the gate's")
    extra = {"bias": gate.bias}
    if up is not None:
        extra |= {"up": up.weight, "up_scales": up.scales, "up_biases": up.biases, "up_bias": up.bias}
    given = {name: array for name, array in extra.items() if array is not None}
    flags = (f"HAS_BIAS={int('bias' in given)}", f"HAS_UP={int('up' in given)}")
    built = kernel(
        "value",
        ("q", "steps", "totals", "weight", "scales", "biases", "norms", "limits", "threshold", "param", *given),
        ("scores", "bits"),
        ("rows", "low_bits"),
        (*flags, f"HAS_UP_BIAS={int('up_bias' in given)}"),
    )
    limits = (_ints(neurons, words), _float(threshold), _float(param))
    scores, kept = built(
        inputs=[*rounded, *gate.parts, norms, *limits, *given.values()],
        output_shapes=[(tokens, neurons), (tokens, words)],
        output_dtypes=[mx.float32, mx.uint32],
        grid=(words * 256, tokens, 1),
        threadgroup=(256, 1, 1),
        template=[
            ("GROUP", d // gate.scales.shape[1]),
            ("BITS", gate.bits),
            ("ACTIVATION", ACTIVATIONS[activation]),
        ],
    )
    return scores, kept


def value_bytes(neurons: int, d: int, bits: int, group: int, tokens: int, gated: bool = True) -> int:
    """Bytes that `value` reads of copies with 16-bit scales, and of the norms."""
    return (1 + gated) * score_bytes(neurons, d, bits, group, tokens) + 4 * tokens * neurons


def value_reference(
    x: mx.array, gate: Copy, up: Copy | None, norms: mx.array, activation: str, param: float = 0.0
) -> mx.array:
    """float32 [T, I]: what `value` computes, by MLX's quantized products (2, 3 and 4 bits)."""
    opened = _product(x, gate)
    found = mx.abs(activate(opened, activation, param))
    if up is not None:
        lifted = _product(x, up)
        found = found * mx.abs(mx.maximum(lifted, 0) if activation == "drelu" else lifted)
    return found * norms


def _product(x: mx.array, copy: Copy) -> mx.array:
    made = score_reference(x, *copy.parts, copy.bits)
    return made if copy.bias is None else made + copy.bias
