"""The Metal kernels for one pack, and MLX's own products, on arrays that stay on the GPU.

Owns the translation of weights and manifest into what `metal_kernels` and MLX take: every weight is a view of the
memory that the pack was read into. Hidden states are float32; products with 16-bit matrices take their input in the
matrix's type, as MLX's kernels do, and add in float32. Late: a result is computed when MLX is asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flashsparse.metal.refills import Timeline
from flashsparse.metal.shared import TYPES, Views
from flashsparse.metal.walk import Walk
from metal_kernels.records import Record

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.stats import Counters
    from flashsparse.weights import Buffer, ResidentStore, Weight


@dataclass(frozen=True)
class Matrix:
    """A weight on the GPU: plain, or with `bits` MLX affine with scales and biases. Products compute in `dtype`."""

    data: mx.array
    dtype: mx.Dtype
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 0
    group_size: int = 0


class MetalKernels:
    """One engine's, where `metal_kernels.launch.available`."""

    name = "metal"

    def __init__(self, manifest: Manifest, counters: Counters) -> None:
        self.manifest, self.counters = manifest, counters
        self.record = record_of(manifest)
        self.timeline, self.walk = Timeline(counters), Walk()
        self.views = Views()
        self._stored: dict[str, Matrix] = {}
        self._products: dict[str, Matrix] = {}

    def adopt(self, store: ResidentStore) -> None:
        """Make the tensors of `store` known."""
        for buffer in store.buffers:
            self.views.add(buffer)

    def buffer(self, nbytes: int) -> Buffer:
        """Memory that reads fill and kernels compute on."""
        from flashsparse.weights import Buffer

        return Buffer(nbytes, unified=True)

    def stored(self, weight: Weight) -> Matrix:
        """A weight as the pack stores it, in place."""
        found = self._stored.get(weight.name)
        if found is None:
            found = self._stored[weight.name] = self._view(weight)
        return found

    def _view(self, weight: Weight) -> Matrix:
        dtype = TYPES[weight.dtype]
        if weight.quant is None:
            return Matrix(self.views.of(weight.data, weight.dtype), dtype)
        assert weight.scales is not None and weight.biases is not None
        scales, biases = (self.views.of(part, weight.dtype) for part in (weight.scales, weight.biases))
        quant = weight.quant
        return Matrix(self.views.of(weight.data), dtype, scales, biases, quant.bits, quant.group_size)

    def product(self, weight: Weight) -> Matrix:
        """A weight as `linear` takes it: in place on a GPU.

        On a CPU, where the kernels' stand-in runs, MLX adds in the 16-bit type: a float32 copy serves there.
        """
        found = self._products.get(weight.name)
        if found is None:
            found = self.stored(weight)
            if mx.default_device().type != mx.DeviceType.gpu:
                found = Matrix(self.rows(found, None), mx.float32)
                mx.eval(found.data)
            self._products[weight.name] = found
        return found

    def rows(self, matrix: Matrix, ids: mx.array | None) -> mx.array:
        """float32: the rows `ids` of a matrix, or all."""
        if matrix.scales is None or matrix.biases is None:
            return (matrix.data if ids is None else matrix.data[ids]).astype(mx.float32)
        stored = matrix.data, matrix.scales, matrix.biases
        data, scales, biases = stored if ids is None else (part[ids] for part in stored)
        wide = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(data, *wide, group_size=matrix.group_size, bits=matrix.bits)

    def linear(self, matrix: Matrix, bias: mx.array | None, x: mx.array) -> mx.array:
        """float32 [..., rows] = x [..., cols] · matrixᵀ + bias. `matrix`: of `product`."""
        narrow = x.astype(matrix.dtype)
        if matrix.scales is not None:
            made = mx.quantized_matmul(
                narrow,
                matrix.data,
                matrix.scales,
                matrix.biases,
                transpose=True,
                group_size=matrix.group_size,
                bits=matrix.bits,
            )
        else:
            made = narrow @ matrix.data.T
        made = made.astype(mx.float32)
        return made if bias is None else made + bias

    def close(self) -> None:
        """Let go of the weights."""
        self.walk.layers = ()
        self._stored.clear()
        self._products.clear()
        self.views.clear()


def attention_dtype(stored: str) -> mx.Dtype:
    """What attention computes in over a KV cache of type `stored`: that on a GPU, float32 on a CPU (see `product`)."""
    return TYPES[stored] if mx.default_device().type == mx.DeviceType.gpu else mx.float32


def vector(values: np.ndarray | None) -> mx.array | None:
    """A small float32 vector on the GPU, made once when a model is built."""
    return None if values is None else mx.array(values)


def record_of(manifest: Manifest) -> Record:
    """The layout of a pack's records, for the kernels."""
    fields = {name: field.offset for name, field in manifest.record.fields.items()}
    return Record(
        d=manifest.hidden_size,
        format=f"Q{manifest.quant.bits}" if manifest.quant else manifest.source_dtype,
        source=manifest.source_dtype,
        group=manifest.quant.group_size if manifest.quant else 0,
        activation=manifest.activation.name,
        param=manifest.activation.param or 0.0,
        gated=manifest.gated,
        **fields,
    )
