"""The sparse FFN's Metal kernels against float64 and against plain MLX operators, in the harness or on a GPU."""

from __future__ import annotations

import mmap

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metal_kernels import sparse_ffn
from metal_kernels.sparse_ffn import TOLERANCE
from tests.metal import golden
from tests.metal.harness import metal_on_cpu
from tests.metal.layers import ACTIVATIONS, FORMATS, Layer, hidden64, make_layer
from tests.native.operands import TYPES

pytestmark = pytest.mark.usefixtures("metal")
# The fixture only installs the harness, so it may serve all examples of a test.
PROPERTY = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(PROPERTY, max_examples=150)


def count_of(layer: Layer) -> mx.array:
    return mx.array([len(layer.offsets)], mx.int32)


def run_hidden(layer: Layer, x: np.ndarray, **more: mx.array) -> np.ndarray:
    made = sparse_ffn.hidden(layer.record, layer.slab, mx.array(layer.offsets), count_of(layer), mx.array(x), **more)
    return np.array(made)


def run_down(layer: Layer, hidden: np.ndarray, bounds: list[int], carry: mx.array | None = None) -> mx.array:
    """The segments' sums, hidden [T, n] with a column for each record."""
    cols = mx.arange(len(layer.offsets)).astype(mx.int32)
    offsets, limits = mx.array(layer.offsets), mx.array(bounds, mx.int32)
    return sparse_ffn.down(layer.record, layer.slab, offsets, cols, limits, mx.array(hidden), carry)


def close(found: np.ndarray, expected: np.ndarray, size: np.ndarray) -> bool:
    """Within TOLERANCE of the products' magnitudes; NaN and Inf where float64 has NaN, Inf or too large a number."""
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(found - expected) <= TOLERANCE * size + 1e-30
    return bool((near | ((found == expected) | (np.isnan(found) & np.isnan(expected)))).all())


def check_layer(layer: Layer, x: np.ndarray) -> None:
    """Hidden and down, in segments, against float64 and against the reference."""
    expected, size = hidden64(layer, x.astype(np.float64))
    hidden = run_hidden(layer, x)
    assert close(hidden, expected, size)
    assert (hidden[expected == 0] == 0).all() or layer.record.activation == "fatrelu"
    plain = sparse_ffn.hidden_reference(layer.record, layer.slab, mx.array(layer.offsets), mx.array(x))
    assert close(np.array(plain), hidden, 2 * size)
    n = len(layer.offsets)
    y = np.array(sparse_ffn.total(run_down(layer, hidden, [0, n // 3, n // 3, n])))
    left = np.where(hidden[:, :, None] == 0, 0, hidden[:, :, None].astype(np.float64) * layer.vectors["down"])
    assert close(y, left.sum(axis=1), np.abs(left).sum(axis=1))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_matches_float64(kind: str) -> None:
    rng = np.random.default_rng(TYPES.index(kind))
    for tokens, biased in ((1, False), (3, True)):
        layer = make_layer(rng, kind, 13, 160, biased=biased)
        check_layer(layer, rng.standard_normal((tokens, 160)).astype(np.float32))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation_matches_float64(kind: str, activation: str, gated: bool) -> None:
    if activation == "drelu" and not gated:
        pytest.skip("dReLU is two halves of a gated FFN")
    rng = np.random.default_rng(7)
    layer = make_layer(rng, kind, 9, 96, activation=activation, gated=gated, biased=True)
    check_layer(layer, rng.standard_normal((2, 96)).astype(np.float32))


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([32, 64, 288]), st.integers(1, 9), st.booleans())
def test_any_shape(seed: int, n: int, d: int, tokens: int, special: bool) -> None:
    rng = np.random.default_rng(seed)
    layer = make_layer(rng, "F16", n, d, biased=bool(seed % 2), special=special)
    x = rng.standard_normal((tokens, d)).astype(np.float32)
    if special:
        x[rng.integers(tokens), rng.integers(d)] = np.nan
    with np.errstate(invalid="ignore"):
        check_layer(layer, x)


@pytest.mark.slow
@LONG
@given(
    st.integers(0, 2**31),
    st.sampled_from(TYPES),
    st.integers(1, 70),
    st.sampled_from([32, 64, 96, 288, 1056]),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
)
def test_any_layer(
    seed: int, kind: str, n: int, d: int, tokens: int, special: bool, activation: str, gated: bool
) -> None:
    rng = np.random.default_rng(seed)
    gated = gated or activation == "drelu"
    layer = make_layer(rng, kind, n, d, activation=activation, gated=gated, biased=bool(seed % 2), special=special)
    x = rng.standard_normal((tokens, d)).astype(np.float32)
    if special:
        x[rng.integers(tokens), rng.integers(d)] = rng.choice([np.nan, np.inf])
    with np.errstate(invalid="ignore", over="ignore"):
        check_layer(layer, x)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_states_of_every_type(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(11)
    layer = make_layer(rng, "BF16", 8, 64)
    x = mx.array(rng.standard_normal((1, 64)).astype(np.float32)).astype(dtype)
    exact = np.array(x.astype(mx.float32)).astype(np.float64)
    made = sparse_ffn.hidden(layer.record, layer.slab, mx.array(layer.offsets), count_of(layer), x)
    assert close(np.array(made), *hidden64(layer, exact))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "drelu"])  # of the other half of the layer: dReLU's is one too
def test_given_gates_and_masks(kind: str, activation: str) -> None:
    rng = np.random.default_rng(12)
    layer = make_layer(rng, kind, 12, 128, group=64, scored=False, activation=activation)
    x = rng.standard_normal((2, 128)).astype(np.float32)
    gates = np.maximum(rng.standard_normal((2, 12)), 0).astype(np.float32)
    expected, size = hidden64(layer, x.astype(np.float64), gates)
    assert close(run_hidden(layer, x, activated=mx.array(gates)), expected, size)
    mask = rng.integers(0, 2, (2, 12), np.uint8)
    found = run_hidden(layer, x, activated=mx.array(gates), mask=mx.array(mask))
    assert close(found, np.where(mask, expected, 0), size)
    assert (found[mask == 0] == 0).all()


def test_a_zero_gate_gives_zero_whatever_the_up_row_holds() -> None:
    rng = np.random.default_rng(13)
    layer = make_layer(rng, "F32", 8, 32, scored=False)
    slab = np.array(layer.slab)
    for offset in layer.offsets:
        row, column = divmod(int(offset), slab.shape[1])
        slab[row, column : column + 4] = np.frombuffer(np.float32(np.inf).tobytes(), np.uint8)
    layer.slab = mx.array(slab)
    gates = np.zeros((2, 8), np.float32)
    gates[1, 3] = 1
    found = run_hidden(layer, np.ones((2, 32), np.float32), activated=mx.array(gates))
    assert np.isinf(found[1, 3])
    found[1, 3] = 0
    assert (found == 0).all()


def test_a_hidden_value_of_zero_leaves_the_down_vector_out_for_its_token() -> None:
    rng = np.random.default_rng(19)
    layer = make_layer(rng, "F16", 8, 32, special=True)
    hidden = rng.standard_normal((3, 8)).astype(np.float32)
    hidden[0] = 0
    hidden[1, ~np.isfinite(layer.vectors["down"]).all(axis=1)] = 0
    y = np.array(sparse_ffn.total(run_down(layer, hidden, [0, 8])))
    assert (y[0] == 0).all()
    assert np.isfinite(y[1]).all()
    assert not np.isfinite(y[2]).all()


def test_no_records() -> None:
    rng = np.random.default_rng(14)
    layer = make_layer(rng, "F16", 0, 32)
    assert run_hidden(layer, np.ones((2, 32), np.float32)).shape == (2, 0)
    made = run_down(layer, np.zeros((2, 0), np.float32), [0, 0])
    assert np.array_equal(np.array(sparse_ffn.total(made)), np.zeros((2, 32)))


def test_only_the_counted_records_are_read() -> None:
    rng = np.random.default_rng(15)
    layer = make_layer(rng, "F16", 9, 64)
    x = rng.standard_normal((1, 64)).astype(np.float32)
    whole = run_hidden(layer, x)
    layer.offsets[5:] = 1 << 40  # reading these would be a fault
    counted = sparse_ffn.hidden(layer.record, layer.slab, mx.array(layer.offsets), mx.array([5], mx.int32), mx.array(x))
    assert np.array_equal(np.array(counted)[:, :5], whole[:, :5])


def test_bits_do_not_depend_on_the_company() -> None:
    """A token's and a record's values are the same alone, among others, in any order, and in two rounds."""
    rng = np.random.default_rng(16)
    layer = make_layer(rng, "BF16", 21, 96, biased=True)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    whole = run_hidden(layer, x)
    for t in range(5):
        assert np.array_equal(run_hidden(layer, x[t : t + 1]), whole[t : t + 1])
    some = rng.permutation(21)[:10]
    part = Layer(layer.record, layer.slab, layer.offsets[some], {}, {})
    assert np.array_equal(run_hidden(part, x), whole[:, some])

    y = np.array(run_down(layer, whole, [0, 4, 13, 21]))
    for t in range(5):
        assert np.array_equal(np.array(run_down(layer, whole[t : t + 1], [0, 4, 13, 21])), y[:, t : t + 1])
    early = Layer(layer.record, layer.slab, layer.offsets[:10], {}, {})
    late = Layer(layer.record, layer.slab, layer.offsets[10:], {}, {})
    carried = run_down(early, whole[:, :10], [0, 4, 10, 10])
    assert np.array_equal(np.array(run_down(late, whole[:, 10:], [0, 0, 3, 11], carried)), y)


@pytest.mark.skipif(mx.metal.is_available(), reason="the slab exists in the harness only")
def test_slabs_beyond_two_gigabytes() -> None:
    rng = np.random.default_rng(18)
    layer = make_layer(rng, "Q4-F16", 8, 64, group=64)
    x = rng.standard_normal((1, 64)).astype(np.float32)
    inputs = [layer.slab, mx.array(layer.offsets), count_of(layer), mx.array(x)]
    program = metal_on_cpu.Program(golden.printed(lambda: sparse_ffn.hidden(layer.record, *inputs)))
    near = np.array(layer.slab).reshape(-1)
    start = (5 << 29) + 64
    with mmap.mmap(-1, start + near.size) as memory:
        slab = np.frombuffer(memory, np.uint8)
        memory[start:] = near.tobytes()
        buffers = {
            "slab": slab,
            "offsets": layer.offsets + start,
            "count": np.array([8], np.int32),
            "layout": np.array(layer.record.layout()),
            "param": np.array(layer.record.limit()),
            "x": x,
        }
        ran = program.run(buffers, {"hidden": ((1, 8), np.float32)}, (32, 8, 1), (32, 4, 1))
        del slab, buffers
    assert np.array_equal(ran.outputs["hidden"], run_hidden(layer, x))


@pytest.mark.skipif(mx.metal.is_available(), reason="the slab exists in the harness only")
def test_down_sums_of_slabs_beyond_two_gigabytes() -> None:
    rng = np.random.default_rng(19)
    layer = make_layer(rng, "F16", 6, 64)
    hidden = rng.standard_normal((1, 6)).astype(np.float32)
    cols, bounds = np.arange(6, dtype=np.int32), np.array([0, 2, 6], np.int32)
    inputs = [mx.array(each) for each in (layer.offsets, cols, bounds, hidden)]
    program = metal_on_cpu.Program(golden.printed(lambda: sparse_ffn.down(layer.record, layer.slab, *inputs)))
    near = np.array(layer.slab).reshape(-1)
    start = (5 << 29) + 64
    with mmap.mmap(-1, start + near.size) as memory:
        slab = np.frombuffer(memory, np.uint8)
        memory[start:] = near.tobytes()
        buffers = {
            "slab": slab,
            "offsets": layer.offsets + start,
            "cols": cols,
            "bounds": bounds,
            "hidden": hidden,
            "layout": np.array(layer.record.layout()),
        }
        ran = program.run(buffers, {"partial": ((2, 1, 64), np.float32)}, (32, 2, 1), (32, 1, 1))
        del slab, buffers
    assert np.array_equal(ran.outputs["partial"], np.array(run_down(layer, hidden, [0, 2, 6])))


def test_segments_of_neuron_numbers() -> None:
    ids = mx.array([0, 3, 4, 9, 10, 11, 15, 99, 99], mx.int32)
    found = sparse_ffn.segment_bounds(ids, mx.array([7]), 16, 4)
    assert found.tolist() == [0, 2, 3, 6, 7]
    assert sparse_ffn.segment_bounds(ids, mx.array([0]), 16, 4).tolist() == [0] * 5


def test_sums_of_segments_are_rounded_once() -> None:
    partial = np.random.default_rng(17).standard_normal((16, 3, 32)).astype(np.float32)
    expected = partial[0]
    for part in partial[1:]:
        expected = expected + part
    assert np.array_equal(np.array(sparse_ffn.total(mx.array(partial))), expected)
    found = sparse_ffn.total(mx.array(partial), mx.float16)
    assert np.array_equal(np.array(found), expected.astype(np.float16))
