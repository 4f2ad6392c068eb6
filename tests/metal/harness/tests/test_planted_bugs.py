"""The harness finds each kind of bug it promises to find, and does not find it in the kernel without the bug."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal.harness import metal_on_cpu as cpu

pytestmark = pytest.mark.skipif(cpu.compiler() is None, reason="no C++ compiler")

SIZE = 64


def run(source: str, *, size: int = SIZE, group: int = SIZE, orders: int = 2, **more: object) -> np.ndarray:
    """One output y [size] from inputs a [size] = 0, 1, ... (float) and n [16] = 0, 1, ... (int)."""
    kernel = cpu.metal_kernel("planted", ["a", "n"], ["y"], source, header=str(more.pop("header", "")))
    kernel.orders = orders
    inputs = [mx.arange(size).astype(mx.float32), mx.arange(16)]
    made = kernel(
        inputs=inputs,
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
        grid=(size, 1, 1),
        threadgroup=(group, 1, 1),
        **more,
    )
    return np.array(made[0])


def fault(kind: type[cpu.KernelFault], line: str, source: str, **more: object) -> None:
    """The source must raise `kind`, blaming the line that holds `line`."""
    with pytest.raises(kind) as found:
        run(source, **more)
    assert type(found.value) is kind
    if line:
        assert line in str(found.value), str(found.value)


LANE = "uint i = thread_position_in_grid.x; uint l = thread_position_in_threadgroup.x;\n"
SHARED = LANE + "threadgroup float s[64];\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


def test_a_correct_kernel_passes() -> None:
    source = SHARED + "s[l] = a[i];\n" + BARRIER + "y[i] = s[63 - l] + simd_sum(a[i]);"
    halves = np.where(np.arange(SIZE) < 32, np.arange(32).sum(), np.arange(32, 64).sum())
    assert np.array_equal(run(source), np.arange(SIZE)[::-1] + halves)


def test_helpers_may_meet_and_wait() -> None:
    header = """
inline float total(float v, threadgroup float* s, uint at) {
  if (simd_any(v < 0)) v = 0;
  s[at] = simd_sum(v);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float other = s[at ^ 32];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return other;
}
"""
    body = SHARED + "float v = 0;\nif (i < 5) v = a[i];\nfor (int k = 0; k < 2; k++) v = total(v, s, l);\ny[i] = v;"
    assert np.array_equal(run(body, header=header), np.where(np.arange(SIZE) < 32, 320, 0))


@pytest.mark.parametrize("index", ["i + 1", "i - 1", "i + 1000000000u"])
def test_reading_beyond_an_input(index: str) -> None:
    fault(cpu.OutOfBounds, "y[i] = a[", LANE + f"y[i] = a[{index}];")


def test_writing_beyond_an_output() -> None:
    fault(cpu.OutOfBounds, "y[i + 1] = 1", LANE + "y[i + 1] = 1;")


def test_a_wide_load_over_the_end() -> None:
    source = LANE + "float4 v = *(const device packed_float4*)(a + i);\ny[i] = v.x + v.y + v.z + v.w;"
    fault(cpu.OutOfBounds, "packed_float4", source)


def test_beyond_one_threadgroup_variable_into_another() -> None:
    source = LANE + "threadgroup float s[32];\nthreadgroup float t[64];\nt[l] = 0;\n"
    source += "threadgroup float* p = s;\np[l] = 1;\n" + BARRIER + "y[i] = t[l];"
    fault(cpu.OutOfBounds, "p[l] = 1", source)


def test_a_local_array_beyond_its_end() -> None:
    source = LANE + "float local[4] = {1, 2, 3, 4};\ny[i] = local[n[4 + (i & 1)] & 7];"
    fault(cpu.Undefined, "local[n[4", source)


def test_a_race_within_a_threadgroup() -> None:
    fault(cpu.Race, "", SHARED + "s[l] = a[i];\ny[i] = s[l];\ns[63 - l] = 2;")
    fault(cpu.Race, "s[0] = a[i]", SHARED + "s[0] = a[i];\n" + BARRIER + "y[i] = s[0];")


def test_a_race_of_a_write_with_an_earlier_read() -> None:
    source = SHARED + "s[l] = a[i];\n" + BARRIER + "y[i] = s[(l + 1) & 63];\ns[l] = 0;"
    fault(cpu.Race, "", source)


def test_a_barrier_for_another_memory_orders_nothing() -> None:
    other = "threadgroup_barrier(mem_flags::mem_device);\n"
    fault(cpu.Race, "", SHARED + "s[l] = a[i];\n" + other + "s[63 - l] = 1;\ny[i] = a[i];")


def test_a_simdgroup_barrier_orders_one_simdgroup_only() -> None:
    source = SHARED + "s[l] = 0;\n" + BARRIER + "s[l] = a[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
    run(source + "y[i] = s[l ^ 1];")
    fault(cpu.Race, "s[l] = a[i]", source + "y[i] = s[63 - l];")


def test_a_race_between_lanes_on_an_output() -> None:
    fault(cpu.Race, "y[i / 2] = 1", LANE + "y[i / 2] = 1;")


def test_a_race_between_threadgroups() -> None:
    fault(cpu.Race, "y[l] = i", LANE + "y[l] = i;", group=32)
    source = LANE + "y[i] = a[i];\nif (i >= 32) y[i] += y[i - 32];"
    fault(cpu.Race, "y[i - 32]", source, group=32)


def test_uninitialised_threadgroup_memory() -> None:
    fault(cpu.Uninitialised, "y[i] = s[l]", SHARED + "if (l > 5) s[l] = 1;\n" + BARRIER + "y[i] = s[l];")


def test_what_one_threadgroup_left_is_not_there_for_the_next() -> None:
    source = SHARED + "if (i < 32) s[l] = 1;\n" + BARRIER + "y[i] = s[l];"
    fault(cpu.Uninitialised, "y[i] = s[l]", source, group=32)


def test_an_output_read_before_it_is_written() -> None:
    fault(cpu.Uninitialised, "y[i] += a[i]", LANE + "y[i] += a[i];")
    assert np.array_equal(run(LANE + "y[i] += a[i];", init_value=2.0), np.arange(SIZE) + 2)


def test_an_uninitialised_local() -> None:
    with pytest.raises(cpu.CompileError, match="uninitialized"):
        run(LANE + "float sum;\nif (n[i & 1]) sum = a[i];\ny[i] = sum;")


def test_what_an_uninitialised_local_array_holds_shows() -> None:
    found = run(LANE + "float local[8];\nlocal[n[i & 7]] = 1;\ny[i] = local[n[(i & 7) ^ 1]];")
    assert (np.abs(found) > 1e30).all()


def test_writing_to_an_input() -> None:
    fault(cpu.InputWrite, "((device float*)a)[i] = 1", LANE + "((device float*)a)[i] = 1;\ny[i] = 0;")


def test_writing_to_a_constant_of_the_program() -> None:
    source = LANE + "*(thread float*)&table[i & 1] = 3;\ny[i] = table[0];"
    fault(cpu.InputWrite, "program-scope constant", source, header="constant float table[2] = {1, 2};\n")


def test_some_lanes_skip_a_simdgroup_operation() -> None:
    fault(cpu.Divergence, "simd_sum(a[i])", LANE + "if (l < 7) y[i] = simd_sum(a[i]);\nelse y[i] = 0;")


def test_lanes_at_different_simdgroup_operations() -> None:
    source = LANE + "if (l & 1) y[i] = simd_sum(a[i]);\nelse y[i] = simd_max(a[i]);"
    fault(cpu.Divergence, "", source)


def test_lanes_at_the_same_operation_by_different_calls() -> None:
    source = LANE + "if (l & 1) y[i] = total(a[i]);\nelse y[i] = 2 * total(a[i]);"
    fault(cpu.Divergence, "", source, header="inline float total(float v) { return simd_sum(v); }\n")


def test_some_lanes_skip_a_barrier() -> None:
    fault(cpu.Divergence, "", SHARED + "s[l] = a[i];\nif (l < 40) " + BARRIER + "y[i] = s[l];")
    fault(cpu.Divergence, "", SHARED + "if (l == 63) return;\n" + BARRIER + "y[i] = 1;")


def test_a_lane_that_is_not_there() -> None:
    fault(cpu.Divergence, "", LANE + "y[i] = simd_broadcast(a[i], 9);", size=40, group=8)


def test_results_that_depend_on_the_order_of_threadgroups() -> None:
    source = LANE + "atomic_store_explicit(y + i, atomic_fetch_add_explicit(count, 1.0f, memory_order_relaxed), "
    source += "memory_order_relaxed);"
    kernel = cpu.metal_kernel("counted", ["a"], ["y", "count"], source, atomic_outputs=True)
    with pytest.raises(cpu.OrderDependent, match="output y"):
        kernel(
            inputs=[mx.zeros((SIZE,))],
            output_shapes=[(SIZE,), (1,)],
            output_dtypes=[mx.float32, mx.float32],
            grid=(SIZE, 1, 1),
            threadgroup=(32, 1, 1),
            init_value=0,
        )


def test_float_atomics_depend_on_the_order() -> None:
    source = LANE + "atomic_fetch_add_explicit(y, 1.0f / (1 + a[i] * a[i]), memory_order_relaxed);"
    kernel = cpu.metal_kernel("atomics", ["a"], ["y"], source, atomic_outputs=True)
    kernel.orders = 4
    with pytest.raises(cpu.OrderDependent):
        kernel(
            inputs=[mx.arange(512).astype(mx.float32)],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(512, 1, 1),
            threadgroup=(32, 1, 1),
            init_value=0,
        )


def test_a_misaligned_vector() -> None:
    source = LANE + "float4 v = *(const device float4*)(a + 1);\ny[i] = v.x;"
    fault(cpu.Misaligned, "const device float4*", source)


@pytest.mark.parametrize(
    "expression", ["1 << (n[i & 7] + 30)", "n[i & 1] / n[0]", "2147483647 + n[i & 1]", "int(3e9f * a[i])"]
)
def test_undefined_arithmetic(expression: str) -> None:
    fault(cpu.Undefined, "y[i] =", LANE + f"y[i] = {expression};")


def test_more_threadgroup_memory_than_there_is() -> None:
    source = LANE + "threadgroup float s[9000];\ns[l] = a[i];\n" + BARRIER + "y[i] = s[63 - l];"
    fault(cpu.TooMuchMemory, "", source)


def test_an_unknown_name_does_not_compile() -> None:
    with pytest.raises(cpu.CompileError, match="simd_nothing"):
        run(LANE + "y[i] = simd_nothing(a[i]);")


def test_what_mlx_refuses_is_refused() -> None:
    kernel = cpu.metal_kernel("refused", ["a"], ["y"], LANE + "y[i] = a[i];")
    with pytest.raises(cpu.CaptureError, match="refused"):
        kernel(
            inputs=[mx.zeros((8,)), mx.zeros((8,))],
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
        )
