"""The tensors of a compact gate in the resident file: names, types and shapes. `docs/exact.md` says what they mean."""

from __future__ import annotations

from flashsparse.pack.layout import COPY_GROUP

PARTS = ("high", "low", "scales", "errors")


def copy_tensors(base: str, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of the copy of the matrix `base` [rows, cols]; its bias, if any, is resident beside it."""
    groups = -(-cols // COPY_GROUP)
    return {
        f"{base}.high": ("I8", (rows, groups * COPY_GROUP)),
        f"{base}.low": ("U8", (rows, groups * COPY_GROUP // 2)),
        f"{base}.scales": ("BF16", (rows, groups)),
        f"{base}.errors": ("F32", (rows, 3)),
    }
