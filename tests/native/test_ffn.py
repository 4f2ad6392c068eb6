"""The fused sparse FFN over records: values, skipped zeros, and bits that depend on nothing but the operands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from flashsparse import native
from flashsparse.kernels.reference import ReferenceKernels
from tests.native.operands import PLAIN, TYPES, Stored, close, exact, store, variants

NEURONS, SIZE = 45, 192


@pytest.fixture(params=variants(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def activation(name: str, g: np.ndarray) -> np.ndarray:
    """float64 activations; FATReLU's threshold is 0.5."""
    if name == "silu":
        return g / (1 + np.exp(-g))
    if name == "fatrelu":
        return np.where(g < 0.5, 0, g)
    return np.maximum(g, 0) ** (2 if name == "relu2" else 1)


@dataclass
class Layer:
    """A layer whose records lie, shuffled, in `slab`; `values` are the exact float64 vectors and biases."""

    record: native.Record
    slab: np.ndarray
    offsets: np.ndarray
    values: dict[str, np.ndarray]
    name: str

    def gates(self, x: np.ndarray) -> np.ndarray:
        row = "gate" if self.record.gated else "up"
        return activation(self.name, x.astype(np.float64) @ self.values[row].T + self.values[f"{row}_bias"])

    def hidden(self, x: np.ndarray, gates: np.ndarray) -> np.ndarray:
        if not self.record.gated:
            return gates
        up = x.astype(np.float64) @ self.values["up"].T + self.values["up_bias"]
        return gates * (np.maximum(up, 0) if self.name == "drelu" else up)


def make_layer(
    kind: str, name: str, *, gated: bool = True, scored: bool = True, biased: bool = True, size: int = SIZE
) -> Layer:
    rows = (["gate"] if gated and scored else []) + (["up"] if gated or scored else [])
    stored = {row: store(normal(NEURONS, size, seed=i), kind) for i, row in enumerate(("gate", "up", "down"))}
    float_type = kind.partition("-")[2] or kind
    biases = {row: store(normal(NEURONS, 1, seed=10 + i), float_type) for i, row in enumerate(("gate", "up"))}
    values = {row: part.values for row, part in stored.items()}
    at, fields, records = 0, {}, [b""] * NEURONS
    for row in [*rows, "down"]:
        parts = [(row, stored[row])] + ([(f"{row}_bias", biases[row])] if biased and row != "down" else [])
        for field, part in parts:
            fields[field] = at
            at += (len(part.bytes(0)) + 3) // 4 * 4
            records = [r + part.bytes(i).ljust(at - len(r), b"\0") for i, r in enumerate(records)]
    for row in ("gate", "up"):
        values[f"{row}_bias"] = biases[row].values[:, 0] if biased else np.zeros(NEURONS)
    stride = (at + 63) // 64 * 64
    places = np.random.default_rng(5).permutation(NEURONS + 3)[:NEURONS].astype(np.int64)
    slab = np.full((NEURONS + 3) * stride, 0xFF, np.uint8)  # what no record owns decodes to NaN
    for place, data in zip(places, records, strict=True):
        slab[place * stride : place * stride + at] = np.frombuffer(data, np.uint8)
    return Layer(make_record(stored["down"], fields, name, gated, size), slab, places * stride, values, name)


def make_record(down: Stored, fields: dict[str, int], name: str, gated: bool, size: int) -> native.Record:
    return native.Record(
        **fields,
        d=size,
        dtype=down.dtype,
        scale_dtype=down.scale_dtype,
        group_size=down.group_size,
        activation=native.ACTIVATIONS[name],
        param=0.5,
        gated=gated,
    )


def run(
    layer: Layer,
    x: np.ndarray,
    activated: np.ndarray | None,
    ids: np.ndarray | None = None,
    threads: int = 2,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden values [T, n] and outputs [T, d] of the records `ids`, all by default."""
    ids = np.arange(NEURONS, dtype=np.int32) if ids is None else ids
    cols = np.arange(len(ids), dtype=np.int32)
    hidden = np.full((len(x), len(ids)), np.nan, np.float32)
    y = np.zeros((len(x), layer.record.d), np.float32)
    with native.Workers(threads) as workers:
        native.ffn_hidden(workers, layer.record, layer.slab, layer.offsets[ids], ids, cols, x, activated, mask, hidden)
        native.ffn_down(workers, layer.record, layer.slab, layer.offsets[ids], cols, hidden, y)
    return hidden, y


def sparse_gates(tokens: int, density: float = 0.4) -> np.ndarray:
    gates = np.abs(normal(tokens, NEURONS, seed=7))
    gates[np.random.default_rng(8).random(gates.shape) > density] = 0
    return gates


def check(layer: Layer, x: np.ndarray, gates: np.ndarray, given: bool, hidden: np.ndarray, y: np.ndarray) -> None:
    """Against float64: the rounding of the up product times the gate, and that of the gate times its slope and up."""
    x, values = x.astype(np.float64), layer.values
    size = {row: np.abs(x) @ np.abs(values[row]).T + np.abs(values[f"{row}_bias"]) for row in ("gate", "up")}
    score = "gate" if layer.record.gated else "up"
    slope = 2 * np.abs(x @ values[score].T + values[f"{score}_bias"]) + 1.1  # bounds every activation's derivative
    up = np.abs(x @ values["up"].T + values["up_bias"]) if layer.record.gated else np.ones_like(gates)
    magnitude = np.abs(gates) * (size["up"] + up) + (0 if given else size[score] * slope * up)
    assert close(hidden, layer.hidden(x, gates), magnitude)
    wide = hidden.astype(np.float64)
    assert close(y, wide @ values["down"], np.abs(wide) @ np.abs(values["down"]))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["relu", "silu", "drelu"])
@pytest.mark.parametrize("tokens", [1, 19])
def test_given_gates(kind: str, name: str, tokens: int) -> None:
    layer, x, gates = make_layer(kind, name, scored=False), normal(tokens, SIZE, seed=9), sparse_gates(tokens)
    hidden, y = run(layer, x, gates)
    check(layer, x, gates.astype(np.float64), True, hidden, y)
    assert not hidden[gates == 0].any()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", list(native.ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_gates_from_the_record(kind: str, name: str, gated: bool, tokens: int) -> None:
    layer, x = make_layer(kind, name, gated=gated), normal(tokens, SIZE, seed=9) * np.float32(0.1)
    hidden, y = run(layer, x, None)
    check(layer, x, layer.gates(x), False, hidden, y)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("size", [1, 5, 24, 67])
@pytest.mark.parametrize("tokens", [1, 4])
def test_odd_sizes_without_biases(kind: str, size: int, tokens: int) -> None:
    layer, x = make_layer(kind, "relu", biased=False, size=size), normal(tokens, size, seed=9)
    hidden, y = run(layer, x, None)
    check(layer, x, layer.gates(x), False, hidden, y)


@pytest.mark.parametrize("tokens", [1, 3])
def test_down_only_records_pass_the_gate_through(tokens: int) -> None:
    layer, gates = make_layer("F16", "relu", gated=False, scored=False), sparse_gates(tokens)
    hidden, y = run(layer, normal(tokens, SIZE), gates)
    assert np.array_equal(hidden, gates)
    assert close(y, gates.astype(np.float64) @ layer.values["down"], np.abs(gates) @ np.abs(layer.values["down"]))


@pytest.mark.parametrize("kind", ["F16", "Q4-F16"])
@pytest.mark.parametrize("given", [True, False])
def test_a_token_has_the_same_bits_alone_and_among_others(kind: str, given: bool) -> None:
    layer, x = make_layer(kind, "relu", scored=not given), normal(23, SIZE, seed=9)
    gates = sparse_gates(23) if given else None
    hidden, y = run(layer, x, gates)
    for t in range(len(x)):
        alone = run(layer, x[t : t + 1], None if gates is None else gates[t : t + 1])
        assert np.array_equal(alone[0][0], hidden[t])
        assert np.array_equal(alone[1][0], y[t])


@pytest.mark.parametrize("kind", ["BF16", "Q8-F32"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_threads_do_not_change_bits(kind: str, tokens: int) -> None:
    layer, x = make_layer(kind, "relu", size=1024), normal(tokens, 1024, seed=9)
    results = [run(layer, x, None, threads=threads) for threads in (1, 2, 3, 4)]
    for hidden, y in results[1:]:
        assert np.array_equal(hidden, results[0][0])
        assert np.array_equal(y, results[0][1])


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("seed", range(5))
def test_rounds_and_arrival_order_do_not_change_bits(tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer, x, gates = make_layer("F16", "relu", scored=False), normal(tokens, SIZE, seed=9), sparse_gates(tokens)
    hidden, y = run(layer, x, gates)
    ids = np.arange(NEURONS, dtype=np.int32)
    cuts = np.sort(rng.integers(0, NEURONS, 4))
    again = np.zeros_like(y)
    with native.Workers(2) as workers:
        for part in np.split(ids, cuts):
            width = np.full((tokens, len(part)), np.nan, np.float32)
            arrival = rng.permutation(len(part)).astype(np.int32)
            for some in np.array_split(arrival, 3):
                at = layer.offsets[part[some]]
                native.ffn_hidden(workers, layer.record, layer.slab, at, part[some], some, x, gates, None, width)
            cols = np.arange(len(part), dtype=np.int32)
            native.ffn_down(workers, layer.record, layer.slab, layer.offsets[part], cols, width, again)
            assert np.array_equal(width, hidden[:, part])
    assert np.array_equal(again, y)


def random_mask(tokens: int, share: float = 0.5, seed: int = 11) -> np.ndarray:
    return (np.random.default_rng(seed).random((tokens, NEURONS)) < share).astype(np.uint8)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["relu", "silu", "drelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("tokens", [1, 21])
def test_a_mask_keeps_bits_and_gives_zeros(kind: str, name: str, gated: bool, given: bool, tokens: int) -> None:
    layer, x = make_layer(kind, name, gated=gated, scored=not given), normal(tokens, SIZE, seed=9)
    gates = sparse_gates(tokens) if given else None
    whole = run(layer, x, gates)[0]
    for mask in (random_mask(tokens), random_mask(tokens, 0.05), np.zeros_like(random_mask(tokens))):
        found, y = run(layer, x, gates, mask=mask)
        assert np.array_equal(found, np.where(mask, whole, 0))
        assert not np.signbit(found[mask == 0]).any()
        assert y.any() == found.any()
    assert np.array_equal(run(layer, x, gates, mask=np.ones_like(mask))[0], whole)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("tokens", [1, 19])
def test_masks_follow_neuron_numbers_not_columns(given: bool, tokens: int) -> None:
    layer, x = make_layer("F16", "relu", scored=not given), normal(tokens, SIZE, seed=9)
    gates, mask = sparse_gates(tokens) if given else None, random_mask(tokens)
    ids = np.array([40, 2, 3, 17, 44, 0, 9, 21, 30, 31, 1], np.int32)
    found = run(layer, x, gates, ids, mask=mask)[0]
    assert np.array_equal(found, run(layer, x, gates, mask=mask)[0][:, ids])


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_masked_is_never_computed(given: bool, tokens: int) -> None:
    layer, x = make_layer("F16", "relu", scored=not given), normal(tokens, SIZE, seed=9)
    gates, mask = sparse_gates(tokens) if given else None, random_mask(tokens)
    mask[:, 4] = 0
    expected = run(layer, x, gates, mask=mask)
    begin = layer.offsets[4]
    layer.slab[begin : begin + layer.record.bytes].view(np.uint16)[:] = 0x7E00  # NaN
    if gates is not None:
        gates[:, 4] = np.nan
    for found, want in zip(run(layer, x, gates, mask=mask), expected, strict=True):
        assert np.array_equal(found, want)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_reference_kernels_agree(gated: bool, given: bool, masked: bool) -> None:
    layer, x = make_layer("F32", "relu", gated=gated), normal(5, SIZE, seed=9)
    gates, mask = sparse_gates(5) if given else None, random_mask(5) if masked else None
    ids = np.arange(NEURONS, dtype=np.int32)
    names = ("gate", "gate_bias", "up", "up_bias", "down")
    sizes = {name: 4 if name.endswith("bias") else 4 * SIZE for name in names}
    places = {name: getattr(layer.record.c, name) for name in names}
    fields = {name: SimpleNamespace(offset=at, bytes=sizes[name]) for name, at in places.items() if at >= 0}
    manifest = SimpleNamespace(
        activation=SimpleNamespace(name="relu", param=None),
        record=SimpleNamespace(fields=fields),
        source_dtype="F32",
        quant=None,
        hidden_size=SIZE,
        gated=gated,
    )
    hidden = np.full((5, NEURONS), np.nan, np.float32)
    ReferenceKernels(manifest).hidden(layer.slab, layer.offsets, ids, ids, x, gates, mask, hidden)
    np.testing.assert_allclose(hidden, run(layer, x, gates, mask=mask)[0], rtol=1e-4, atol=1e-3)
    assert mask is None or not hidden[mask == 0].any()


@pytest.mark.parametrize("tokens", [1, 3])
def test_inactive_infinities_are_never_touched(tokens: int) -> None:
    """0 · Inf would be NaN: a neuron whose gate is exactly zero adds nothing, whatever its weights."""
    layer, x, gates = make_layer("F16", "relu", scored=False), normal(tokens, SIZE, seed=9), sparse_gates(tokens)
    gates[:, 4] = 0
    expected = run(layer, x, gates)
    begin = layer.offsets[4]
    layer.slab[begin : begin + layer.record.bytes].view(np.uint16)[:] = 0x7C00  # +Inf
    for found, want in zip(run(layer, x, gates), expected, strict=True):
        assert np.array_equal(found, want)
    gates[0, 4] = 1
    assert not np.isfinite(run(layer, x, gates)[1][0]).any()


@pytest.mark.parametrize("tokens", [1, 3])
def test_nan_gates_count_as_active(tokens: int) -> None:
    gates = sparse_gates(tokens)
    gates[:, 3] = 0
    gates[-1, 3] = np.nan
    assert 3 in native.active(gates)
    hidden, y = run(make_layer("F16", "relu", scored=False), normal(tokens, SIZE), gates)
    assert np.isnan(hidden[-1, 3])
    assert np.isnan(y[-1]).all()


def test_no_records_and_no_tokens() -> None:
    layer = make_layer("F16", "relu", scored=False)
    none = np.empty(0, np.int32)
    assert not run(layer, normal(2, SIZE), sparse_gates(2), none)[1].any()
    assert run(layer, np.empty((0, SIZE), np.float32), np.empty((0, NEURONS), np.float32))[1].shape == (0, SIZE)


@pytest.mark.parametrize("name", list(native.ACTIVATIONS))
def test_activate(name: str) -> None:
    scores = np.array([-np.inf, -3, -0.5, -0.0, 0, 0.25, 0.5, 2, 80, np.inf, np.nan], np.float32)
    if name == "silu":
        scores[0] = -200  # -Inf · 0 is NaN by definition
    expected = activation(name, scores.astype(np.float64))
    native.activate(scores, native.ACTIVATIONS[name], 0.5)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-30)
    if name != "silu":
        assert not np.signbit(scores[:-1]).any()


def test_active_is_the_ascending_union() -> None:
    gates = np.zeros((3, 50), np.float32)
    gates[0, [7, 49]], gates[2, [0, 7]], gates[1, 20] = 1, -1, 1e-45
    assert native.active(gates).tolist() == [0, 7, 20, 49]
    assert native.active(gates[:1]).tolist() == [7, 49]
    assert native.active(np.zeros((1, 0), np.float32)).size == 0


def test_scale_types_round_trip() -> None:
    """A guard for the fixtures: quantized records really are what mx.quantize stores."""
    part = store(normal(2, 64), "Q4-BF16")
    assert len(part.bytes(0)) == 32 + 2 + 2
    assert exact(part.scales, "BF16").shape == (2, 1)
