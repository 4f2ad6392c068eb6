"""Builds the Metal kernels, each once: bodies from the `.metal` files beside this one, dispatch elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

HERE = Path(__file__).parent
SIMD = 32  # lanes of a simdgroup
# NaN and infinities keep their meaning, which activations rely on, and nothing is fused that is not written as fma.
PRAGMAS = "#pragma METAL fp math_mode(safe)\n#pragma METAL fp contract(off)\n"


@cache
def kernel(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    headers: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
) -> Any:
    """The kernel whose body is `name`.metal, after the files `headers`; each of `flags` is "NAME=value" for its #if."""
    defines = "".join(f"#define {flag.replace('=', ' ')}\n" for flag in flags)
    header = PRAGMAS + defines + "".join(_text(each) for each in headers)
    suffix = "".join(f"_{flag.partition('=')[0].lower()}" for flag in flags if flag.endswith("=1"))
    return mx.fast.metal_kernel(
        name=f"fs_{name}{suffix}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=_text(name),
        header=header,
        compile_options={"math_mode": "safe"},
    )


def _text(name: str) -> str:
    return (HERE / f"{name}.metal").read_text(encoding="utf-8")
