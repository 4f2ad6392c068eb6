"""`metal_kernel`, with the arguments of `mx.fast.metal_kernel`: its calls run on the CPU and return MLX arrays.

Owns the passage between MLX arrays and buffers. Each call is captured from MLX itself, so that wrong names, types and
counts are refused as on a Mac.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from .capture import Call, Definition, Template, capture, dtype_name, plain_template
from .program import Dim3, Program, Ran

_RAW = {"bfloat16": np.dtype(np.uint16)}
SMALL = 8  # inputs of fewer elements are passed in the constant address space


@cache
def program(source: str) -> Program:
    """The program of a printed source, built once a process."""
    return Program(source)


@dataclass
class MetalKernel:
    """A kernel as `mx.fast.metal_kernel` returns one. `orders`: how many orders of threadgroups each call tries.

    `last` is the last call's run, `calls` counts them.
    """

    definition: Definition
    orders: int = 2
    last: Ran | None = None
    calls: int = 0
    _sources: dict[str, str] = field(default_factory=dict)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Dim3,
        threadgroup: Dim3,
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run and return the outputs; bytes that the kernel leaves unwritten are 0xFF. Raises KernelFault."""
        arrays = [each if isinstance(each, mx.array) else mx.array(each) for each in inputs]
        source = self.source(arrays, output_shapes, output_dtypes, template)
        if verbose:
            print(source)
        buffers = {name: raw(a) for name, a in zip(self.definition.input_names, arrays, strict=True)}
        shapes = zip(self.definition.output_names, output_shapes, output_dtypes, strict=True)
        outputs = {name: (shape, _numpy_type(dtype)) for name, shape, dtype in shapes}
        self.last = program(source).check(
            buffers, outputs, grid, threadgroup, init_value=init_value, orders=self.orders
        )
        self.calls += 1
        made = [self.last.outputs[name] for name in self.definition.output_names]
        return [_array(each, dtype) for each, dtype in zip(made, output_dtypes, strict=True)]

    def source(
        self,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Template | None = None,
    ) -> str:
        """What MLX prints for these arguments; sizes matter only where they change it."""
        call = Call(
            [_generic(array.shape, array.size) for array in inputs],
            [dtype_name(array.dtype) for array in inputs],
            [[1] * len(shape) for shape in output_shapes],
            [dtype_name(dtype) for dtype in output_dtypes],
            plain_template(template),
        )
        if repr(call) not in self._sources:
            self._sources[repr(call)] = capture(self.definition, call)
        return self._sources[repr(call)]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, str] | None = None,
) -> MetalKernel:
    """Stands in for `mx.fast.metal_kernel`. Inputs are made contiguous, whatever `ensure_row_contiguous` says."""
    return MetalKernel(
        Definition(
            name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs, compile_options
        )
    )


def raw(array: mx.array) -> np.ndarray:
    """The contiguous bytes of an array as numpy, bfloat16 as uint16."""
    return np.ascontiguousarray(np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array))


def _numpy_type(dtype: mx.Dtype) -> np.dtype:
    name = dtype_name(dtype)
    return _RAW.get(name) or np.dtype({"bool": "bool_"}.get(name, name))


def _array(made: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(made).view(dtype) if dtype == mx.bfloat16 else mx.array(made)


def _generic(shape: Sequence[int], size: int) -> list[int]:
    """A small shape for which MLX prints the same: as many dimensions, as small or as large."""
    if not shape:
        return []
    return [1] * (len(shape) - 1) + [1 if size < SMALL else SMALL]
