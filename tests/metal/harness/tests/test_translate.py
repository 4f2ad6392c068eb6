"""Capture and translation: what MLX prints, read and rewritten; what is not understood is refused."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.metal.harness import metal_on_cpu as cpu

BODY = "uint i = thread_position_in_grid.x;\ny[i] = a[i] + b[0] + c;"
CALL = cpu.Call([[8], [3], []], ["float16", "int32", "float32"], [[8]], ["float32"], [["T", {"dtype": "bfloat16"}]])


def captured() -> str:
    return cpu.capture(cpu.Definition("sample", ["a", "b", "c"], ["y"], BODY), CALL)


def test_mlx_prints_what_the_documentation_says() -> None:
    source = captured()
    assert "const device float16_t* a [[buffer(0)]]" in source
    assert "const constant int32_t* b [[buffer(1)]]" in source  # fewer than eight elements
    assert "const constant float& c [[buffer(2)]]" in source
    assert "device float* y [[buffer(3)]]" in source
    assert BODY in source


def test_the_signature_is_read() -> None:
    kernel = cpu.translate(captured())
    assert [(b.name, b.output, b.reference) for b in kernel.buffers] == [
        ("a", False, False),
        ("b", False, False),
        ("c", False, True),
        ("y", True, False),
    ]
    assert "[[" not in kernel.cpp
    assert not any(word in kernel.cpp.split() for word in ("device", "constant"))


def test_lines_keep_their_numbers() -> None:
    source = captured()
    printed = source.splitlines().index("y[i] = a[i] + b[0] + c;")
    lines = cpu.translate(source).cpp.splitlines()
    assert (
        lines.index("y[i] = a[i] + b[0] + c;") - lines.index(next(x for x in lines if x.startswith("#line")))
        == printed + 1
    )


def test_comments_are_not_read() -> None:
    body = "// a threadgroup, of the device\n/* constant\nthreadgroup */ y[0] = a[0];"
    call = cpu.Call([[8]], ["float32"], [[8]], ["float32"])
    found = cpu.translate(cpu.capture(cpu.Definition("commented", ["a"], ["y"], body), call)).cpp
    assert "threadgroup" not in found.replace('"kernel.metal"', "")


def test_a_capture_of_nothing_is_refused() -> None:
    with pytest.raises(cpu.TranslationError, match="kernel"):
        cpu.translate("int x;")


@pytest.mark.parametrize("declared", ["threadgroup float s[4], t[4];", "threadgroup float s = 1;"])
def test_threadgroup_declarations_that_are_not_understood(declared: str) -> None:
    source = cpu.capture(
        cpu.Definition("declared", ["a"], ["y"], f"{declared}\ny[0] = a[0];"),
        cpu.Call([[8]], ["float32"], [[8]], ["float32"]),
    )
    with pytest.raises(cpu.TranslationError, match="one variable a line"):
        cpu.translate(source)


def test_mlx_says_what_is_wrong() -> None:
    with pytest.raises(cpu.CaptureError, match="one"):
        cpu.capture(cpu.Definition("one", ["a", "b"], ["y"], BODY), CALL)
    assert "buffer(0)" in captured(), mx.__version__  # and the child still answers
