"""The Metal source that MLX would compile for a kernel and its inputs, printed on any machine.

While `mx.export_function` traces, MLX does not ask for a Metal device, and with `verbose` it prints what it generates
to C's standard output. So the tracing runs in a child process, which lives as long as this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from .faults import CaptureError

Template = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Definition:
    """The arguments of `mx.fast.metal_kernel`."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    compile_options: dict[str, str] | None = None


@dataclass(frozen=True)
class Call:
    """The arguments of one call, arrays by shape and type. A shape of () is a scalar."""

    input_shapes: Sequence[Sequence[int]]
    input_dtypes: Sequence[str]
    output_shapes: Sequence[Sequence[int]]
    output_dtypes: Sequence[str]
    template: list[list[Any]] = field(default_factory=list)


def dtype_name(dtype: mx.Dtype) -> str:
    """ "float16" of mx.float16."""
    return str(dtype).rpartition(".")[2]


def plain_template(template: Template | None) -> list[list[Any]]:
    """A template list as JSON: types become {"dtype": name}."""
    named = [
        [name, {"dtype": dtype_name(value)} if isinstance(value, mx.Dtype) else value] for name, value in template or ()
    ]
    return named


def capture(definition: Definition, call: Call) -> str:
    """The printed source. Raises CaptureError with MLX's message when it refuses the call."""
    answer = _child().ask({"definition": asdict(definition), "call": asdict(call)})
    if "error" in answer:
        raise CaptureError(f"{definition.name}: {answer['error']}")
    text: str = answer["printed"]
    begin, end = text.find("```\n"), text.rfind("\n```")
    if begin < 0 or end < begin:
        raise CaptureError(f"{definition.name}: MLX {mx.__version__} printed {text[:200]!r}, no source between ```")
    return text[begin + 4 : end] + "\n"


class _Child:
    def __init__(self) -> None:
        script = Path(__file__).with_name("printer.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise CaptureError(f"the process that prints kernels ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@cache
def _child() -> _Child:
    return _Child()
