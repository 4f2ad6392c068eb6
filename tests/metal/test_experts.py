"""Experts by slot: values against float64, and that a product over a slab copies none of it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels.experts import TOLERANCE, Expert, expert_bytes, experts, experts_reference, matrix
from metal_kernels.records import FLOATS

SLOTS = 7


def make(
    bits: int, group: int, source: str, d: int, inner: int, activation: str = "silu"
) -> tuple[Expert, mx.array, np.ndarray]:
    """An expert's layout, a slab with gaps, and the exact matrices, float64 [slots, 3, inner, d]."""
    rng = np.random.default_rng(bits + d)
    expert = Expert(d, inner, bits, group, source, 0, 0, 0, activation, 0.1 if activation == "fatrelu" else None)
    places = [64 + i * (expert.matrix_bytes + 12) // 4 * 4 for i in (2, 0, 1)]
    expert = replace(expert, gate=places[0], up=places[1], down=places[2])
    stride = 64 + max(places) + expert.matrix_bytes
    slab = rng.integers(0, 256, (SLOTS, -(-stride // 64) * 64), np.uint8)
    exact = np.empty((SLOTS, 3, inner, d))
    for slot in range(SLOTS):
        for field, at in enumerate(places):
            values = mx.array(rng.standard_normal((inner, d)).astype(np.float32) / np.sqrt(d)).astype(FLOATS[source])
            parts = mx.quantize(values, group_size=group, bits=bits)
            raw = b"".join(np.array(part.view(mx.uint8)).tobytes() for part in parts)
            slab[slot, at : at + len(raw)] = np.frombuffer(raw, np.uint8)
            wide = (parts[0], *(part.astype(mx.float32) for part in parts[1:]))
            exact[slot, field] = np.array(mx.dequantize(*wide, group_size=group, bits=bits))
    return expert, mx.array(slab), exact


def expected(
    expert: Expert, exact: np.ndarray, slots: np.ndarray, shares: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [T, d], and the sums of the terms' magnitudes."""
    value, size = np.zeros(x.shape), np.zeros(x.shape)
    for t, k in np.ndindex(*slots.shape):
        gate, up, down = exact[slots[t, k]]
        score, most = gate @ x[t], np.abs(gate) @ np.abs(x[t])
        open_ = {"silu": score / (1 + np.exp(-score)), "relu": np.maximum(score, 0)}.get(expert.activation)
        open_ = np.where(score < 0.1, 0, score) if open_ is None else open_
        value[t] += shares[t, k] * ((open_ * (up @ x[t])) @ down)
        size[t] += abs(shares[t, k]) * ((most * (np.abs(up) @ np.abs(x[t]))) @ np.abs(down))
    return value, size


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("d", "inner", "tokens", "activation"), [(64, 96, 1, "silu"), (192, 64, 3, "relu"), (128, 33, 2, "fatrelu")]
)
def test_experts_in_any_slots(bits: int, source: str, d: int, inner: int, tokens: int, activation: str) -> None:
    expert, slab, exact = make(bits, 32, source, d, inner, activation)
    rng = np.random.default_rng(1)
    slots = np.stack([rng.permutation(SLOTS)[:3] for _ in range(tokens)]).astype(np.uint32)
    shares = rng.random((tokens, 3)).astype(np.float32)
    x = np.array(
        mx.array(rng.standard_normal((tokens, d)).astype(np.float32)).astype(FLOATS[source]).astype(mx.float32)
    )
    given = mx.array(slots), mx.array(shares), mx.array(x)
    value, size = expected(expert, exact, slots, shares, x.astype(np.float64))
    near = np.array(experts_reference(expert, slab, *given))
    assert (np.abs(near - value) <= 1e-6 * size).all()
    assert (np.abs(np.array(experts(expert, slab, *given)) - value) <= TOLERANCE[source] * size).all()


def test_a_product_copies_nothing_of_the_slab() -> None:
    expert = Expert(256, 512, 4, 64, "F32", gate=0, up=0, down=0)
    expert = replace(expert, up=expert.matrix_bytes, down=2 * expert.matrix_bytes)
    slab = mx.zeros((200, -(-3 * expert.matrix_bytes // 64) * 64), mx.uint8)
    given = mx.array([[3, 150]], mx.uint32), mx.ones((1, 2)), mx.ones((1, 256))
    mx.eval(slab, given)

    def peak(run: object) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(run())  # type: ignore[operator]
        return mx.get_peak_memory() - before

    words = matrix(expert, slab, 0)[0]
    assert peak(lambda: mx.contiguous(words)) >= words.nbytes  # what a copy would show
    assert peak(lambda: experts(expert, slab, *given)) < 1 << 18 < words.nbytes // 8


def test_bytes_are_those_of_the_chosen_experts() -> None:
    expert = make(4, 32, "F16", 64, 96)[0]
    assert expert_bytes(expert, 6) == 6 * 3 * 96 * (64 // 2 + 2 * 2 * 2)


def test_layouts_that_cannot_be_viewed_are_refused() -> None:
    expert, slab, _ = make(4, 32, "F16", 64, 96)
    with pytest.raises(ValueError, match="at byte 2"):
        matrix(expert, slab, 2)
    with pytest.raises(ValueError, match="expected room"):
        matrix(expert, slab, slab.shape[1] - 8)
