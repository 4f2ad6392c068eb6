"""What the harness models, against numpy and MLX: rounding, vectors, simdgroup operations, positions, grids."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal.harness import metal_on_cpu as cpu

pytestmark = pytest.mark.skipif(cpu.compiler() is None, reason="no C++ compiler")

LANE = "uint i = thread_position_in_grid.x;\n"


def each(body: str, inputs: list[mx.array], dtype: mx.Dtype, *, header: str = "", template: Any = None) -> mx.array:
    """y[i] of one lane per element of inputs[0], named a, b, ..."""
    names = ["a", "b", "c"][: len(inputs)]
    kernel = cpu.metal_kernel("each", names, ["y"], LANE + body, header=header)
    count = inputs[0].size
    shapes, group = [(count,)], (min(count, 256), 1, 1)
    (made,) = kernel(
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=[dtype],
        grid=(count, 1, 1),
        threadgroup=group,
        template=template,
    )
    return made


def same_bits(found: mx.array, expected: mx.array) -> bool:
    """Equal bits, any NaN equal to any NaN."""
    one, other = (np.array(a.astype(mx.float32)) for a in (found, expected))
    return bool(((one.view(np.uint32) == other.view(np.uint32)) | (np.isnan(one) & np.isnan(other))).all())


EVERY = mx.arange(1 << 16).astype(mx.uint16)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_small_float_widens_and_narrows(dtype: mx.Dtype) -> None:
    values = EVERY.view(dtype)
    assert same_bits(each("y[i] = float(a[i]);", [values], mx.float32), values.astype(mx.float32))
    assert same_bits(each("y[i] = T(float(a[i]));", [values], dtype, template=[("T", dtype)]), values)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_narrowing_rounds_to_nearest_even(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [rng.integers(0, 1 << 32, 20000, np.uint32), rng.integers(0x33000000, 0x39000000, 20000, np.uint32)]
    )
    # Halfway cases: the digits that are dropped are exactly one half.
    halfway = (bits & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    values = mx.array(
        np.concatenate([bits, halfway, (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)]).view(np.float32)
    )
    expected = np.array(values)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = mx.array(expected.astype(np.float16)) if dtype == mx.float16 else values.astype(mx.bfloat16)
    assert same_bits(each("y[i] = T(a[i]);", [values], dtype, template=[("T", dtype)]), wanted)


@pytest.mark.parametrize("operator", ["+", "-", "*", "/"])
def test_half_arithmetic_rounds_once(operator: str) -> None:
    rng = np.random.default_rng(1)
    one, other = (rng.integers(0, 1 << 16, 30000, np.uint16).view(np.float16) for _ in range(2))
    with np.errstate(all="ignore"):
        expected = {"+": one + other, "-": one - other, "*": one * other, "/": one / other}[operator]
    found = each(f"y[i] = a[i] {operator} b[i];", [mx.array(one), mx.array(other)], mx.float16)
    assert same_bits(found, mx.array(expected))


def test_mixed_arithmetic_is_in_float() -> None:
    a, b = mx.array([1.0, 2049.0]).astype(mx.float16), mx.array([0.0001, 1.0])
    assert np.array_equal(each("y[i] = a[i] + b[i];", [a, b], mx.float32), a.astype(mx.float32) + b)


def test_vectors_and_bits() -> None:
    a = mx.arange(64).astype(mx.uint32) * 0x01010101
    found = each("uchar4 v = as_type<uchar4>(a[i]); uint4 w = uint4(v); y[i] = w.x + w[3] * 256;", [a], mx.uint32)
    assert np.array_equal(found, mx.arange(64) * 257)
    wide = each(
        "float4 v = ((const device float4*)a)[i / 4]; y[i] = dot(v, float4(1.0f));", [mx.arange(64.0)], mx.float32
    )
    assert np.array_equal(wide, np.arange(64.0).reshape(-1, 4).sum(axis=1).repeat(4))


VALUES = mx.array(np.random.default_rng(2).integers(-100, 100, 64).astype(np.int32))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("simd_sum(a[i])", lambda v: np.full(32, v.sum())),
        ("simd_max(a[i])", lambda v: np.full(32, v.max())),
        ("simd_min(a[i])", lambda v: np.full(32, v.min())),
        ("simd_or(a[i])", lambda v: np.full(32, np.bitwise_or.reduce(v))),
        ("simd_prefix_exclusive_sum(a[i])", lambda v: np.cumsum(v) - v),
        ("simd_prefix_inclusive_sum(a[i])", np.cumsum),
        ("simd_broadcast(a[i], 5)", lambda v: np.full(32, v[5])),
        ("simd_shuffle_xor(a[i], 8)", lambda v: v[np.arange(32) ^ 8]),
        ("simd_shuffle_down(a[i], 3)", lambda v: np.concatenate([v[3:], v[29:]])),
        ("simd_shuffle_up(a[i], 3)", lambda v: np.concatenate([v[:3], v[:29]])),
        ("simd_any(a[i] > 90)", lambda v: np.full(32, (v > 90).any())),
        ("simd_all(a[i] > -101)", lambda v: np.full(32, 1)),
    ],
)
def test_simdgroup_operations(name: str, expected: Any) -> None:
    wanted = np.concatenate([expected(half) for half in np.array(VALUES).reshape(2, 32)])
    assert np.array_equal(each(f"y[i] = {name};", [VALUES], mx.int32), wanted)


def test_a_sum_of_floats_does_not_depend_on_who_asks() -> None:
    values = mx.array(np.random.default_rng(3).standard_normal(64).astype(np.float32) * 1e4)
    found = np.array(each("y[i] = simd_sum(a[i]);", [values], mx.float32)).reshape(2, 32)
    assert (found == found[:, :1]).all()
    assert np.allclose(
        found[:, 0], np.array(values, copy=True).astype(np.float64).reshape(2, 32).sum(axis=1), rtol=1e-5
    )


def test_positions_and_the_smaller_threadgroups_at_the_edges() -> None:
    names = ["thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup"]
    source = """
uint3 p = thread_position_in_grid;
uint at = (p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x;
uint3 size = threads_per_threadgroup;
y[4 * at] = thread_index_in_threadgroup;
y[4 * at + 1] = thread_index_in_simdgroup + 100 * simdgroup_index_in_threadgroup;
y[4 * at + 2] = size.x + 100 * size.y + 10000 * size.z;
y[4 * at + 3] = threadgroup_position_in_grid.x + 10 * threadgroup_position_in_grid.y + a[0];
"""
    assert all(name in source for name in names)
    kernel = cpu.metal_kernel("positions", ["a"], ["y"], source)
    (made,) = kernel(
        inputs=[mx.array([0])],
        output_shapes=[(3, 5, 20, 4)],
        output_dtypes=[mx.int32],
        grid=(20, 5, 3),
        threadgroup=(16, 4, 1),
    )
    _z, y, x = np.meshgrid(np.arange(3), np.arange(5), np.arange(20), indexing="ij")
    wide, high = np.where(x < 16, 16, 4), np.where(y < 4, 4, 1)
    index = x % 16 + (y % 4) * wide
    expected = [index, index % 32 + 100 * (index // 32), wide + 100 * high + 10000, x // 16 + 10 * (y // 4)]
    assert np.array_equal(made, np.stack(expected, axis=-1))


def test_shapes_and_strides_come_with_an_input() -> None:
    kernel = cpu.metal_kernel("shapes", ["a"], ["y"], LANE + "y[i] = a_shape[1] + 100 * a_strides[0] + 10000 * a_ndim;")
    (made,) = kernel(
        inputs=[mx.zeros((3, 7))], output_shapes=[(1,)], output_dtypes=[mx.int32], grid=(1, 1, 1), threadgroup=(1, 1, 1)
    )
    assert made.item() == 7 + 700 + 20000


def test_bytes_left_unwritten_are_known() -> None:
    kernel = cpu.metal_kernel("part", ["a"], ["y"], LANE + "if (i < 5) y[i] = a[i];")
    (made,) = kernel(
        inputs=[mx.ones((8,))], output_shapes=[(8,)], output_dtypes=[mx.float32], grid=(8, 1, 1), threadgroup=(8, 1, 1)
    )
    assert kernel.last is not None
    assert np.array_equal(kernel.last.written["y"].reshape(8, 4).all(axis=1), np.arange(8) < 5)
    assert np.array_equal(np.isnan(made), np.arange(8) >= 5)


def test_offsets_beyond_four_gigabytes() -> None:
    import mmap

    rows, width = 5 << 10, 1 << 20
    with mmap.mmap(-1, rows * width) as memory:
        memory[rows * width - 1] = 7
        slab = np.frombuffer(memory, np.uint8).reshape(rows, width)
        call = cpu.Call([[8, 8]], ["uint8"], [[1]], ["int32"])
        definition = cpu.Definition("far", ["a"], ["y"], "y[0] = a[long(a_shape[0]) * a_shape[1] - 1];")
        ran = cpu.Program(cpu.capture(definition, call)).run({"a": slab}, {"y": ((1,), np.int32)}, (1, 1, 1), (1, 1, 1))
        narrow = cpu.Definition("near", ["a"], ["y"], "y[0] = a[a_shape[0] * a_shape[1] - 1];")
        with pytest.raises(cpu.Undefined, match="overflow"):
            cpu.Program(cpu.capture(narrow, call)).run({"a": slab}, {"y": ((1,), np.int32)}, (1, 1, 1), (1, 1, 1))
        assert ran.outputs["y"][0] == 7
        del slab, ran


def test_threadgroup_pointers_and_types() -> None:
    header = """
template <typename U> inline U last(threadgroup const U* p, int n) { return p[n - 1]; }
struct Pair { float sum; int count; };
constant float table[2] = {10, 20};
"""
    body = """
threadgroup Pair pairs[8];
threadgroup vec<float, 4> wide;
threadgroup T plain[2][4];
pairs[i].sum = a[i];
pairs[i].count = 1;
plain[i / 4][i % 4] = T(a[i]);
if (i == 0) wide = float4(1, 2, 3, 4);
threadgroup_barrier(mem_flags::mem_threadgroup);
const threadgroup T* p = plain[1];
y[i] = pairs[7 - i].sum + wide.w + float(last(p, 4)) + table[i % 2];
"""
    found = each(body, [mx.arange(8.0)], mx.float32, header=header, template=[("T", mx.float16)])
    assert np.array_equal(found, np.arange(8)[::-1] + 4 + 7 + np.where(np.arange(8) % 2, 20, 10))
