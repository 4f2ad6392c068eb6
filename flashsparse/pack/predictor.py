"""The predictor file of a pack: that its tensors are those which the manifest's `predictor` object implies.

Native code computes on these bytes without looking again, so names, types and shapes are checked before any is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flashsparse.errors import PackError
from flashsparse.pack.checks import listed
from flashsparse.pack.layout import Quant
from flashsparse.pack.safetensors import check_storage
from flashsparse.sparsity.spec import optional_tensors, predictor_tensors

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.pack.safetensors import Header


def check_predictor(manifest: Manifest, header: Header) -> None:
    """Raises PackError naming file and tensor: one missing, of another type or shape, unknown or out of place."""
    assert manifest.predictor is not None
    expected = predictor_tensors(manifest.predictor, manifest.shape)
    optional = optional_tensors(expected)
    for name, (dtype, shape) in expected.items():
        info = header.tensors.get(name)
        if info is None:
            if name in optional:
                continue
            raise PackError(f"{header.path}: tensor {name!r}: missing, expected {dtype} {list(shape)}")
        if (info.dtype, info.shape) != (dtype, shape):
            raise PackError(
                f"{header.path}: tensor {name!r}: found {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
            )
    unknown = sorted(set(header.tensors) - set(expected))
    if unknown:
        raise PackError(f"{header.path}: tensor {listed(map(repr, unknown))}: found, expected no such tensor")
    check_storage(header)


def predictor_quant(manifest: Manifest) -> Mapping[str, Quant]:
    """Base name -> quantization of every low-bit copy in the predictor file."""
    if manifest.predictor is None:
        return {}
    return {
        f"layers.{index}.{matrix}": Quant(layer.bits, layer.group_size)
        for index, layer in enumerate(manifest.predictor.layers)
        if layer.bits is not None and layer.group_size is not None
        for matrix in ("gate", "up")
    }
