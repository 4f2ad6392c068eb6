"""Builds the Metal kernels, each once: bodies from the `.metal` files beside this one, dispatch elsewhere.

What builds them is `mx.fast.metal_kernel`, or a stand-in for it that runs the same kernels elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

HERE = Path(__file__).parent
SIMD = 32  # lanes of a simdgroup
# NaN and infinities keep their meaning, which activations rely on, and nothing is fused that is not written as fma.
PRAGMAS = "#pragma METAL fp math_mode(safe)\n#pragma METAL fp contract(off)\n"

_stand_ins: list[Callable[..., Any]] = []


def available() -> bool:
    """Whether the kernels can run: on the default device, if that is an Apple GPU, or by a stand-in."""
    return bool(_stand_ins) or (mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu)


@contextmanager
def stand_in(make: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile `make`, with the arguments of `mx.fast.metal_kernel`, builds the kernels."""
    _stand_ins.append(make)
    kernel.cache_clear()
    try:
        yield
    finally:
        _stand_ins.pop()
        kernel.cache_clear()


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
    make = _stand_ins[-1] if _stand_ins else mx.fast.metal_kernel
    return make(
        name=f"fs_{name}{suffix}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=_text(name),
        header=header,
        compile_options={"math_mode": "safe"},
    )


def _text(name: str) -> str:
    return (HERE / f"{name}.metal").read_text(encoding="utf-8")
