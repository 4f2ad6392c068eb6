"""Address spaces and types, by clang: what Metal would refuse is refused, and what it takes is taken."""

from __future__ import annotations

import pytest

from tests.metal.harness import metal_on_cpu as cpu

pytestmark = pytest.mark.skipif(not cpu.address_spaces.available(), reason="libclang is not installed")

HEADER = "template <typename U> inline float first(const device U* p) { return float(p[0]); }\n"


def found(body: str, header: str = HEADER, *, size: int = 64, dtype: str = "float16") -> list[str]:
    call = cpu.Call([[size]], [dtype], [[64]], ["float32"], [["T", {"dtype": dtype}]])
    return cpu.address_spaces.problems(cpu.capture(cpu.Definition("typed", ["a"], ["y"], body, header), call))


def test_a_correct_kernel_passes() -> None:
    body = "threadgroup T s[32];\ns[thread_index_in_simdgroup] = a[0];\ny[0] = first(a) + simd_sum(float(s[1]));"
    assert found(body) == []
    assert found(body, dtype="bfloat16") == []


def test_a_small_input_is_constant_and_no_device_pointer() -> None:
    (problem,) = found("y[0] = first(a);", size=4)
    assert "no matching function" in problem


@pytest.mark.parametrize(
    "body",
    [
        "const thread T* p = a;\ny[0] = p[0];",
        "threadgroup T s[4];\ns[0] = 1;\ny[0] = first(s);",
        "T local[4] = {};\ny[0] = first(local);",
        "device T* p = a;\ny[0] = p[0];",
        "a[0] = 1;",
        "y[0] = *(const device float*)&y_not_there;",
    ],
)
def test_what_metal_refuses(body: str) -> None:
    assert len(found(body)) == 1


def test_the_line_is_that_of_the_printed_source() -> None:
    call = cpu.Call([[64]], ["float32"], [[64]], ["float32"])
    source = cpu.capture(cpu.Definition("lines", ["a"], ["y"], "y[0] = a[0];\ny[1] = nothing;"), call)
    (problem,) = cpu.address_spaces.problems(source)
    assert source.splitlines()[int(problem.split(":")[0]) - 1] == "y[1] = nothing;"
