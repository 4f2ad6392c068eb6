"""The Metal source that MLX prints for each kernel and type: kept in `golden/<MLX version>/`, compared by test_golden.

A change here is a change of what a Mac compiles. Record it, after looking at the difference, with

    python -m tests.metal.golden
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import candidates, launch, select, sparse_ffn, value
from metal_kernels.records import FLOATS, Record
from tests.metal.harness import metal_on_cpu

DIRECTORY = Path(__file__).with_name("golden") / mx.__version__
FORMATS = (("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("Q8", "F16"), ("Q4", "BF16"))


class Printed(metal_on_cpu.MetalKernel):
    """A kernel that is captured, not run: each call writes its source to `found`, and returns zeros."""

    found: str = ""

    def __call__(self, **call: Any) -> list[mx.array]:
        arguments = (call["inputs"], call["output_shapes"], call["output_dtypes"], call.get("template"))
        Printed.found = self.source(*arguments)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(*arguments[1:3], strict=True)]


def printed(run: Callable[[], object]) -> str:
    """The source of the last kernel that `run` calls."""
    with launch.stand_in(_printing):
        run()
    return Printed.found


def _printing(**arguments: Any) -> Printed:
    return Printed(metal_on_cpu.metal_kernel(**arguments).definition)


def _record(form: str, source: str) -> Record:
    size = {"F32": 256, "F16": 128, "BF16": 128, "Q8": 72, "Q4": 40}[form]
    return Record(d=64, format=form, source=source, gate=0, up=size, down=2 * size, group=32 if form[0] == "Q" else 0)


def cases() -> dict[str, Callable[[], object]]:
    """Each golden file's name without its ending, and what calls the kernel."""
    return {**_ffn_cases(), **_select_cases(), **_score_cases()}


def small_cases() -> dict[str, Callable[[], object]]:
    """Calls with lists of fewer than eight elements, which MLX passes in the constant address space."""
    slab, at = mx.zeros((16, 1024), mx.uint8), mx.zeros((3,), mx.int64)
    ids, one, x = mx.zeros((3,), mx.int32), mx.array([3], mx.int32), mx.zeros((1, 64))
    gates, mask = mx.zeros((1, 3)), mx.zeros((1, 3), mx.uint8)
    bounds, carry = mx.zeros((3,), mx.int32), mx.zeros((2, 1, 64))
    found: dict[str, Callable[[], object]] = {
        "compact": lambda: select.compact(mx.zeros((1, 1), mx.uint32), 3),
        "topk": lambda: select.topk(mx.zeros((1, 3)), 2),
        "lookup": lambda: select.lookup(ids, one, ids, ids, 4096),
        "sum": lambda: sparse_ffn.total(mx.zeros((1, 1, 4))),
    }
    rounded = mx.zeros((1, 64), mx.int8), mx.zeros((1, 1)), mx.zeros((1, 1))
    few = value.Copy(mx.zeros((3, 4), mx.uint32), mx.zeros((3, 1)), mx.zeros((3, 1)), 2, mx.zeros((3,)))
    found["value"] = lambda: value.value(rounded, few, few, mx.zeros((3,)), 0.0, "silu")
    found["candidates"] = lambda: candidates.candidates(_compact(2), mx.zeros((1, 64)))
    found["score"] = lambda: select.score(rounded, *few.parts, 0.0, bias=few.bias)
    for form, source in FORMATS:
        r = _record(form, source)
        found[f"hidden-{form}"] = lambda r=r: sparse_ffn.hidden(r, slab, at, one, x, gates, mask)
        found[f"down-{form}"] = lambda r=r: sparse_ffn.down(r, slab, at, ids, bounds, gates, carry)
    return found


def _select_cases() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    bits, x, wide = mx.zeros((1, 2), mx.uint32), mx.zeros((1, 64)), mx.zeros((1, 64), mx.float32)
    scales = mx.zeros((64, 1), mx.float16)
    rounded = mx.zeros((1, 64), mx.int8), mx.zeros((1, 1)), mx.zeros((1, 1))
    for number in (1, 2, 3, 4):
        words = mx.zeros((64, 2 * number), mx.uint32)
        found[f"score-Q{number}"] = lambda w=words, n=number: select.score(rounded, w, scales, scales, 0.0, bits=n)
    for name, dtype in FLOATS.items():
        found[f"score_round-{name}"] = lambda t=dtype: select.round_tokens(x.astype(t), 64)
        found[f"gate-{name}"] = lambda t=dtype: select.gate(mx.zeros((64, 64), t), x, "relu")
    for number in (4, 8):
        words = mx.zeros((64, 2 * number), mx.uint32)
        found[f"gate-Q{number}-F16"] = lambda w=words, n=number: select.gate(
            w, x, "relu", scales=scales, biases=scales, quant_bits=n
        )
    ids, one = mx.zeros((64,), mx.int32), mx.array([1], mx.int32)
    found["compact"] = lambda: select.compact(bits, 64)
    found["topk"] = lambda: select.topk(wide, 5)
    found["lookup"] = lambda: select.lookup(ids, one, ids, ids, 4096)
    return found


def _score_cases() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    rounded = mx.zeros((1, 64), mx.int8), mx.zeros((1, 1)), mx.zeros((1, 1))
    scales, norms = mx.zeros((64, 1), mx.float16), mx.zeros((64,))
    for number in (1, 2, 3, 4):
        copy = value.Copy(mx.zeros((64, 2 * number), mx.uint32), scales, scales, number)
        found[f"value-Q{number}"] = lambda c=copy: value.value(rounded, c, c, norms, 0.0, "drelu")
    found["candidates"] = lambda: candidates.candidates(_compact(64), mx.zeros((1, 64)))
    for name, dtype in FLOATS.items():
        x = mx.zeros((1, 64), dtype)
        found[f"candidates_round-{name}"] = lambda x=x: candidates._rounded(x, candidates._figures(64, None), 1)
    return found


def _compact(rows: int) -> candidates.CompactCopy:
    high, low = mx.zeros((rows, 64), mx.int8), mx.zeros((rows, 32), mx.uint8)
    scales, errors = mx.zeros((rows, 1), mx.uint16), mx.zeros((rows, 3))
    return candidates.CompactCopy(high, low, scales, errors, mx.zeros((rows,)))


def _ffn_cases() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    slab, at = mx.zeros((16, 1024), mx.uint8), mx.zeros((16,), mx.int64)
    ids, one, x = mx.zeros((16,), mx.int32), mx.array([16], mx.int32), mx.zeros((1, 64))
    for form, source in FORMATS:
        record = _record(form, source)
        name = form if form == source else f"{form}-{source}"
        found[f"sparse_ffn_hidden-{name}"] = lambda r=record: sparse_ffn.hidden(r, slab, at, one, x)
        found[f"sparse_ffn_down-{name}"] = lambda r=record: sparse_ffn.down(
            r, slab, at, ids, mx.zeros((17,), mx.int32), mx.zeros((1, 16))
        )
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        name = str(dtype).rpartition(".")[2]
        found[f"sparse_ffn_sum-{name}"] = lambda t=dtype: sparse_ffn.total(mx.zeros((16, 1, 64)), t)
    return found


def main() -> None:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, run in cases().items():
        (DIRECTORY / f"{name}.metal").write_text(printed(run), encoding="utf-8")
        print(DIRECTORY / f"{name}.metal")


if __name__ == "__main__":
    main()
