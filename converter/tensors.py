"""Whether a checkpoint's tensors are those of its configuration, in name, shape and type.

What they must be is in `flashsparse.models.tensors`, shared with the engine; nothing here reads data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from converter.source import SourceTensor
from flashsparse.errors import CheckpointError
from flashsparse.models.tensors import HEAD

FLOATS = ("F32", "F16", "BF16")
# Buffers that old checkpoints carry; they follow from the configuration.
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def canonical(family: str, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors under their canonical names: OPT's `decoder.` becomes `model.decoder.`."""
    if family != "opt":
        return dict(tensors)
    result: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        new = f"model.{name}" if name.startswith("decoder.") else name
        if new in result:
            raise CheckpointError(f"{tensor.path}: tensor {name!r}: also there as {result[new].info.name!r}")
        result[new] = tensor
    return result


def check_tensors(
    tensors: Mapping[str, SourceTensor], shapes: Mapping[str, tuple[int, ...]], tied: bool, where: str
) -> str:
    """Checks names, shapes and types against what is expected; returns the weights' common type.

    Raises CheckpointError for missing and unknown tensors, wrong shapes, and types that differ: every matrix has one
    float type, other tensors have the same or F32.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name!r}: missing, expected shape {list(shape)}")
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {name!r}: found shape {list(tensor.shape)}, expected {list(shape)}"
            )
    for name in tensors:
        if name not in shapes and not _IGNORED.fullmatch(name) and not (tied and name == HEAD):
            raise CheckpointError(f"{tensors[name].path}: tensor {name!r}: not part of this architecture")
    return _common_dtype(tensors, shapes)


def _common_dtype(tensors: Mapping[str, SourceTensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    first = next(name for name, shape in shapes.items() if len(shape) == 2)
    dtype = tensors[first].dtype
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{tensors[first].path}: tensor {first!r}: found type {dtype}, expected one of {', '.join(FLOATS)}"
        )
    for name, shape in shapes.items():
        found = tensors[name].dtype
        if found != dtype and (len(shape) == 2 or found != "F32"):
            raise CheckpointError(
                f"{tensors[name].path}: tensor {name!r}: found type {found}, expected {dtype} as {first!r} has"
            )
    return dtype
