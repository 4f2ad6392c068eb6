"""Whole quantized experts by slot: MLX's own `gather_qmm` over views of the slab. No kernel of ours, and no copy.

A slot holds one expert as matrices: gate and up [inner, d], down [inner, d] (transposed), each as words, scales and
biases back to back, quantized along d as MLX does. A slab's experts are then strided matrices: `matrix` is a view, and
gather_qmm copies only matrices whose own rows are not contiguous. Every slot's expert must begin at the same byte: in
packs whose stride is a whole number of sectors it does. Records of single neurons (`sparse_ffn`) lay an expert out by
neuron, which gather_qmm would copy; they are for experts that are read neuron by neuron.
No engine has a tier of experts yet: this is what it would call.

Two things would copy the whole slab's scales or words on each call, and are avoided: an x of another type than the
scales (it is converted here instead), and `sorted_indices`.

By operation counts: three products a token and expert, 3 d inner multiply-adds, and `expert_bytes` read; for one token
MLX's quantized matrix-vector kernels, which read each expert once, 8 rows a threadgroup of 64. A gather of the bytes
before a product would read them, write them and read them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.records import FLOATS
from metal_kernels.sparse_ffn import activate

# Of the sum of the products' magnitudes, by the type that x and scales have; MLX's CPU adds in that type.
TOLERANCE = {"F32": 1e-6, "F16": 2e-3, "BF16": 2e-2}
LARGEST = 2**31 - 1  # elements of an MLX array that is seen as flat


@dataclass(frozen=True)
class Expert:
    """Byte offsets of an expert's matrices in a slot. d, inner: their sizes, multiples of `group`; bits 4 or 8.

    `source`: F32, F16 or BF16, of scales and biases.
    """

    d: int
    inner: int
    bits: int
    group: int
    source: str
    gate: int
    up: int
    down: int
    activation: str = "silu"
    param: float | None = None

    @property
    def parts(self) -> tuple[int, int]:
        """Bytes of a matrix's words, and of its scales."""
        return self.inner * self.d * self.bits // 8, self.inner * (self.d // self.group) * FLOATS[self.source].size

    @property
    def matrix_bytes(self) -> int:
        words, scales = self.parts
        return words + 2 * scales


def expert_bytes(expert: Expert, products: int) -> int:
    """Bytes of experts that `products` pairs of token and expert read."""
    return products * 3 * expert.matrix_bytes


def matrix(expert: Expert, slab: mx.array, at: int) -> tuple[mx.array, mx.array, mx.array]:
    """Views of every slot's matrix at byte `at`: words [slots, inner, d * bits / 32], scales and biases.

    slab uint8 [slots, stride]. ValueError where a view of it cannot be had.
    """
    (slots, stride), source = slab.shape, FLOATS[expert.source]
    words, scales = expert.parts
    places = (at, mx.uint32), (at + words, source), (at + words + scales, source)
    if any(start % kind.size or stride % kind.size for start, kind in places) or at + expert.matrix_bytes > stride:
        raise ValueError(f"a matrix at byte {at} of slots of {stride} bytes: expected room, and multiples of 4")
    if slots * stride // source.size > LARGEST:
        raise ValueError(f"a slab of {slots * stride} bytes: expected {LARGEST * source.size} at most, MLX's limit")
    cols = expert.d * expert.bits // 32, expert.d // expert.group, expert.d // expert.group

    def view(start: int, kind: mx.Dtype, width: int) -> mx.array:
        strides = (stride // kind.size, width, 1)
        return mx.as_strided(slab.view(kind), (slots, expert.inner, width), strides, start // kind.size)

    found = [view(start, kind, width) for (start, kind), width in zip(places, cols, strict=True)]
    return found[0], found[1], found[2]


def experts(expert: Expert, slab: mx.array, slots: mx.array, shares: mx.array, x: mx.array) -> mx.array:
    """float32 [T, d]: the sum over each token's experts of share * down(act(gate x) * up x).

    slots uint32 [T, k]: where each token's experts are; shares [T, k]: the router's; x [T, d] of any float type.
    """
    rows = x.astype(FLOATS[expert.source])[:, None, None]
    gate, up = (_gathered(expert, slab, at, rows, slots, True) for at in (expert.gate, expert.up))
    hidden = (activate(gate, expert.activation, expert.param) * up).astype(rows.dtype)
    made = _gathered(expert, slab, expert.down, hidden, slots, False)
    return (made[:, :, 0].astype(mx.float32) * shares[..., None]).sum(axis=1)


def _gathered(expert: Expert, slab: mx.array, at: int, x: mx.array, slots: mx.array, transpose: bool) -> mx.array:
    words, scales, biases = matrix(expert, slab, at)
    return mx.gather_qmm(
        x, words, scales, biases, rhs_indices=slots, transpose=transpose, group_size=expert.group, bits=expert.bits
    )


def experts_reference(expert: Expert, slab: mx.array, slots: mx.array, shares: mx.array, x: mx.array) -> mx.array:
    """What `experts` computes, one expert after the other from its dequantized matrices in float32."""
    rows = []
    for token in range(x.shape[0]):
        total, value = mx.zeros((expert.d,)), x[token].astype(mx.float32)
        for k in range(slots.shape[1]):
            slot = slab[slots[token, k]]
            gate, up, down = (_dequantized(expert, slot, at) for at in (expert.gate, expert.up, expert.down))
            hidden = activate(gate @ value, expert.activation, expert.param) * (up @ value)
            total = total + shares[token, k] * (hidden @ down)
        rows.append(total)
    return mx.stack(rows)


def _dequantized(expert: Expert, slot: mx.array, at: int) -> mx.array:
    """float32 [inner, d] of the matrix at byte `at` of one slot [stride]."""
    words, scales = expert.parts
    source = FLOATS[expert.source]
    packed = mx.contiguous(slot[at : at + words]).view(mx.uint32).reshape(expert.inner, -1)
    rest = mx.contiguous(slot[at + words : at + words + 2 * scales]).view(source).astype(mx.float32)
    scale, bias = rest.reshape(2, expert.inner, -1)
    return mx.dequantize(packed, scale, bias, group_size=expert.group, bits=expert.bits)
